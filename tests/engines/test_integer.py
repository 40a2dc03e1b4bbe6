"""The integer simulation is exact: compared with int64 arithmetic on the codes."""

import numpy as np
import pytest
import torch
from torch import nn

from calib.calibrator import calibrate
from calib.int8 import quantize, quantize_weight
from calib.plan import plan_int8
from calib.table import CalibrationTable
from calib.tracing import trace
from engines.integer import IntegerNetwork, _WeightedLayer
from engines.onnx.int8 import int8_model
from engines.onnxruntime.engine import open_session
from engines.onnxruntime.form import for_onnxruntime
from models import LeNet
from tests.networks import images, make_network, make_plan

# The most that a sum can reach: every product at its extreme. 1032 terms are the last that float32 holds.
TERMS = [1, 25, 500, 1032, 1033, 5000]


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("extreme", [False, True])
def test_matrix_products_are_exact(terms: int, extreme: bool) -> None:
    generator = torch.Generator().manual_seed(terms)
    layer = nn.Linear(terms, 7, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-127, 128, (7, terms), generator=generator))
        layer.weight[:, 0] = 127  # so that the scale is 1 and the codes are the weights
        if extreme:
            layer.weight.fill_(127)
    codes = torch.randint(-128, 128, (3, terms), generator=generator).float()
    if extreme:
        codes.fill_(-128)
        codes[:, -1] = -127  # an odd sum, which float32 cannot hold beyond 2**24
    weighted = _WeightedLayer(trace(nn.Sequential(nn.Flatten(), layer), "L").layers[0], layer, 1.0)
    expected = codes.long() @ layer.weight.long().T
    assert torch.equal(weighted.accumulate(codes).long(), expected)


def test_float32_serves_up_to_the_last_sum_that_it_holds() -> None:
    def dtype(terms: int) -> torch.dtype:
        layer = nn.Linear(terms, 1, bias=False)
        nn.init.constant_(layer.weight, 1.0)
        return _WeightedLayer(trace(nn.Sequential(nn.Flatten(), layer), "L").layers[0], layer, 1.0).dtype

    assert 128 * 127 * 1032 <= 2**24 < 128 * 127 * 1033
    assert dtype(1032) == torch.float32
    assert dtype(1033) == torch.float64


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolutions_are_exact(groups: int) -> None:
    generator = torch.Generator().manual_seed(groups)
    layer = nn.Conv2d(4, 8, 3, stride=2, padding=1, dilation=2, groups=groups)
    codes = torch.randint(-128, 128, (2, 4, 11, 11), generator=generator).float()
    weighted = _WeightedLayer(trace(nn.Sequential(layer), "C").layers[0], layer, 1.0)
    weight = quantize_weight(layer.weight)[0].long()
    windows = nn.functional.unfold(codes.double(), 3, dilation=2, padding=1, stride=2).long()
    windows = windows.reshape(2, groups, -1, windows.shape[-1])
    expected = torch.einsum("bgkl,gok->bgol", windows, weight.reshape(groups, 8 // groups, -1))
    assert torch.equal(weighted.accumulate(codes).long().reshape(expected.shape), expected)


def test_lenet_is_the_arithmetic_of_the_definition() -> None:
    torch.manual_seed(3)
    model = LeNet().eval()
    images = torch.rand(5, 1, 28, 28)
    table = calibrate(model, [images])
    seen: dict[str, torch.Tensor] = {}
    network = trace(model)
    result = IntegerNetwork(plan_int8(network, table), lambda name, value: seen.update({name: value.clone()}))(images)

    scales = table.scales

    def dense(codes: torch.Tensor, layer: nn.Linear | nn.Conv2d, scale: float) -> torch.Tensor:
        """int64 sums by NumPy's integer arithmetic, scaled and biased in float32."""
        weight, weight_scale = quantize_weight(layer.weight)
        if isinstance(layer, nn.Conv2d):
            windows = nn.functional.unfold(codes.double(), 5).long().numpy()
            total = np.einsum("bkl,ok->bol", windows, weight.flatten(1).long().numpy())
            side = int(total.shape[-1] ** 0.5)
            sums = torch.from_numpy(total.reshape(*total.shape[:2], side, side))
            shape = (1, -1, 1, 1)
        else:
            sums, shape = codes.long() @ weight.long().T, (1, -1)
        assert int(sums.abs().max()) < 2**31
        return sums.float() * (weight_scale * scale).reshape(shape) + layer.bias.detach().reshape(shape)

    conv1 = dense(quantize(images, scales["data"]), model.conv1, scales["data"])
    # Requantizing before pooling, as TensorRT does, or after it is the same: rounding is monotonic.
    pool1 = model.pool1(quantize(conv1, scales["conv1"]))
    conv2 = dense(pool1, model.conv2, scales["pool1"])
    pool2 = model.pool2(quantize(conv2, scales["conv2"]))
    ip1 = torch.relu(dense(pool2.flatten(1), model.ip1, scales["pool2"]))
    ip2 = dense(quantize(ip1, scales["ip1"]), model.ip2, scales["ip1"])
    for name, expected in {"conv1": conv1, "conv2": conv2, "ip1": ip1, "ip2": ip2}.items():
        assert torch.equal(seen[name], expected), name
    assert torch.equal(result, torch.softmax(ip2, 1))


def test_layers_kept_in_float_are_untouched() -> None:
    plan, batch = make_plan(make_network("lenet"), ("conv1", "conv2", "ip1", "ip2")), images("lenet", 4)
    with torch.no_grad():
        assert torch.equal(IntegerNetwork(plan)(batch), plan.network.module(batch))


def test_the_output_is_quantized_only_when_asked() -> None:
    plan = make_plan(make_network("lenet"), quantize_output=True)
    codes = IntegerNetwork(plan)(images("lenet", 4)) / plan.output_scale
    torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)


def test_one_value_read_by_two_layers_is_quantized_once_and_stays_float_for_others() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 1)
            self.left = nn.Conv2d(2, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = self.conv(x)
            return (self.left(first) + first).flatten(1)

    torch.manual_seed(0)
    network = trace(Branch())
    table = CalibrationTable(dict.fromkeys(network.tensors, 0.05))
    images = torch.rand(2, 1, 3, 3)
    seen: dict[str, torch.Tensor] = {}
    IntegerNetwork(plan_int8(network, table), lambda name, value: seen.update({name: value.clone()}))(images)
    expected = (quantize(seen["left"], 0.05) + quantize(seen["conv"], 0.05)) * 0.05
    torch.testing.assert_close(seen["add"], expected)


class Pooled(nn.Module):
    """Average pooling between two convolutions, of which the second gives the codes that it reads."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.pool = pool
        self.last = nn.Conv2d(4, 4, 1, bias=False)
        nn.init.dirac_(self.last.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.pool(torch.relu(self.first(x)))).flatten(1)


@pytest.mark.parametrize(
    ("pool", "averages"),
    [
        (nn.AvgPool2d(2), True),
        (nn.AvgPool2d(2, 2, 1), True),
        (nn.AvgPool2d(3, 2, 1, ceil_mode=True), True),
        (nn.Sequential(nn.AvgPool2d(2), nn.MaxPool2d(2)), True),
        (nn.Sequential(nn.AvgPool2d(2), nn.ReLU()), False),  # is quantized with the scale of what the ReLU gives
        (nn.AdaptiveAvgPool2d(6), True),
        (nn.AdaptiveAvgPool2d(5), False),  # of windows of 3 and of 4
        (nn.AdaptiveAvgPool2d(1), False),  # has a scale of its own
    ],
)
def test_average_pooling_averages_codes(pool: nn.Module, averages: bool) -> None:
    """The middle between two codes is rounded to even, in the simulation and in a file of its form."""
    torch.manual_seed(0)
    images = torch.randn(8, 3, 12, 12)
    network = trace(Pooled(pool).eval(), "pooled", (3, 12, 12))
    table = calibrate(network, [images])
    plan = for_onnxruntime(plan_int8(network, table))
    scale = plan.scales[plan.network.layers[-1].inputs[0]]
    seen: dict[str, torch.Tensor] = {}
    found = IntegerNetwork(plan, lambda name, value: seen.update({name: value.clone()}))(images) / scale
    first = quantize(seen["relu"], plan.scales["relu"])
    if averages:
        assert torch.equal(found.round(), pool(first.double()).round().flatten(1).float())
    session, _ = open_session(int8_model(plan_int8(network, table), for_cpu=True), 1)
    (written,) = session.run(None, {"data": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(written) / scale, found, atol=1e-3, rtol=0)
