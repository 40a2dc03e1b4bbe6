"""What a task is measured and judged by: the same steps for every task, where only the figures differ."""

from __future__ import annotations

import dataclasses
from typing import TypeGuard

from torch import Tensor

from calib.network import Network
from common.config import Task
from evaluation.accuracy import Classes, Predictions, accuracy, paired
from evaluation.measures import Row
from evaluation.outputs import OutputsFound, Values, output_figures, target_error
from evaluation.running import Found, Measure
from evaluation.text import decibel
from evaluation.verdict import Limits, judge


def measure_of(network: Network, task: Task, classes: int) -> Measure:
    """What the outputs of ``network`` are compared by.

    Args:
        network: As it was traced.
        task: What it is for.
        classes: Number of classes of the data (``classify`` alone).
    """
    if task == "classify":
        return Classes(classes, scores=not network.gives_probabilities)
    return Values(task, network.output_names)


def with_figures(row: Row, found: Found, reference: Found, labels: Tensor, measure: Measure) -> Row:
    """``row`` with the figures of what its network gave, against FP32's; where it is FP32, without a comparison.

    Args:
        row: Of one precision.
        found: What it gave.
        reference: What FP32 gave.
        labels: int64 [N], or targets, float32 [N, K].
        measure: By which both were gathered.
    """
    itself = found is reference
    if isinstance(measure, Classes):
        ours, theirs = _predictions(found), _predictions(reference)
        figures = accuracy(ours, theirs, labels, measure.count)
        return dataclasses.replace(row, accuracy=figures, paired=None if itself else paired(ours, theirs, labels))
    outputs, expected = _outputs(found), _outputs(reference)
    regression = isinstance(measure, Values) and measure.task == "regress" and labels.is_floating_point()
    return dataclasses.replace(
        row,
        outputs=[] if itself else output_figures(outputs, expected),
        targets=target_error(outputs, labels) if regression else None,
    )


def passes(found: Found, reference: Found, labels: Tensor, measure: Measure, limits: Limits) -> bool:
    """Whether the verdict on a network that gave ``found`` would be PASSED."""
    row = with_figures(Row("int8", "simulation", "compared"), found, reference, labels, measure)
    return judge([row], limits, task_of(measure)).passed


def task_of(measure: Measure) -> Task:
    """The task that is measured so."""
    return measure.task if isinstance(measure, Values) else "classify"


def points(found: Found, reference: Found, labels: Tensor) -> float | None:
    """Top-1 minus the reference's, points; None where no classes are given."""
    if not is_predictions(found):
        return None
    return paired(found, _predictions(reference), labels).top1_points


def changed(found: Found, reference: Found) -> float | None:
    """Percent of the images whose class differs from the reference's; None where no classes are given."""
    if not is_predictions(found):
        return None
    return 100 * float((found.predicted != _predictions(reference).predicted).double().mean())


def distance(found: Found, reference: Found, labels: Tensor) -> str:
    """How far from FP32, in the figure that a reader of this task looks at."""
    lost = points(found, reference, labels)
    if lost is not None:
        return f"{lost:+.2f} points from FP32"
    ratio = found.sqnr_db
    return "the same as FP32" if ratio is None else f"at {decibel(ratio)} dB (SQNR) from FP32"


def is_predictions(found: Found) -> TypeGuard[Predictions]:
    """Whether these are a classifier's."""
    return isinstance(found, Predictions)


def _predictions(found: Found) -> Predictions:
    assert isinstance(found, Predictions)
    return found


def _outputs(found: Found) -> OutputsFound:
    assert isinstance(found, OutputsFound)
    return found
