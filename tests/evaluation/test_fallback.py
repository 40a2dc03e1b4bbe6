"""What runs a precision that the chosen engine cannot."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from calib.tracing import trace
from common.config import EngineConfig, QuantizationConfig
from common.errors import InputError
from engines.base import Compiled, EngineError
from engines.eager import TorchEngine
from engines.select import SelectedEngine
from evaluation.pipeline import compile_precisions
from models import LeNet


class NoHalf:
    """An engine without FP16, or without anything."""

    name = "onnxruntime"

    def __init__(self, able: tuple[str, ...]) -> None:
        self.able = able

    def unavailable(self) -> None:
        return None

    def compile(self, network: Any, precision: Any, table: Any) -> Compiled:
        if precision not in self.able:
            raise EngineError(f"no {precision} kernels")
        return Compiled(self.name, precision, "CPU", network.module, 4)


@pytest.fixture
def subject() -> Any:
    torch.manual_seed(0)
    return SimpleNamespace(network=trace(LeNet()), int8=SimpleNamespace(table=None, problem="not calibrated"))


def fallback() -> TorchEngine:
    return TorchEngine(EngineConfig(), QuantizationConfig())


def test_the_fallback_runs_what_the_engine_cannot_and_says_so(subject: Any) -> None:
    selection = SelectedEngine(NoHalf(("fp32",)), "auto", fallback())
    compiled, skipped, _ = compile_precisions(selection, subject, ["fp32", "fp16", "int8"])
    assert (compiled["fp32"].engine, compiled["fp16"].engine) == ("onnxruntime", "torch")
    assert "run by torch, since no fp16 kernels" in str(compiled["fp16"].latency_note)
    assert compiled["fp16"].details["why not onnxruntime"] == "no fp16 kernels"
    assert skipped == {"int8": "not calibrated"}


def test_an_engine_asked_for_by_name_is_not_replaced(subject: Any) -> None:
    compiled, skipped, _ = compile_precisions(SelectedEngine(NoHalf(("fp32",)), "by name"), subject, ["fp32", "fp16"])
    assert list(compiled) == ["fp32"]
    assert skipped["fp16"] == "no fp16 kernels"
    with pytest.raises(InputError, match="onnxruntime cannot run LeNet in FP32: no fp32 kernels"):
        compile_precisions(SelectedEngine(NoHalf(()), "by name"), subject, ["fp32"])


def test_the_reference_itself_falls_back(subject: Any) -> None:
    compiled, _, _ = compile_precisions(SelectedEngine(NoHalf(()), "auto", fallback()), subject, ["fp32"])
    assert compiled["fp32"].engine == "torch"
    assert compiled["fp32"].latency_note is None
