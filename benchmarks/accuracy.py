"""Evaluation: the accuracy of every precision over the whole test set."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.results import Entry, Findings, Table, Target
from benchmarks.setting import Setting
from benchmarks.timing import in_turns, ratio, spread, timed
from common.config import PrecisionName
from data.base import ImageSet
from engines.base import Compiled, EngineError
from engines.select import make_engine, select_engine
from evaluation.accuracy import Classes
from evaluation.running import run_shared

METHOD = (
    "What evaluate.py does to find the accuracies: batches are preprocessed, every precision runs over them, and "
    "predictions and signal-to-noise ratios are gathered. Compilation is not included."
)
TITLES = {"fp32": "FP32", "fp16": "FP16", "int8": "INT8"}


def run(setting: Setting) -> Findings:
    """See the module."""
    config, test = setting.config, setting.data.test
    classes, batch = len(setting.data.info.classes), config.evaluation.batch_size
    compiled: dict[str, Compiled] = {}
    skipped: dict[str, str] = {}
    precisions: tuple[PrecisionName, ...] = ("fp32", "fp16", "int8")
    for name in ("torch", "onnxruntime"):
        engine = make_engine(name, config.engine, config.quantization, setting.run.folder)
        for precision in precisions:
            title = f"{TITLES[precision]}, {name}"
            try:
                compiled[title] = engine.compile(setting.network, precision, setting.table)
            except (EngineError, ImportError) as error:
                skipped[title] = str(error)
    selection = select_engine(config.engine, config.quantization, setting.run.folder)
    chosen = [selection.compile(setting.network, precision, setting.table) for precision in precisions]
    together = f"FP32, FP16 and INT8 as evaluate.py runs them ({selection.engine.name})"
    calls = {title: _evaluation([one], test, classes, batch) for title, one in compiled.items()}
    calls[together] = _evaluation(chosen, test, classes, batch)
    seconds = in_turns({title: timed(call) for title, call in calls.items()}, setting.rounds(7))
    reference = "FP32, torch"
    table = Table(
        f"accuracy over {len(test):,} images, batches of {batch}",
        "s",
        [
            Entry(title, spread(figures), None if title == together else ratio(seconds[reference], figures))
            for title, figures in seconds.items()
        ],
        reference,
        ["INT8, torch is the exact integer simulation; FP32, torch is eager PyTorch."],
    )
    targets = [
        Target(
            f"accuracy of all precisions over {len(test):,} images",
            "at most",
            10.0,
            "s",
            spread(seconds[together]).median,
            "the target says 'seconds'",
        ),
        Target(
            "integer simulation, times as fast as FP32 eager over the test images",
            "at least",
            0.5,
            "",
            ratio(seconds[reference], seconds["INT8, torch"]),
        ),
    ]
    return Findings(METHOD, [table], targets, skipped)


def _evaluation(networks: list[Compiled], test: ImageSet, classes: int, batch: int) -> Callable[[], object]:
    return lambda: run_shared(networks, test, Classes(classes), batch)
