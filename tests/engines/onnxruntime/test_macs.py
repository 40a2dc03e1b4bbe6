"""What ONNX Runtime's kernels multiply in INT8, on networks whose answer is known."""

import torch
from torch import Tensor, nn

from calib.calibrator import calibrate
from calib.plan import plan_int8
from calib.tracing import trace
from common.config import EngineConfig, QuantizationConfig
from common.macs import MacCount
from engines.onnx.macs import exported_macs
from engines.onnxruntime.engine import OnnxRuntimeEngine


class Scaled(nn.Module):
    """The result of the second convolution, which cuts its image into patches, is read in float alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 2, stride=2)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.second(torch.relu(self.first(x)))).mean((2, 3)))


def counts(model: nn.Module, keep: tuple[str, ...] = ()) -> tuple[MacCount, MacCount]:
    """As exported, and as executed."""
    generator = torch.Generator().manual_seed(0)
    network = trace(model, "net", (3, 16, 16))
    table = calibrate(network, [torch.randn(8, 3, 16, 16, generator=generator)])
    engine = OnnxRuntimeEngine(EngineConfig(threads=1), QuantizationConfig(keep_fp=list(keep)))
    executed = engine.compile(network, "int8", table).macs
    assert executed is not None
    return exported_macs(plan_int8(network, table, keep)), executed


def test_a_layer_for_which_there_is_no_integer_kernel_is_in_float() -> None:
    torch.manual_seed(0)
    exported, executed = counts(Scaled())
    found = {layer.layer: (layer.macs, layer.int8) for layer in executed.layers}

    # The first convolution computes several columns at once, and counts for what it is.
    assert found == {
        "first": (8 * 256 * 27, True),
        "second": (8 * 64 * 32, False),
        "fc": (80, True),
    }
    assert exported.share == 100
    assert exported.total == executed.total
    assert executed.share is not None
    assert executed.share < 100


def test_a_layer_kept_in_float_says_so() -> None:
    torch.manual_seed(0)
    exported, executed = counts(Scaled(), ("fc",))

    assert {layer.layer: layer.reason for layer in exported.in_float} == {"fc": "kept in float as asked"}
    assert {layer.layer for layer in executed.in_float} == {"second", "fc"}
