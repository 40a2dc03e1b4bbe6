"""The ONNX files: names, quantization, numbers."""

import re
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, fx, nn

from calib.__main__ import main as check
from calib.calibrator import calibrate
from calib.network import Network
from calib.plan import Int8Plan, plan_int8
from calib.table import CalibrationTable
from calib.tracing import trace
from common.errors import InputError
from common.run import Run
from engines.integer import IntegerNetwork
from engines.onnx import float as onnx_float
from engines.onnx.export import export, export_fp32, export_int8, onnx_table
from engines.onnx.float import float_model, keep_outputs
from engines.onnx.int8 import int8_model
from engines.onnxruntime.engine import open_session
from engines.onnxruntime.form import for_onnxruntime
from engines.tensorrt.form import for_tensorrt
from models import LeNet
from tests.networks import NETWORKS, Unrunnable, images, make_network, make_plan, run_onnx


def produced(model: onnx.ModelProto) -> set[str]:
    return {name for node in model.graph.node for name in node.output} | {value.name for value in model.graph.input}


def initializers(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {value.name: numpy_helper.to_array(value) for value in model.graph.initializer}


def pairs(model: onnx.ModelProto) -> dict[str, tuple[float, int, np.dtype]]:
    """Value -> scale, zero point and its type, for every QuantizeLinear."""
    values = initializers(model)
    return {
        node.input[0]: (float(values[node.input[1]]), int(values[node.input[2]]), values[node.input[2]].dtype)
        for node in model.graph.node
        if node.op_type == "QuantizeLinear"
    }


def table_of(plan: Int8Plan) -> CalibrationTable:
    """A table with another scale for every tensor, so that none can be taken for another."""
    return CalibrationTable({name: 0.01 + 0.001 * number for number, name in enumerate(plan.network.tensors)})


def test_lenet_has_caffes_names():
    model = float_model(make_network("lenet"))
    assert [name for node in model.graph.node for name in node.output] == [
        *("conv1", "pool1", "conv2", "pool2", "pool2/flatten", "ip1/before_relu", "ip1", "ip2", "prob")
    ]


def test_a_table_for_the_file_names_every_value():
    plan = make_plan(make_network("residual"))
    table = table_of(plan)
    model = float_model(plan.network)
    extended = onnx_table(plan.network, table, model)
    assert set(extended.scales) == produced(model)
    assert {name: extended.scales[name] for name in table.scales} == table.scales
    assert extended.scales["conv1/before_relu"] == table.scales["conv1"]
    assert extended.scales["pool/flatten"] == table.scales["pool"]
    assert extended.header == table.header


def test_a_table_made_of_the_file_itself_gives_the_entries_that_the_calibration_table_lacks():
    plan = make_plan(make_network("residual"))
    table, model = table_of(plan), float_model(plan.network)
    observed = CalibrationTable({"data": 7.0, "/fc/Gemm_output": 0.5, "pool/flatten": 0.25})
    completed = onnx_table(plan.network, table, model, observed)
    assert {name: completed.scales[name] for name in table.scales} == table.scales
    assert (completed.scales["/fc/Gemm_output"], completed.scales["pool/flatten"]) == (0.5, 0.25)
    assert set(completed.scales) == produced(model) | {"/fc/Gemm_output"}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_table_for_the_file_passes_the_check(name, tmp_path, capsys):
    """Without a tensor that the file lacks, and with all that it has but those of the exporter's own making."""
    network = make_network(name)
    model, table = float_model(network), CalibrationTable(dict.fromkeys(network.tensors, 0.01))
    onnx.save(model, tmp_path / "network.onnx")
    onnx_table(network, table, model).write(tmp_path / "table")
    assert check(["check", str(tmp_path / "table"), "--onnx", str(tmp_path / "network.onnx")]) == 0
    (warning,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("warning"))
    missing = re.findall(r"'(.+?)'", warning)
    assert missing
    assert all(re.search("/(Gemm|MatMul)_", tensor) for tensor in missing)  # matrix products before their bias
    table.write(tmp_path / "table")
    assert check(["check", str(tmp_path / "table"), "--onnx", str(tmp_path / "network.onnx")]) == 0


def test_outputs_that_nobody_asked_for_go_but_their_names_stay():
    shape = [1, 2]
    float_value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Identity", ["w"], ["w_again"]),
            onnx.helper.make_node("Mul", ["data", "w"], ["a"]),
            onnx.helper.make_node("Identity", ["a"], ["a_again"]),
            onnx.helper.make_node("Add", ["a_again", "w_again"], ["prob"], "sum"),
        ],
        "test",
        [float_value("data", onnx.TensorProto.FLOAT, ["batch", 2])],
        [float_value(name, onnx.TensorProto.FLOAT, shape) for name in ("prob", "a", "a_again")],
        [numpy_helper.from_array(np.ones((1, 2), np.float32), "w")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    model.ir_version = 8
    assert keep_outputs(model, ["prob"]) == {"w_again": "w", "a_again": "a"}
    assert [value.name for value in graph.output] != ["prob"]  # the model has a copy
    assert [value.name for value in model.graph.output] == ["prob"]
    assert [(node.op_type, *node.input) for node in model.graph.node] == [("Mul", "data", "w"), ("Add", "a", "w")]
    assert len({node.name for node in model.graph.node}) == 2
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_array_equal(run_onnx(model, torch.ones(3, 2)), np.full((3, 2), 2.0))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("option", ["output", "kept"])
@pytest.mark.parametrize("for_cpu", [False, True], ids=["portable", "cpu"])
def test_int8_model_agrees_with_the_simulation(name, option, for_cpu):
    """Without options, and to the bit: tests/general/test_networks.py."""
    network = make_network(name)
    keep = (network.layers[1].name,) if option == "kept" else ()
    plan = make_plan(network, keep, quantize_output=option == "output")
    model = int8_model(plan, for_cpu)
    onnx.checker.check_model(model, full_check=True)
    batch = images(name, 32, seed=3)
    expected = IntegerNetwork(for_onnxruntime(plan) if for_cpu else for_tensorrt(plan))(batch).numpy()
    result = run_onnx(model, batch)
    # A code that differs at a tie moves a probability by little.
    step = plan.output_scale or 0.0
    assert np.quantile(np.abs(result - expected), 0.9) <= 1.01 * step + 1e-3
    assert np.abs(result - expected).max() <= 1.01 * step + 0.01


def test_portable_model_is_symmetric_int8_with_float_biases():
    plan = make_plan(make_network("lenet"))
    model = int8_model(plan)
    assert {name: scale for name, (scale, _, _) in pairs(model).items()} == {
        "data": plan.scales["data"],
        "pool1": plan.scales["pool1"],
        "pool2": plan.scales["flatten"],
        "ip1": plan.scales["relu1"],
    }
    assert {(zero, str(kind)) for _, zero, kind in pairs(model).values()} == {(0, "int8")}
    assert not any(value.dtype == np.int32 for value in initializers(model).values())


def test_cpu_model_has_the_same_codes_offset_by_128_but_behind_a_relu():
    plan = make_plan(make_network("lenet"))
    cpu = int8_model(plan, for_cpu=True)
    assert {name: scale for name, (scale, _, _) in pairs(cpu).items()} == {
        "data": plan.scales["data"],
        "conv1": plan.scales["pool1"],
        "pool1": plan.scales["pool1"],
        "conv2": plan.scales["flatten"],
        "pool2": plan.scales["flatten"],
        "pool2/flatten": plan.scales["flatten"],
        "ip1/before_relu": plan.scales["relu1"],
        "ip1": plan.scales["relu1"],
    }
    assert {str(kind) for _, _, kind in pairs(cpu).values()} == {"uint8"}
    assert {name for name, (_, zero, _) in pairs(cpu).items() if zero != 128} == {"ip1"}
    assert pairs(cpu)["ip1"][1] == 0
    assert sum(value.dtype == np.int32 and value.size > 1 for name, value in initializers(cpu).items()) >= 4


def test_nothing_stands_between_a_layer_and_its_relu_in_the_portable_model():
    for name in ("lenet", "residual", "sequence"):
        model = int8_model(make_plan(make_network(name)))
        made_by = {output: node.op_type for node in model.graph.node for output in node.output}
        sources = [made_by[node.input[0]] for node in model.graph.node if node.op_type == "Relu"]
        assert sources
        assert "DequantizeLinear" not in sources


def test_the_softmax_is_quantized_on_request_alone():
    network = make_network("lenet")
    scores = "ip2/flatten_1"  # of the convolution that ip2 is there
    assert scores not in pairs(int8_model(make_plan(network)))
    quantized = pairs(int8_model(make_plan(network, quantize_output=True)))
    assert {scores, "prob_QuantizeLinear_Input"} <= quantized.keys()


def test_equal_weights_of_a_layer_in_float_stay_float():
    """The exporter merges equal weights; a layer in INT8 must not quantize those of one that is kept in float."""
    plan = make_plan(make_network("mixed"), keep_fp=("twice",))
    model = int8_model(plan)
    kinds = {
        node.name: values.get(node.input[1])
        for values in [{value.name: value.data_type for value in model.graph.initializer}]
        for node in model.graph.node
        if node.op_type == "Conv"
    }
    assert sorted(kind or 0 for kind in kinds.values()) == [0, 0, onnx.TensorProto.FLOAT]


def test_a_dead_channel_keeps_its_bias():
    """Folded batch normalisation leaves weights next to nothing beside a bias, whose int32 form must not overflow."""
    model = LeNet().eval()
    with torch.no_grad():
        model.conv1.weight[0] = 1e-12
        model.conv1.bias[0] = 3.0
        model.conv1.weight[1] = 0.0
    network = trace(model, "lenet", (1, 28, 28))
    plan = make_plan(network)
    batch = images("lenet", 8)
    expected = IntegerNetwork(plan)(batch).numpy()
    for for_cpu in (False, True):
        np.testing.assert_allclose(run_onnx(int8_model(plan, for_cpu), batch), expected, atol=0.02)


def test_export_writes_everything(tmp_path):
    network = trace(LeNet().eval(), input_shape=(1, 28, 28))
    plan = make_plan(make_network("lenet"))
    table = table_of(plan)
    run_folder = Run("test", tmp_path)
    written = export(network, plan_int8(network, table), table, run_folder, {"dataset": "mnist", "seed": "1"})
    assert [path.name for path in written.files] == [
        *("LeNet_fp32.onnx", "LeNet_int8.onnx", "LeNet_int8_cpu.onnx", "CalibrationTableLeNet_onnx")
    ]
    assert sorted(path.name for path in run_folder.folder.iterdir()) == sorted(path.name for path in written.files)
    for path in written.files[:3]:
        model = onnx.load(path)
        onnx.checker.check_model(model, full_check=True)
        assert {entry.key: entry.value for entry in model.metadata_props} == {"dataset": "mnist", "seed": "1"}
        assert model.producer_name == "int8-workflow"
        assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
        assert model.opset_import[0].version == onnx_float.OPSET
    assert written.int8 is not None
    assert written.int8.stat().st_size <= 0.27 * written.fp32.stat().st_size
    assert CalibrationTable.read(written.files[3]).scales.keys() >= table.scales.keys()


def test_export_without_a_plan_writes_the_float_file_alone(tmp_path):
    network = make_network("lenet")
    written = export(network, None, None, Run("test", tmp_path), {})
    assert written.files == [tmp_path / "test" / "lenet_fp32.onnx"]


def test_a_file_that_does_not_run_is_not_written(tmp_path, monkeypatch):
    network = trace(Unrunnable(), input_shape=(1, 2, 2))
    path = tmp_path / "network.onnx"
    with pytest.raises(InputError, match=r"network\.onnx is not written.*out of data bounds") as error:
        export_fp32(network, path, {})
    assert "\n" not in str(error.value)
    assert not path.exists()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    export_fp32(network, path, {})
    assert path.exists()


class Miswritten(torch.autograd.Function):
    """A function whose ONNX operator is another one."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def symbolic(g, x):
        return g.op("Identity", x)


@fx.wrap
def miswritten(x: Tensor) -> Tensor:
    return Miswritten.apply(x)


class Wrong(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return miswritten(x).flatten(1) * self.factor


@pytest.mark.parametrize("factor", [1.0, 1e-3])
def test_a_file_that_computes_something_else_is_not_written(factor, tmp_path):
    path = tmp_path / "network.onnx"
    with pytest.raises(InputError, match="computes something else than the network"):
        export_fp32(trace(Wrong(factor), input_shape=(1, 2, 2)), path)
    assert not path.exists()


class Inverse(nn.Module):
    """An operation for which ONNX has no operator."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.qr(x).Q.flatten(1)


def test_a_network_that_onnx_cannot_express_is_one_line():
    network: Network = trace(Inverse(), input_shape=(1, 4, 4))
    with pytest.raises(InputError, match="cannot be exported to ONNX") as error:
        float_model(network)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("form", ["fp32", "int8", "int8_cpu"])
def test_weights_beyond_a_limit_lie_in_a_file_beside_the_network(tmp_path, form):
    plan = make_plan(make_network("residual"))

    def write(path: Path, largest: int) -> onnx.ModelProto:
        if form == "fp32":
            export_fp32(plan.network, path, {"weights": "1"}, largest=largest)
        else:
            export_int8(plan, path, {"weights": "1"}, for_cpu=form == "int8_cpu", largest=largest)
        model = onnx.load(path)
        for weight in model.graph.initializer:
            weight.ClearField("data_location")  # which loading sets to its default
        return model

    path = tmp_path / "network.onnx"
    whole = write(tmp_path / "whole.onnx", 2**30)
    assert write(path, 500) == whole
    assert sorted(file.name for file in tmp_path.iterdir()) == ["network.onnx", "network.onnx.data", "whole.onnx"]
    assert (tmp_path / "network.onnx.data").stat().st_size > 500

    given = {"data": images("residual", 2).numpy()}
    outputs = [onnxruntime.InferenceSession(file).run(None, given)[0] for file in (path, tmp_path / "whole.onnx")]
    assert np.array_equal(*outputs)
    session, optimized = open_session(whole, 1, largest=500)
    assert np.array_equal(session.run(None, given)[0], outputs[1])
    assert [node.op_type for node in optimized.graph.node] == [
        node.op_type for node in open_session(whole, 1)[1].graph.node
    ]

    write(path, 2**30)
    assert not (tmp_path / "network.onnx.data").exists()


@pytest.mark.parametrize("size", [(7, 7), (3, 5), (4, None)])
def test_adaptive_pooling_with_windows_of_several_sizes(size):
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(size), nn.Conv2d(8, 4, 1))
    network = trace(nn.Sequential(*layers), "pooled", (3, 9, 9))
    batch = torch.randn(8, 3, 9, 9)
    plan = plan_int8(network, calibrate(network, [batch]))
    for model, expected in (
        (float_model(network), network.module(batch)),
        (int8_model(plan), IntegerNetwork(for_tensorrt(plan))(batch)),
    ):
        assert model.opset_import[0].version == onnx_float.OPSET
        np.testing.assert_allclose(run_onnx(model, batch), expected.detach(), atol=1e-5)
