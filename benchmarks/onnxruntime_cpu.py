"""ONNX Runtime on the CPU: FP32, our INT8, and the INT8 that ONNX Runtime's own ``quantize_static`` makes.

``python -m benchmarks.onnxruntime_cpu`` measures the run ``bench`` (trained at first use) and prints JSON.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from benchmarks.timing import in_turns, ratio, spread, timed_often
from calib.graph import INPUT, Int8Plan
from engines.ort import (
    available_cores,
    describe_dot_products,
    dot_products,
    integer_operators,
    open_runner,
    open_session,
)

if TYPE_CHECKING:
    import onnx

FP32 = "FP32"
OURS = "INT8, this project"
PER_TENSOR = "INT8, quantize_static"
PER_CHANNEL = "INT8, quantize_static per channel"
PLAIN = "INT8, quantize_static, plain session"

GOALS: Mapping[int, float] = {1: 1.5, 32: 1.6, 256: 1.9}
"""Batch size -> how many times as fast as FP32 INT8 should at least be, on two cores with VNNI."""


def measure(
    plan: Int8Plan,
    calibration: Sequence[Tensor],
    images: Tensor,
    *,
    batch_sizes: Sequence[int] = tuple(GOALS),
    threads: int | None = None,
    rounds: int = 60,
) -> dict[str, Any]:
    """Time the models in turns, all run in the same way: as the ONNX Runtime engine runs them.

    Args:
        plan: Of the trained network, traced with an ``input_shape``.
        calibration: Batches for ``quantize_static`` (its defaults: the extremes of the values), float32 [N, C, H, W].
        images: To time on, float32 [at least the largest batch size, C, H, W].
        batch_sizes: Images per inference.
        threads: Threads of one inference; all cores if None.
        rounds: Turns that each model has.

    Returns:
        ``threads``, ``cpu`` (its integer dot products), ``operators`` (model -> integer operators that it runs),
        ``bytes`` (model -> size), and ``batches``: batch size -> model -> ``ms`` (median), ``quartiles`` (ms) and how
        many times as fast it is as FP32 (``speedup``); for ours also how many times as fast as the faster of
        ``quantize_static``'s models (``to_quantize_static``), and as that one in a plain session of ONNX Runtime
        (``to_plain_session``). Ratios are medians of the rounds' ratios.
    """
    threads = threads or available_cores()
    models = make_models(plan, calibration)
    opened = {name: open_runner(model, threads) for name, model in models.items()}
    plain, _ = open_session(models[PER_TENSOR], threads)
    result: dict[str, Any] = {
        "threads": threads,
        "cpu": describe_dot_products(dot_products()),
        "operators": {name: integer_operators(optimized) for name, (_, optimized) in opened.items()},
        "bytes": {name: model.ByteSize() for name, model in models.items()},
        "batches": {},
    }
    for size in batch_sizes:
        batch = images[:size].numpy()
        contestants = {name: timed_often(partial(run, batch)) for name, (run, _) in opened.items()}
        contestants[PLAIN] = timed_often(partial(plain.run, None, {INPUT: batch}))
        result["batches"][size] = _compared(in_turns(contestants, rounds))
    return result


def _compared(seconds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, figures in seconds.items():
        one = spread(figures, 1000)
        found[name] = {
            "ms": one.median,
            "quartiles": [one.lower_quartile, one.upper_quartile],
            "speedup": ratio(seconds[FP32], figures),
        }
    others = (seconds[PER_TENSOR], seconds[PER_CHANNEL])
    found[OURS]["to_quantize_static"] = min(ratio(other, seconds[OURS]) for other in others)
    found[OURS]["to_plain_session"] = ratio(seconds[PLAIN], seconds[OURS])
    return found


def make_models(plan: Int8Plan, calibration: Sequence[Tensor]) -> dict[str, onnx.ModelProto]:
    """The four models, by name."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    from engines.onnx_export import float_model, int8_model

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


def main() -> int:
    """Measure the run that the benchmarks train for themselves."""
    from benchmarks.setting import Setting

    logging.basicConfig(level=logging.ERROR, stream=sys.stderr)
    setting = Setting(Path("artifacts"))
    test = setting.data.test
    print(json.dumps(measure(setting.plan, setting.batches, test.images(slice(0, max(GOALS)))), indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
