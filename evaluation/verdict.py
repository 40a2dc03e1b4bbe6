"""The verdict: whether the lower precisions may replace FP32, by a measure that fits the task. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from common.config import EvaluationConfig, Task
from evaluation.measures import TITLES, OutputFigures, Row
from evaluation.text import decibel
from evaluation.text import points as signed

_SLACK = 1e-9
"""What is exactly at a limit passes; this is far below one image in any data set."""


@dataclass(frozen=True)
class Limits:
    """How far a precision may be from FP32.

    Attributes:
        tolerance: Points of top-1 and of top-5 that a classifier may lose.
        agreement: Percent of the images that a classifier must give FP32's class.
        relative_error: Percent by which a regression network may err, see ``OutputFigures.relative_error``.
        cosine: Least mean cosine similarity of an embedding, or of each of several outputs.
        sqnr_db: Least signal-to-noise ratio of each of several outputs, dB.
    """

    tolerance: float = EvaluationConfig.tolerance
    agreement: float = EvaluationConfig.agreement
    relative_error: float = EvaluationConfig.relative_error
    cosine: float = EvaluationConfig.cosine
    sqnr_db: float = EvaluationConfig.sqnr

    @classmethod
    def of(cls, options: EvaluationConfig) -> Limits:
        """Those of a configuration."""
        return cls(options.tolerance, options.agreement, options.relative_error, options.cosine, options.sqnr)

    def agrees(self, agreement: float) -> bool:
        """Whether enough percent of the images are given the class that FP32 gives them."""
        return agreement >= self.agreement - _SLACK


@dataclass(frozen=True)
class Verdict:
    """Whether the lower precisions may replace FP32.

    Attributes:
        passed: FP16 (where it ran) and INT8 are each within the limits of the task: a classifier loses at most
            ``tolerance`` points of top-1 and of top-5 and keeps the class of ``agreement`` percent of the images;
            regression errs by at most ``relative_error`` percent; an embedding keeps its direction (``cosine``); each
            of several outputs does, and has ``sqnr_db``.
        limits: Those asked for; the task decides which count.
        summary: One sentence.
        reasons: Each finding that decided it.
    """

    passed: bool
    limits: Limits
    summary: str
    reasons: list[str]

    @property
    def word(self) -> str:
        return "PASSED" if self.passed else "FAILED"


def judge(rows: Sequence[Row], limits: Limits, task: Task = "classify") -> Verdict:
    """The verdict on FP16 and INT8, each against FP32.

    A small gain passes; a precision that is right more often because it is another network does not agree, whatever
    the task. FP16 may be absent (hardware without it); without INT8 there is no PASSED.
    """
    reasons: list[str] = []
    failed: list[str] = []
    for row in rows:
        if row.role != "compared":
            continue
        title = TITLES[row.precision]
        if not row.judged:
            reasons.append(f"{title} did not run: {row.skipped}")
            if row.precision == "int8":
                failed.append(reasons[-1])
            continue
        findings = _classes(row, limits) if task == "classify" else _outputs(row.outputs, limits, task)
        for sentence, passes in findings:
            reasons.append(f"{title} {sentence}")
            if not passes:
                failed.append(reasons[-1])
    if not any(row.precision == "int8" and row.role == "compared" for row in rows):
        failed.append("INT8 did not run")
        reasons.append(failed[-1])
    if failed:
        return Verdict(False, limits, "; ".join(failed), reasons)
    judged = [TITLES[row.precision] for row in rows if row.role == "compared" and row.judged]
    return Verdict(True, limits, f"{' and '.join(judged)} {_agreed(limits, task, len(judged) > 1)}", reasons)


def _agreed(limits: Limits, task: Task, several: bool) -> str:
    """What a precision, or ``several``, that passed does."""
    verb = "are each" if several else "is"
    if task == "classify":
        lose, agree = ("each lose", "agree") if several else ("loses", "agrees")
        most = f"{limits.tolerance:g} point{'' if limits.tolerance == 1 else 's'}"
        return f"{lose} at most {most} and {agree} with FP32 on at least {limits.agreement:g} % of the images"
    if task == "regress":
        return f"{verb} within {limits.relative_error:g} % of FP32"
    close = f"{verb} close to FP32: cosine similarity of at least {limits.cosine:g}"
    return f"{close} and SQNR of at least {limits.sqnr_db:g} dB in each output" if task == "detect" else close


def _classes(row: Row, limits: Limits) -> Iterator[tuple[str, bool]]:
    """(what was found, whether it passes) of a classifier."""
    assert row.accuracy is not None  # it ran
    assert row.paired is not None
    for name, points in (("top-1", row.paired.top1_points), ("top-5", row.paired.top5_points)):
        passes = -points <= limits.tolerance + _SLACK
        side = "no loss" if points >= 0 else f"{'within' if passes else 'outside'} {limits.tolerance:g}"
        yield f"{name} is {signed(points)} points from FP32: {side}", passes
    passes = limits.agrees(row.accuracy.agreement)
    side = "at least" if passes else "less than"
    share = f"{row.accuracy.agreement:.2f} % of the images"
    yield f"predicts the same class as FP32 for {share}: {side} {limits.agreement:g} %", passes
    if row.accuracy.non_finite:
        yield f"gave NaN or infinity for {row.accuracy.non_finite:,} images, counted as wrong", True


def _outputs(outputs: Sequence[OutputFigures], limits: Limits, task: Task) -> Iterator[tuple[str, bool]]:
    """(what was found, whether it passes) of each output of another task."""
    for output in outputs:
        name = "" if len(outputs) == 1 else f"{output.name}: "
        if output.non_finite:
            yield f"{name}gave NaN or infinity for {output.non_finite:,} images", False
        if task == "regress":
            yield _error(name, output.relative_error, limits.relative_error)
            continue
        yield _cosine(name, output.cosine, limits.cosine)
        if task == "detect":
            passes = output.sqnr_db is None or output.sqnr_db >= limits.sqnr_db - _SLACK
            side = "at least" if passes else "less than"
            ratio = "is the same as FP32" if output.sqnr_db is None else f"has an SQNR of {decibel(output.sqnr_db)} dB"
            yield f"{name}{ratio}: {side} {limits.sqnr_db:g} dB", passes


def _error(name: str, error: float | None, limit: float) -> tuple[str, bool]:
    if error is None:
        return f"{name}cannot be compared with FP32, which gives nothing but zeros", False
    passes = error <= limit + _SLACK
    side = "within" if passes else "outside"
    return f"{name}errs by {error:.2f} % against FP32: {side} {limit:g} %", passes


def _cosine(name: str, cosine: float | None, least: float) -> tuple[str, bool]:
    if cosine is None:
        return f"{name}cannot be compared with FP32, since one of them gives nothing but zeros", False
    passes = cosine >= least - _SLACK
    side = "at least" if passes else "less than"
    return f"{name}has a cosine similarity to FP32 of {cosine:.4f}: {side} {least:g}", passes
