"""Convolutions that compute several columns of their output at once."""

from collections import Counter

import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper
from torch import nn

from calib.int8 import quantize_weight
from calib.tracing import trace
from engines.onnx.float import float_model
from engines.onnx.int8 import int8_model
from engines.onnxruntime.columns import columns_at_once, spread, widened
from engines.onnxruntime.engine import integer_operators, open_session
from models import LeNet
from tests.networks import make_network, make_plan


@pytest.mark.parametrize(
    ("conv", "width", "columns"),
    [
        pytest.param(nn.Conv2d(1, 20, 5), 24, 8, id="LeNet: 9 columns would be 180 channels, but do not divide 24"),
        pytest.param(nn.Conv2d(1, 6, 5, padding=2), 28, 28, id="LeNet-5: the whole row"),
        pytest.param(nn.Conv2d(3, 64, 7, stride=2, padding=3), 112, 2, id="ResNet: 3 * 7 * (7 + 2) = 189 terms"),
        pytest.param(nn.Conv2d(3, 96, 3), 30, 2, id="2 * 96 = 192 channels"),
        pytest.param(nn.Conv2d(3, 97, 3), 30, 1, id="2 * 97 = 194 channels"),
        pytest.param(nn.Conv2d(3, 200, 3), 30, 1, id="more channels than that already"),
        pytest.param(nn.Conv2d(3, 64, 11, stride=4), 54, 1, id="AlexNet: 363 terms already"),
        pytest.param(nn.Conv2d(1, 20, 5), 23, 1, id="a prime number of columns"),
        pytest.param(nn.Conv2d(4, 8, 3), 24, 1, id="four channels"),
        pytest.param(nn.Conv2d(3, 8, 1), 24, 1, id="a pointwise convolution"),
        pytest.param(nn.Conv2d(6, 6, 3, groups=2), 24, 1, id="groups"),
        pytest.param(nn.Conv2d(1, 8, 3, dilation=2), 24, 1, id="dilation"),
        pytest.param(nn.Conv2d(1, 8, 3, padding="same"), 28, 14, id="padding by name"),
        pytest.param(nn.Conv2d(1, 8, 3, padding="valid"), 26, 13, id="no padding by name"),
        pytest.param(nn.Conv2d(1, 8, 4, padding="same"), 28, 1, id="more padding on one side"),
        pytest.param(nn.ConvTranspose2d(1, 8, 3), 28, 1, id="another layer"),
    ],
)
def test_how_many_columns(conv, width, columns):
    assert columns_at_once(conv, width) == columns


@given(st.data())
def test_the_values_are_those_of_the_convolution(data):
    draw = data.draw
    channels, out = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 5)))
    stride = draw(st.tuples(st.integers(1, 3), st.integers(1, 4)))
    named = draw(st.sampled_from([None, "valid", "same"]))
    if named == "same":
        kernel, stride = (kernel[0] | 1, kernel[1] | 1), (1, 1)
    padding = named or draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=draw(st.booleans()))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    for parameter in conv.parameters():
        # Sums of integers are exact in float32, whatever the order.
        parameter.data = torch.randint(-127, 128, parameter.shape, generator=generator).float()
    size = draw(st.tuples(st.integers(5, 12), st.integers(5, 20)))
    images = torch.randint(-128, 128, (2, channels, *size), generator=generator).float()
    with torch.no_grad():
        expected = conv(images)
        height, width = expected.shape[-2:]
        columns = draw(st.sampled_from([count for count in range(1, width + 1) if width % count == 0]))
        wide = widened(conv, columns)(images)
    assert wide.shape == (2, columns * out, height, width // columns)
    assert torch.equal(spread(wide, out, height, width), expected)


def test_the_file_for_a_cpu_has_the_same_codes_in_a_wider_kernel():
    plan = make_plan(make_network("lenet"))
    conv = plan.network.module.get_submodule("conv1")
    codes, _ = quantize_weight(conv.weight)
    (wide,) = (weight for weight in weights(int8_model(plan, for_cpu=True)) if weight.shape[1:2] == (1,))
    assert wide.shape == (8 * 20, 1, 5, 5 + 7)
    for column, part in enumerate(torch.from_numpy(wide.copy()).view(8, 20, 1, 5, 12)):
        part = part.float()
        assert torch.equal(part[..., column : column + 5], codes)
        assert part.count_nonzero() == codes.count_nonzero()
    assert any(weight.shape == (20, 1, 5, 5) for weight in weights(int8_model(plan)))


def test_no_column_has_to_be_moved():
    """What takes the channels apart cancels with ONNX Runtime's own change of layout."""
    plan = make_plan(make_network("lenet"))
    graphs = [open_session(int8_model(plan, for_cpu), threads=1)[1] for for_cpu in (False, True)]
    portable, cpu = (Counter(node.op_type for node in graph.graph.node) for graph in graphs)
    assert cpu["Transpose"] == portable["Transpose"]
    assert cpu["Reshape"] == portable["Reshape"] + 1
    assert integer_operators(graphs[1])["QLinearConv"] == integer_operators(graphs[0])["QLinearConv"] == 2


@pytest.mark.parametrize("kept", ["conv1", "conv2"])
def test_a_convolution_that_runs_in_float_stays_as_it_is(kept):
    """It does so if its own result or what it reads is float: ONNX Runtime's float kernels need no larger patches."""
    plan = make_plan(make_network("lenet"), keep_fp=(kept,))
    assert {weight.shape for weight in weights(int8_model(plan, for_cpu=True)) if weight.ndim == 4} == {
        *((20, 1, 5, 5), (50, 20, 5, 5))
    }


def test_the_float_file_stays_as_it_is():
    network = trace(LeNet().eval(), input_shape=(1, 28, 28))
    shapes = {value.name: tuple(value.dims) for value in float_model(network).graph.initializer}
    assert (20, 1, 5, 5) in shapes.values()


def test_exporting_draws_no_random_numbers():
    plan = make_plan(make_network("lenet"))
    before = torch.get_rng_state()
    int8_model(plan, for_cpu=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_network_that_already_has_a_module_of_that_name():
    class Taken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.conv_columns = nn.Conv2d(4, 4, 3)
            self.fc = nn.Linear(4 * 8 * 8, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.conv_columns(self.conv(x)).flatten(1))

    network = trace(Taken().eval(), "taken", (3, 12, 12))
    shapes = {weight.shape for weight in weights(int8_model(make_plan(network), for_cpu=True))}
    assert {(4 * 10, 3, 3, 12), (4, 4, 3, 3)} <= shapes
    assert network.module.get_submodule("conv_columns").weight.shape == (4, 4, 3, 3)


def weights(model: onnx.ModelProto) -> list:
    return [numpy_helper.to_array(value) for value in model.graph.initializer]
