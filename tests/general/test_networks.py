"""What holds for LeNet holds for every network that torch.fx traces: names, sharing, arithmetic, ONNX files."""

from functools import cache

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from calib.explicit import fake_quantize
from calib.network import Network
from calib.plan import Int8Plan
from engines.integer import IntegerNetwork
from engines.onnx import float as onnx_float
from engines.onnx.float import float_model
from engines.onnx.int8 import int8_model
from engines.onnxruntime.form import for_onnxruntime
from engines.tensorrt.form import for_tensorrt
from tests.general import zoo
from tests.networks import without_saturation

IMAGES = 8


@cache
def model(name: str) -> nn.Module:
    return zoo.build(name)


@cache
def network(name: str) -> Network:
    return zoo.traced(name, model(name))


@cache
def plan(name: str) -> Int8Plan:
    return zoo.exact_plan(network(name), zoo.images_of(name, 16, seed=1))


@cache
def simulated(name: str) -> Tensor:
    return IntegerNetwork(plan(name))(zoo.images_of(name, IMAGES))


@pytest.fixture(params=list(zoo.ALL))
def name(request: pytest.FixtureRequest) -> str:
    value: str = request.param
    return value


def test_the_traced_network_computes_what_the_model_does(name: str) -> None:
    images = zoo.images_of(name, IMAGES)
    with torch.no_grad():
        expected = model(name)(images)
        found = network(name).run(images, lambda tensor, value: None)
    torch.testing.assert_close(found, expected, atol=1e-5 * max(1.0, float(expected.abs().max())), rtol=1e-3)


def test_names_are_unique_and_those_of_every_trace(name: str) -> None:
    again = zoo.traced(name, zoo.build(name))

    assert again.tensors == network(name).tensors
    assert again.layers == network(name).layers
    assert len(set(again.tensors)) == len(again.tensors)
    assert again.tensors[0] == "data"
    assert (again.tensors[-1] == "prob") == again.gives_probabilities or "prob" in dict(model(name).named_modules())
    assert len({layer.name for layer in again.layers}) == len(again.layers)


def test_operations_that_stay_in_float_are_named(name: str) -> None:
    assert set(network(name).unsupported.values()) == zoo.UNSUPPORTED.get(name, set())
    assert network(name).unsupported.keys().isdisjoint(layer.name for layer in network(name).layers)
    assert not plan(name).kept


def test_explicit_quantization_agrees_with_the_simulation(name: str) -> None:
    found = fake_quantize(plan(name))(zoo.images_of(name, IMAGES))

    assert torch.equal(found, simulated(name))


def test_int8_differs_from_float(name: str) -> None:
    """The comparisons above would hold for a network that nothing was done to."""
    reference = plan(name).network.run(zoo.images_of(name, IMAGES), lambda tensor, value: None)

    assert float((simulated(name) - reference).abs().max()) > 1e-5


def check_float_file(name: str) -> None:
    """Each tensor of the table, looked up in the file, has the value that calibration observes."""
    model = float_model(network(name))
    expected: dict[str, Tensor] = {}
    images = zoo.images_of(name, 3)
    outputs = network(name).run(images, lambda tensor, value: expected.update({tensor: value.clone()}))
    values = {output for node in model.graph.node for output in node.output}
    assert values >= set(network(name).tensors) - {"data"}
    assert [value.name for value in model.graph.input] == ["data"]
    for count in (1, 3):
        torch.testing.assert_close(_run(model, images[:count]), outputs[:count], atol=2e-5, rtol=1e-3)
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=tensor) for tensor in expected if tensor != "data")

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"data": images.numpy()})
    for output, value in zip(session.get_outputs(), found, strict=True):
        largest = float(expected[output.name].abs().max())
        torch.testing.assert_close(torch.from_numpy(value), expected[output.name], atol=1e-4 * largest + 1e-6, rtol=0)


def check_int8_file(name: str, for_cpu: bool) -> None:
    """In a plain session; the file for any reader needs the option that docs/onnx.md names, on some CPUs."""
    model = int8_model(plan(name), for_cpu)
    onnx.checker.check_model(model, full_check=True)
    found = _run(model, zoo.images_of(name, IMAGES), None if for_cpu else without_saturation())

    form = (for_onnxruntime if for_cpu else for_tensorrt)(plan(name))
    expected = IntegerNetwork(form)(zoo.images_of(name, IMAGES))
    torch.testing.assert_close(found, expected, atol=1e-6 * max(1.0, float(expected.abs().max())), rtol=1e-5)


def test_every_tensor_of_the_table_is_a_value_of_the_float_onnx_file(name: str) -> None:
    check_float_file(name)


@pytest.mark.parametrize("for_cpu", [False, True], ids=["portable", "for_cpu"])
def test_onnx_runtime_agrees_with_the_simulation_in_int8(name: str, for_cpu: bool) -> None:
    check_int8_file(name, for_cpu)


@pytest.mark.parametrize("of", ["branches", "mixed", "tokens"])
def test_pytorchs_other_exporter_gives_the_same(of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript", reason="PyTorch's torch.export-based exporter needs onnxscript")
    monkeypatch.setattr(onnx_float, "_torchscript_export", onnx_float._dynamo_export)
    check_float_file(of)
    check_int8_file(of, for_cpu=True)


def _run(model: onnx.ModelProto, images: Tensor, options: onnxruntime.SessionOptions | None = None) -> Tensor:
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"data": images.numpy()})[0])
