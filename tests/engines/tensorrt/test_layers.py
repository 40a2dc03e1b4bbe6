"""Layers of an engine in INT8, from TensorRT's verbose log."""

import json
import os
from pathlib import Path

import pytest
import torchvision
from torch import nn

from calib.plan import plan_int8
from calib.table import CalibrationTable
from calib.tracing import trace
from common.decode import decode
from engines.tensorrt.build import BuilderLog
from engines.tensorrt.form import for_tensorrt
from engines.tensorrt.layers import EngineLayer, executed_macs, read_layers
from models import LeNet
from models.small_resnet import SmallResNet

LISTED = Path(__file__).with_name("layers")
SCALES = {"data": 0.008, "conv1": 0.03, "pool1": 0.03, "conv2": 0.09, "pool2": 0.09, "ip1": 0.05, "ip2": 0.2}
MACS = {"conv1": 288_000, "conv2": 1_600_000, "ip1": 400_000, "ip2": 5_000}


def convolution(value, module, line=543):
    scope = f", scope: __module.{module}" if module else ""
    place = "/site/torch/nn/modules/conv.py" if module else "<eval_with_key>.6"
    return f"%{value} : Tensor = aten::_convolution(%x, %w, %b, %6, %5){scope} # {place}:{line}:0"


def matmul(value):
    return f"%{value} : Tensor = aten::matmul(%x.7, %61) + %64 : Tensor = aten::add(%63, %62, %60)"


def line(kind, name, reads, writes="Float"):
    return f"Layer({kind}): {name}, Tactic: 0x7bc32c782b800c48, x ({reads}[1,20:32,12,12]) -> y ({writes}[1,50,8,8])"


def log(*lines):
    return "\n".join(["DEBUG: [Conversion] - Engine Layer Information:", *lines, "DEBUG: [Conversion] - Deleting", "x"])


IMPLICIT = log(
    line("CaskConvolution", convolution("input.1", "conv1"), "Float"),
    line("CaskPooling", "%input.3 : Tensor = aten::max_pool2d(%input.1), scope: __module.pool1 # a.py:1:0", "Float"),
    line("Reformat", f"Reformatting CopyNode for Input Tensor 0 to {convolution('input.5', 'conv2')}", "Float", "Int8"),
    line("CaskConvolution", convolution("input.5", "conv2"), "Int8"),
    line("CaskGemmConvolution", matmul(62), "Float"),
    line("CaskGemmConvolution", matmul(67), "Float"),
)


@pytest.fixture(scope="module")
def network():
    return trace(LeNet(), "LeNet", (1, 28, 28))


def planned(network, keep_fp=()):
    return plan_int8(network, CalibrationTable(dict.fromkeys(network.tensors, 0.01)), keep_fp)


def int8(count):
    return {layer.layer: layer.int8 for layer in count.layers}


def test_layers_with_their_types():
    layers = read_layers(IMPLICIT)
    assert [layer.kind for layer in layers] == [
        "CaskConvolution",
        "CaskPooling",
        "Reformat",
        "CaskConvolution",
        "CaskGemmConvolution",
        "CaskGemmConvolution",
    ]
    assert (layers[2].reads, layers[2].writes) == (["Float"], ["Int8"])
    assert layers[3].name == convolution("input.5", "conv2")


def test_all_engines_of_a_network_that_was_split():
    earlier = log(line("CaskConvolution", convolution("input.1", "conv1"), "Int8"))
    assert read_layers(earlier + IMPLICIT) == read_layers(earlier) + read_layers(IMPLICIT)


def test_what_follows_the_list_is_not_read():
    text = log(line("CaskConvolution", "conv", "Int8")).partition("\nDEBUG: [Conversion] - Del")[0]
    assert read_layers(f"{text}\nanother way of logging (Float[1]) -> (Float[1])\n") == read_layers(text)


def test_a_name_with_line_breaks_is_one_layer():
    text = log(line("CaskConvolution", "one,\n two", "Int8"), line("CaskPooling", "pool", "Float"))
    assert [layer.name for layer in read_layers(text)] == ["one,\n two", "pool"]


@pytest.mark.parametrize("text", ["", "DEBUG: nothing\n", "Engine Layer Information:", "Engine Layer Information:\nno"])
def test_a_log_without_layers(text, network):
    assert read_layers(text) == []
    assert executed_macs(planned(network), [], "here") is None


def test_an_older_way_of_writing_types():
    text = log(
        "Layer(CaskConvolution): conv, Tactic: 1025026069226666066, x[Int8(128,3,224,224)], y[Float(1)] -> z[Int8(1)]"
    )
    assert [(layer.name, layer.reads, layer.writes) for layer in read_layers(text)] == [
        ("conv", ["Int8", "Float"], ["Int8"])
    ]


def test_multiplications_by_module_and_by_place(network):
    count = executed_macs(planned(network), read_layers(IMPLICIT), "as the engine executes it")
    assert {layer.layer: layer.macs for layer in count.layers} == MACS
    assert int8(count) == {"conv1": False, "conv2": True, "ip1": False, "ip2": False}
    assert "in ip1, conv1, ip2 (computed in float: TensorRT chose that kernel, by speed)" in count.warning()
    assert count.source == "as the engine executes it"
    assert all(layer.planned for layer in count.layers)


def test_a_layer_that_was_not_to_run_in_int8_has_that_reason(network):
    count = executed_macs(planned(network, ["ip1"]), read_layers(IMPLICIT), "here")
    assert {layer.layer: layer.planned for layer in count.layers} == {**dict.fromkeys(MACS, True), "ip1": False}
    reasons = {layer.layer: layer.reason for layer in count.layers}
    assert reasons == {
        "conv1": "computed in float: TensorRT chose that kernel, by speed",
        "conv2": "",
        "ip1": "kept in float as asked",
        "ip2": "computed in float: TensorRT chose that kernel, by speed",
    }


def test_products_of_two_values_are_not_counted():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3)

        def forward(self, x):
            x = self.conv(x).flatten(2)
            return x @ x.transpose(1, 2)

    listed = read_layers(log(line("CaskConvolution", convolution("input.1", "conv"), "Int8")))
    count = executed_macs(planned(trace(Attention(), "Attention", (1, 8, 8))), listed, "here")
    assert int8(count) == {"conv": True}
    assert count.uncounted == ["matmul"]


@pytest.mark.parametrize(
    ("name", "model", "shape", "layers", "in_float"),
    [
        ("LeNet", LeNet, (1, 28, 28), 4, ["ip1", "conv1", "ip2"]),
        ("SmallResNet", SmallResNet, (1, 28, 28), 11, []),
        ("resnet18", lambda: torchvision.models.resnet18(num_classes=10), (3, 224, 224), 21, []),
    ],
)
def test_engines_that_tensorrt_built(name, model, shape, layers, in_float):
    """Implicit INT8 for batch 1, by TensorRT 10.6.0 on an H100, as evaluate.py kept them beside the engines."""
    listed = [decode(EngineLayer, item, name) for item in json.loads((LISTED / f"{name}.json").read_text())]
    count = executed_macs(planned(trace(model(), name, shape)), listed, "here")
    assert len(count.layers) == layers
    assert count.uncounted == []
    assert [layer.layer for layer in count.in_float] == in_float


def test_what_cannot_be_told_is_not_counted(network):
    block = line("Myelin", "{ForeignNode[%61 : Tensor = aten::t(%w)...%87 : Tensor = aten::softmax(%x)]}", "Float")
    text = log(*IMPLICIT.splitlines()[1:5], block)
    count = executed_macs(planned(network), read_layers(text), "here")
    assert int8(count) == {"conv1": False, "conv2": True}
    assert count.uncounted == ["ip1", "ip2"]


def test_an_engine_with_explicit_quantization(network):
    """For batch 8, by TensorRT 10.6.0 on an H100: its convolutions have numbers, and no names."""
    listed = [decode(EngineLayer, item, "LeNet") for item in json.loads((LISTED / "LeNet.explicit.json").read_text())]
    plan = for_tensorrt(plan_int8(network, CalibrationTable(SCALES)))
    count = executed_macs(plan, listed, "here")
    assert int8(count) == {"conv1": True, "conv2": True, "ip1": True, "ip2": True}
    assert {layer.layer: layer.macs for layer in count.layers} == MACS
    for layer in listed:
        if layer.name.endswith("(Unnamed Layer* 16) [Convolution]"):
            layer.reads[0] = "Float"
    assert int8(executed_macs(plan, listed[::-1], "here")) == {
        "conv1": True,
        "conv2": False,
        "ip1": True,
        "ip2": True,
    }
    del listed[1]  # with a convolution that TensorRT computes within a block, the others cannot be told apart
    assert executed_macs(plan, listed, "here") is None


def test_a_log_is_taken_from_stderr_and_errors_are_given_back(capfd):
    taken = BuilderLog()
    with taken.taking():
        os.write(2, b"DEBUG: a tactic\nERROR: no kernel\n")
    os.write(2, b"after\n")
    assert taken.text == "DEBUG: a tactic\nERROR: no kernel\n"
    assert capfd.readouterr().err == "ERROR: no kernel\nafter\n"


def test_a_log_is_taken_of_a_build_that_fails(capfd):
    taken = BuilderLog()

    def build():
        with taken.taking():
            os.write(2, b"DEBUG: a tactic\nERROR: no kernel\n")
            raise RuntimeError("no engine")

    with pytest.raises(RuntimeError, match="no engine"):
        build()
    assert capfd.readouterr().err == "ERROR: no kernel\n"
    assert taken.text.startswith("DEBUG")


def test_a_transposed_convolution_multiplies_each_value_that_it_reads() -> None:
    network = trace(nn.Sequential(nn.ConvTranspose2d(3, 4, 2, 2), nn.Conv2d(4, 2, 1)).eval(), "net", (3, 8, 8))
    layers = read_layers(log(line("CaskDeconvolutionV2", convolution("input.1", "0"), "Int8")))
    count = executed_macs(planned(network), layers, "the engine")
    assert count is not None
    assert [(layer.layer, layer.macs, layer.int8) for layer in count.layers] == [("0", 3 * 64 * 4 * 4, True)]
