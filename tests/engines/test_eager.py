"""Eager PyTorch, and the choice of an engine."""

import sys
from pathlib import Path

import pytest
import torch

from calib.calibrator import calibrate
from calib.network import Network
from calib.table import CalibrationTable
from calib.tracing import trace
from common.config import EngineConfig, PrecisionName, QuantizationConfig
from common.errors import InputError
from engines.base import EngineError
from engines.eager import TorchEngine
from engines.select import select_engine
from models import LeNet


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    return trace(LeNet(), input_shape=(1, 28, 28))


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(6, 1, 28, 28, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def table(network: Network, images: torch.Tensor) -> CalibrationTable:
    return calibrate(network, [images])


@pytest.mark.parametrize(
    ("precision", "size", "note"),
    [
        ("fp32", 4 * 431080, None),
        ("fp16", 2 * 431080, "not representative"),
        # int8 weights, float32 biases, one float32 scale per output channel
        ("int8", 430500 + 4 * 580 + 4 * 580, "simulated"),
    ],
)
def test_every_precision_gives_probabilities_and_says_what_it_is(
    network: Network,
    table: CalibrationTable,
    images: torch.Tensor,
    precision: PrecisionName,
    size: int,
    note: str | None,
) -> None:
    compiled = TorchEngine(EngineConfig(), QuantizationConfig()).compile(network, precision, table)
    result = compiled(images)
    assert result.dtype == torch.float32
    assert result.shape == (6, 10)
    torch.testing.assert_close(result.sum(1), torch.ones(6), atol=2e-3, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(result, network.module(images), atol=0.02, rtol=0)
    assert (compiled.engine, compiled.precision) == ("torch", precision)
    assert compiled.size_bytes == size
    assert compiled.latency_note is None if note is None else note in str(compiled.latency_note)


def test_int8_needs_a_table(network: Network) -> None:
    with pytest.raises(EngineError, match=r"run quantize\.py"):
        TorchEngine(EngineConfig(), QuantizationConfig()).compile(network, "int8", None)


def test_the_float_network_is_not_touched_by_half_precision(network: Network, table: CalibrationTable) -> None:
    TorchEngine(EngineConfig(), QuantizationConfig()).compile(network, "fp16", table)
    assert all(parameter.dtype == torch.float32 for parameter in network.module.parameters())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_auto_takes_the_first_that_can_run_and_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where there is a GPU: tests/engines/tensorrt/test_quantize.py."""
    selection = select_engine(EngineConfig(), QuantizationConfig(), tmp_path)
    assert selection.engine.name == "onnxruntime"
    assert "not torch-tensorrt: " in selection.reason
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # an import of it fails
    selection = select_engine(EngineConfig(), QuantizationConfig(), tmp_path)
    assert selection.engine.name == "torch"
    assert "not onnxruntime: " in selection.reason
    with pytest.raises(InputError, match="engine torch-tensorrt cannot be used here: "):
        select_engine(EngineConfig(name="torch-tensorrt"), QuantizationConfig(), tmp_path)
