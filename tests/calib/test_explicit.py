"""Explicit quantization agrees with the integer simulation, code by code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor, fx, nn
from torch.nn import functional as F

from calib.calibrator import calibrate
from calib.explicit import fake_quantize, place
from calib.int8 import quantize, quantize_weight
from calib.plan import Int8Plan, plan_int8
from calib.tracing import trace
from engines.integer import IntegerNetwork
from engines.onnx_int8 import int8_model
from engines.tensorrt.form import for_tensorrt
from models import LeNet
from tests.networks import NETWORKS, images, make_network, make_plan, mnist, mnist_plan, run_onnx

TIE = 2e-4
"""How far from a tie, in steps, float32 arithmetic on values of up to 128 steps may still round the other way."""


class Simulation(IntegerNetwork):
    """The integer simulation, which remembers the value of every fx node."""

    def __init__(self, plan: Int8Plan) -> None:
        super().__init__(plan)
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n.name] = super().run_node(n)
        return self.values[n.name]


@dataclass
class Difference:
    """Codes in which explicit quantization and the simulation differ.

    Attributes:
        codes: Compared.
        differ: Of them, different ones.
        steps: The largest difference.
        off_tie: Different codes whose exact value is not next to a tie.
    """

    codes: int = 0
    differ: int = 0
    steps: int = 0
    off_tie: int = 0


class _Forced(fx.Interpreter):
    """Runs explicit quantization, but hands on the simulation's codes: each layer works on equal inputs."""

    def __init__(self, module: fx.GraphModule, simulation: Simulation, found: dict[str, Difference], force: bool):
        super().__init__(module)
        self._simulation, self._found, self._force = simulation, found, force

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.target is not torch.fake_quantize_per_tensor_affine:
            return value
        name, scale = n.name.removesuffix("_quantized"), n.args[1]
        exact = self._simulation.values[name]
        expected = quantize(exact, scale)
        steps = (value / scale).round_().sub_(expected).abs_()
        different = steps > 0
        position = exact[different].double() / scale
        distance = (position - position.floor() - 0.5).abs()
        found = self._found.setdefault(name, Difference())
        found.codes += steps.numel()
        found.differ += int(different.sum())
        found.steps = max(found.steps, int(steps.max()))
        found.off_tie += int((distance > TIE).sum())
        return expected * scale if self._force else value


def compare(plan: Int8Plan, batches: list[Tensor]) -> tuple[dict[str, Difference], dict[str, Difference], int]:
    """By value: layer by layer, from equal inputs, and end to end; then the number of images with another class."""
    module, simulation = fake_quantize(plan), Simulation(plan)
    by_layer: dict[str, Difference] = {}
    end_to_end: dict[str, Difference] = {}
    classes = 0
    with torch.inference_mode():
        for batch in batches:
            expected = simulation(batch)
            _Forced(module, simulation, by_layer, force=True).run(batch)
            found = _Forced(module, simulation, end_to_end, force=False).run(batch)
            classes += int((found.argmax(1) != expected.argmax(1)).sum())
    return by_layer, end_to_end, classes


def test_lenet_is_quantized_after_the_layers_that_feed_int8_layers():
    placement = place(make_plan(make_network("lenet")))
    assert set(placement.scales) == {"data", "conv1", "pool1", "conv2", "pool2", "flatten", "relu1"}
    assert placement.scales["pool1"] == placement.scales["conv1"]
    assert not placement.partial


@pytest.mark.parametrize(
    ("planned", "placed", "points"),
    [
        ({}, {}, {"data", "conv1", "conv2", "relu1"}),
        ({}, {"before_relu": True}, {"data", "conv1", "conv2", "ip1"}),
        ({"quantize_output": True}, {}, {"data", "conv1", "conv2", "relu1", "ip2", "prob"}),
        ({"keep_fp": ("conv2", "ip1")}, {}, {"data", "relu1"}),
    ],
)
def test_where_lenet_is_quantized_as_asked(planned, placed, points):
    placement = place(make_plan(make_network("lenet"), **planned), **placed)
    assert set(placement.points) == points
    assert placement.scales.get("ip1", placement.scales["relu1"]) == placement.scales["relu1"]


def test_relu6_lets_no_quantization_through():
    plan = make_plan(make_network("mobile"), keep_fp=("squeeze.0",))
    assert "depthwise_0" not in place(plan, before_relu=True).scales


def test_only_the_int8_reader_of_a_value_gets_it_quantized():
    network = make_network("mixed")
    plan = make_plan(network)
    assert "stem" not in place(plan).scales  # tanh reads it in float
    assert "max_pool2d" in place(plan).points
    mobile = make_plan(make_network("mobile"))
    (scale, readers) = place(mobile).partial["depthwise_1"]  # the product reads it in float
    assert readers == {"squeeze_0"}
    assert scale == mobile.scales["depthwise_1"]


def test_what_a_concatenation_alone_reads_is_quantized_with_its_scale():
    placement = place(make_plan(make_network("branches")), before_relu=True)
    assert placement.scales["left"] == placement.scales["right"] == placement.scales["cat"]
    assert {"left", "right"} <= placement.points.keys()
    assert "cat" not in placement.points
    assert not placement.requantized


class Requantizing(nn.Module):
    """What a layer and a concatenation read, and halves of which one goes to each."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = torch.cat([x, 3 * self.left(x)], 1)
        first, second = x.chunk(2, 1)
        x = torch.cat([first, 5 * self.right(second)], 1)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def test_a_value_that_a_layer_and_a_concatenation_read_is_quantized_twice():
    torch.manual_seed(0)
    network = trace(Requantizing(), input_shape=(3, 8, 8))
    images = torch.randn(16, 3, 8, 8)
    table = calibrate(network, [images])
    plan = plan_int8(network, table)
    placement = place(plan)
    assert placement.scales["relu"] == placement.requantized["relu"] == plan.own_scales["relu"]
    assert placement.points["cat"] == table.scales["cat"] != table.scales["relu"]
    expected = IntegerNetwork(plan)(images)
    assert float((fake_quantize(plan)(images) - expected).abs().max()) < 1e-6
    once = IntegerNetwork(plan)
    once._requantized = {}
    assert float((once(images) - expected).abs().max()) > 1e-4
    for_tensorrt_alone = IntegerNetwork(for_tensorrt(plan))(images)
    assert float((torch.from_numpy(run_onnx(int8_model(plan), images)) - for_tensorrt_alone).abs().max()) < 1e-6
    # The biases in int32 move a product that is multiplied in float, and with it a code that is nearly a tie.
    for_cpu = (torch.from_numpy(run_onnx(int8_model(plan, for_cpu=True), images)) - expected).abs().amax(1)
    assert float(for_cpu.median()) < 5e-5


values = arrays.arrays("float32", 64, elements=st.floats(-1e4, 1e4, width=32))


@given(values, st.floats(2.0**-10, 2.0**10, width=32))
def test_quantization_commutes_with_relu_and_max_pooling(array, scale):
    x = torch.from_numpy(array)
    assert torch.equal(quantize(x.relu(), scale), quantize(x, scale).relu())
    pooled = F.max_pool1d(x[None], 2)
    assert torch.equal(quantize(pooled, scale), F.max_pool1d(quantize(x, scale)[None], 2))


OPTIONS = {"default": {}, "output": {"quantize_output": True}, "kept": {"keep": 1}}


@pytest.fixture(scope="module", params=[(name, option) for name in NETWORKS for option in OPTIONS], ids="-".join)
def plan(request) -> Int8Plan:
    name, option = request.param
    network = make_network(name)
    arguments = dict(OPTIONS[option])
    if arguments.pop("keep", None):
        arguments["keep_fp"] = (network.layers[1].name,)
    return make_plan(network, **arguments)


def test_codes_differ_from_the_simulation_at_ties_alone(plan):
    by_layer, _, _ = compare(plan, [images(plan.network.name, 16, seed=3)])
    assert by_layer.keys() == {*place(plan).points, *place(plan).partial}
    for name, difference in by_layer.items():
        assert difference.steps <= 1, name
        assert difference.off_tie == 0, name
        assert difference.differ <= 1 + 1e-4 * difference.codes, name


def test_probabilities_agree_with_the_simulation(plan):
    batch = images(plan.network.name, 16, seed=4)
    with torch.inference_mode():
        difference = (fake_quantize(plan)(batch) - IntegerNetwork(plan)(batch)).abs().max()
    assert difference < 0.02


def test_it_scripts_and_traces(plan):
    module, batch = fake_quantize(plan), images(plan.network.name, 4, seed=5)
    with torch.inference_mode():
        expected = module(batch)
        assert torch.equal(torch.jit.script(module)(batch), expected)
        assert torch.equal(torch.jit.trace(module, batch[:2])(batch), expected)


def test_weights_have_the_codes_of_the_simulation(plan):
    module = fake_quantize(plan)
    calls = [node for node in module.graph.nodes if node.target is torch.fake_quantize_per_channel_affine]
    assert len(calls) == len(plan.weighted)
    for layer, node in zip(plan.weighted, calls, strict=True):
        weight, scale, zero_point = (_attribute(module, argument.target) for argument in node.args[:3])
        assert node.args[3:] == (0, -127, 127)
        assert not zero_point.any()
        quantized = torch.fake_quantize_per_channel_affine(weight, scale, zero_point, 0, -127, 127)
        codes, scales = quantize_weight(plan.network.module.get_submodule(layer.target).weight)
        assert torch.equal(scale, scales)
        shaped = scale.reshape(-1, *([1] * (weight.dim() - 1)))
        assert torch.equal((quantized / shaped).round(), codes)
        assert torch.equal((weight / shaped).round(), codes)


def _attribute(module: nn.Module, target: str) -> Tensor:
    for name in target.split("."):
        module = getattr(module, name)
    return module


def test_the_network_itself_is_left_as_it_is():
    network = make_network("residual")
    batch = images("residual", 4)
    before = network.module(batch)
    fake_quantize(make_plan(network))
    assert torch.equal(network.module(batch), before)


class NamedAsASecondCall(nn.Module):
    """A layer that is called twice, and later another one with the name that its second call would get."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.conv_1 = nn.Conv2d(3, 3, 1)
        self.fc = nn.Linear(432, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv_1(self.conv(self.conv(x))).flatten(1))


def test_a_second_call_takes_no_other_layers_name():
    network = trace(NamedAsASecondCall(), "mixed", (3, 12, 12))
    plan, batch = make_plan(network), images("mixed", 4)
    torch.testing.assert_close(fake_quantize(plan)(batch), IntegerNetwork(plan)(batch), atol=1e-3, rtol=0)


def test_a_channel_of_zeros_stays_zero():
    model = LeNet().eval()
    with torch.no_grad():
        model.conv1.weight[3] = 0
    network = trace(model, "lenet")
    module = fake_quantize(make_plan(network))
    batch = images("lenet", 2)
    assert module(batch).isfinite().all()


@pytest.mark.slow
def test_mnist_test_images(mnist_dir):
    """Codes differ by one step and at ties alone; 1,000 images get the same classes."""
    test = mnist(mnist_dir).test
    by_layer, end_to_end, classes = compare(mnist_plan(mnist_dir), list(test.images(slice(0, 1000)).split(500)))
    for name, difference in by_layer.items():
        assert difference.steps <= 1, name
        assert difference.off_tie == 0, name
    for name, difference in end_to_end.items():
        assert difference.differ <= 1e-4 * difference.codes, name
    assert classes == 0
