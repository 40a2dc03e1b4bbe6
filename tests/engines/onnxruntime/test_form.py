"""The form for ONNX Runtime's kernels: no convolution in float, and the numbers of the simulation."""

import dataclasses
from collections.abc import Callable

import onnx
import pytest
import torch
from torch import Tensor, nn

from calib.calibrator import calibrate
from calib.int8 import quantize
from calib.network import Network
from calib.onnx.macs import count_macs
from calib.plan import Int8Plan, plan_int8
from calib.table import CalibrationTable
from calib.tracing import trace
from common.config import EngineConfig, QuantizationConfig
from common.macs import MacCount
from engines.integer import IntegerNetwork
from engines.onnx.int8 import int8_model
from engines.onnx.macs import exported_macs
from engines.onnxruntime.engine import OnnxRuntimeEngine, open_session
from engines.onnxruntime.form import for_onnxruntime
from engines.tensorrt.form import for_tensorrt
from tests.networks import images, make_network, make_plan


class Dense(nn.Module):
    """As in densenet: what is concatenated is normalised before the next convolution, in float."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grow = nn.Conv2d(8, 4, 3, padding=1)
        self.last_norm = nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 10)
        nn.init.uniform_(self.last_norm.running_mean, -0.2, 0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.stem(x))
        x = torch.cat([x, self.grow(torch.relu(self.norm(x)))], 1)
        return self.fc(torch.relu(self.last_norm(x)).mean((2, 3)))


class Capped(nn.Sequential):
    """ReLU6 behind every convolution."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU6(True)),
            *(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU6(True)),
            *(nn.Conv2d(8, 8, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)),
        )
        nn.init.normal_(self[0].weight, std=2.0)  # type: ignore[arg-type]


class Gate(nn.Module):
    """A pointwise convolution whose result is read in float alone, and a last one that nothing in INT8 follows."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.point = nn.Conv2d(8, 6, 1)
        self.last = nn.Conv2d(6, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.last(torch.sigmoid(self.point(torch.relu(self.first(x)))))).flatten(1)


class ChannelsLast(nn.Module):
    """What follows a convolution undoes the transposition that its other form ends with."""

    def __init__(self, point: bool) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 1 if point else 4, 1 if point else 4)
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.patch(x).permute(0, 2, 3, 1)).mean((1, 2)))


class InvertedBottleneck(nn.Module):
    """A block of ConvNeXt, in its two writings: linear layers on the last axis, or pointwise convolutions."""

    def __init__(self, pointwise: bool) -> None:
        super().__init__()
        self.pointwise = pointwise
        self.depthwise = nn.Conv2d(3, 9, 3, padding=1, groups=3)
        self.norm = nn.LayerNorm(9)
        layers = (nn.Conv2d(9, 20, 1), nn.Conv2d(20, 9, 1)) if pointwise else (nn.Linear(9, 20), nn.Linear(20, 9))
        self.expand, self.reduce = layers
        self.fc = nn.Linear(9, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        if self.pointwise:
            x = x.permute(0, 3, 1, 2)
        x = self.reduce(torch.nn.functional.gelu(self.expand(x)))
        if not self.pointwise:
            x = x.permute(0, 3, 1, 2)
        return self.fc(torch.tanh(x).mean((2, 3)))


def quantized(make: Callable[[], nn.Module], keep: tuple[str, ...] = ()) -> tuple[Network, CalibrationTable, Int8Plan]:
    torch.manual_seed(0)
    network = trace(make().eval(), "net", (3, 12, 12))
    table = calibrate(network, [torch.randn(32, 3, 12, 12)])
    return network, table, plan_int8(network, table, keep)


def executed(network: Network, table: CalibrationTable, atol: float) -> MacCount:
    """What the kernels multiply, which give what the simulation does."""
    compiled = OnnxRuntimeEngine(EngineConfig(threads=1), QuantizationConfig()).compile(network, "int8", table)
    batch = torch.randn(32, 3, 12, 12)
    expected = IntegerNetwork(for_onnxruntime(plan_int8(network, table)))(batch)
    torch.testing.assert_close(compiled(batch), expected, atol=atol, rtol=1e-6)
    assert compiled.macs is not None
    return compiled.macs


# Batch normalisation in float rounds otherwise in ONNX Runtime: a code may differ at a tie.
@pytest.mark.parametrize(("kind", "atol"), [(Dense, 0.02), (Capped, 1e-6)])
def test_every_convolution_is_computed_on_integers(kind: type[nn.Module], atol: float) -> None:
    network, table, _ = quantized(kind)
    assert executed(network, table, atol).in_float == []


@pytest.mark.parametrize("name", ["lenet", "residual", "tied", "sequence"])
def test_codes_are_those_of_the_simulation(name: str) -> None:
    """With biases rounded as the kernels take them; a code at a tie can still differ, where products round."""
    plan = make_plan(make_network(name))
    form = for_onnxruntime(plan)
    session, _ = open_session(int8_model(plan, for_cpu=True), 1)
    batch = images(name, 64, seed=5)
    (found,) = session.run(None, {"data": batch.numpy()})
    expected = IntegerNetwork(form)(batch)
    different = (torch.from_numpy(found) - expected).abs().amax(1) > 1e-6
    assert different.sum() <= 3
    assert not torch.equal(IntegerNetwork(dataclasses.replace(form, integer_biases=frozenset()))(batch), expected)


def test_results_that_are_read_in_float_are_rounded_to_their_own_scale() -> None:
    _, _, plan = quantized(Dense)
    form = for_onnxruntime(plan)
    values: dict[str, Tensor] = {}
    IntegerNetwork(form, lambda name, value: values.__setitem__(name, value.clone()))(torch.randn(4, 3, 12, 12))

    assert {plan.network.tensor_of[node] for node in form.rounded} == {"stem", "grow"}
    for node in form.rounded:
        codes = values[plan.network.tensor_of[node]] / plan.own_scales[node]
        torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)
        assert codes.unique().numel() > 10
    assert for_onnxruntime(form) == form


def test_relu6_is_no_limit_where_6_has_the_largest_code() -> None:
    """A wider scale, such as that of a sum, has codes beyond 6: there it is computed in float."""
    network, table, _ = quantized(Capped)
    assert max(table.scales[name] for name in ("0", "2", "4")) <= 6.01 / 127
    wide = CalibrationTable({**table.scales, "0": 0.1})
    assert [layer.operator for layer in executed(network, wide, 0.05).in_float] == ["Conv"]


def test_a_pointwise_convolution_gives_float_and_the_last_one_stays() -> None:
    network, table, plan = quantized(Gate)
    assert not for_onnxruntime(plan).rounded
    count, exported = executed(network, table, 0.01), exported_macs(plan)
    # The first convolution computes several columns at once, and counts for what it is.
    assert {layer.layer: (layer.operator, layer.macs, layer.int8) for layer in count.layers} == {
        "first": ("Conv", 8 * 100 * 27, True),
        "point": ("MatMul", 6 * 100 * 8, True),
        "last": ("Conv", 4 * 64 * 54, False),
    }
    assert (exported.share, exported.total) == (100, count.total)
    kept = exported_macs(plan_int8(network, table, ("last",))).in_float
    assert {layer.layer: layer.reason for layer in kept} == {"last": "kept in float as asked"}


@pytest.mark.parametrize(("point", "in_float"), [(False, ["patch"]), (True, [])])
def test_a_transposition_that_another_undoes(point: bool, in_float: list[str]) -> None:
    network, table, _ = quantized(lambda: ChannelsLast(point))
    assert [layer.layer for layer in executed(network, table, 0.02).in_float] == in_float


@pytest.mark.parametrize("pointwise", [False, True])
def test_layers_behind_a_normalised_and_transposed_value_are_in_int8(pointwise: bool) -> None:
    """Of a pointwise convolution's two transpositions the exporter leaves none: the product reads the norm."""
    network, table, plan = quantized(lambda: InvertedBottleneck(pointwise))
    assert [layer.layer for layer in executed(network, table, 0.01).in_float] == []

    portable = int8_model(plan)
    assert count_macs(portable, "").in_float == []
    batch = torch.randn(16, 3, 12, 12)
    session, _ = open_session(portable, 1, optimize=False)
    (found,) = session.run(None, {"data": batch.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), IntegerNetwork(for_tensorrt(plan))(batch), atol=0.01, rtol=0)


def test_transposed_convolutions_are_in_int8_in_the_file_and_in_float_in_onnx_runtime() -> None:
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, 2), nn.Conv2d(4, 2, 1))
    network, table, plan = quantized(lambda: nn.Sequential(*layers))
    portable = exported_macs(plan)
    assert {layer.layer: layer.macs for layer in portable.layers}["2"] == 8 * 144 * 4 * 4
    assert portable.in_float == []
    in_float = executed(network, table, 0.01).in_float
    assert {layer.layer: layer.reason for layer in in_float} == {"2": "ONNX Runtime has no integer kernel for it"}


def test_what_a_layer_kept_in_float_reads_is_not_rounded() -> None:
    layers = (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    _, _, plan = quantized(lambda: nn.Sequential(*layers), ("2",))
    assert not for_onnxruntime(plan).rounded


class Block(nn.Module):
    """A residual block between a convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.conv1 = nn.Conv2d(16, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16 * 16 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.fc(torch.relu(x + self.conv2(torch.relu(self.conv1(x)))).flatten(1))


def test_sums_become_codes_as_in_the_kernels() -> None:
    # Of millions of values, some would get another code if they were scaled first and divided then.
    torch.manual_seed(0)
    network = trace(Block(), input_shape=(3, 16, 16))
    batch = torch.randn(384, 3, 16, 16)
    table = calibrate(network, [batch])
    plan = plan_int8(network, table)
    model = int8_model(plan, for_cpu=True)
    zero_points = {"relu": 0, "relu_1": 0, "conv2": 128, "relu_2": 0}
    for name in zero_points:
        output = f"{name}_QuantizeLinear_Output"
        model.graph.output.append(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.UINT8, None))
    session, _ = open_session(model, 1)
    found = dict(zip(zero_points, session.run(None, {"data": batch.numpy()})[1:], strict=True))
    seen: dict[str, Tensor] = {}
    IntegerNetwork(for_onnxruntime(plan), lambda name, value: seen.update({name: value.clone()}))(batch)

    different = {
        name: int((quantize(seen[name], table.scales[name]) + zero != torch.from_numpy(found[name])).sum())
        for name, zero in zero_points.items()
    }
    # A CPU without fused multiply-adds rounds the sum of two values once more.
    assert different.pop("relu_2") < 100
    assert set(different.values()) == {0}
