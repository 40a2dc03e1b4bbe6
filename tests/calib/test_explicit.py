"""Explicit quantization agrees with the integer simulation, code by code."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor, nn
from torch.nn import functional as F

from calib.calibrator import calibrate
from calib.explicit import fake_quantize, place
from calib.int8 import quantize
from calib.plan import plan_int8
from calib.tracing import trace
from engines.integer import IntegerNetwork
from engines.onnx.int8 import int8_model
from engines.tensorrt.form import for_tensorrt
from models import LeNet
from tests.general.zoo import exact_plan
from tests.networks import NETWORKS, images, make_network, make_plan, run_onnx


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


OPTIONS = ("default", "output", "kept")


def options(network, option):
    kept = (network.layers[1].name,) if option == "kept" else ()
    return {"keep_fp": kept, "quantize_output": option == "output"}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", NETWORKS)
def test_codes_are_those_of_the_simulation(name, option):
    """In numbers that float32 computes with exactly; in others a code can differ at a tie."""
    network = make_network(name)
    plan = exact_plan(network, images(name, 16, seed=1), **options(network, option))
    batch = images(name, 16, seed=3)
    with torch.inference_mode():
        assert torch.equal(fake_quantize(plan)(batch), IntegerNetwork(plan)(batch))


@pytest.mark.parametrize("name", NETWORKS)
def test_it_scripts_and_traces(name):
    module, batch = fake_quantize(make_plan(make_network(name))), images(name, 4, seed=5)
    with torch.inference_mode():
        expected = module(batch)
        assert torch.equal(torch.jit.script(module)(batch), expected)
        assert torch.equal(torch.jit.trace(module, batch[:2])(batch), expected)


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
