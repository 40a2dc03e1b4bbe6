"""ONNX Runtime on the CPU: FP32, our INT8, and the INT8 that ONNX Runtime's own ``quantize_static`` makes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from calib.network import INPUT
from calib.plan import Int8Plan

if TYPE_CHECKING:
    import onnx

FP32 = "FP32"
OURS = "INT8, this project"
PER_TENSOR = "INT8, quantize_static"
PER_CHANNEL = "INT8, quantize_static per channel"
PLAIN = "INT8, quantize_static, plain session"

GOALS: Mapping[int, float] = {1: 1.5, 32: 1.6, 256: 1.9}
"""Batch size -> how many times as fast as FP32 INT8 should at least be, on two cores with VNNI."""

GOALS_WITHOUT_DOT_PRODUCTS: Mapping[int, float] = {1: 1.3, 32: 1.5, 256: 1.8}
"""The same on two cores without instructions for int8 dot products, such as those with AVX2 alone."""


def make_models(plan: Int8Plan, calibration: Sequence[Tensor]) -> dict[str, onnx.ModelProto]:
    """The four models, by name."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    from engines.onnx.float import float_model
    from engines.onnx.int8 import int8_model

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches: Iterator[dict[str, Any]] = iter([{INPUT: batch.numpy()} for batch in calibration])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.batches, None)

    models = {FP32: float_model(plan.network), OURS: int8_model(plan, for_cpu=True)}
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
        onnx.save(models[FP32], source)
        for name, per_channel in ((PER_TENSOR, False), (PER_CHANNEL, True)):
            quantize_static(source, target, Reader(), per_channel=per_channel)
            models[name] = onnx.load(target)
    return models
