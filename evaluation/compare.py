"""Two reports side by side: what changed, and whether anything got worse by more than is allowed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from common.errors import InputError
from evaluation.measures import TITLES, Row
from evaluation.results import Report


@dataclass(frozen=True)
class Gates:
    """How much worse the second report may be; None leaves a figure out of the verdict.

    Attributes:
        accuracy: Points of top-1 and of top-5 that may be lost.
        latency: Percent by which a median may rise.
        size: Percent by which the deployed size may rise.
    """

    accuracy: float | None = 0.1
    latency: float | None = 10.0
    size: float | None = None


@dataclass(frozen=True)
class Change:
    """One figure in both reports.

    Attributes:
        figure: Such as ``INT8 top-1``.
        before: In the first report.
        after: In the second.
        change: Points for a share, percent of ``before`` for a time or a size.
        unit: Of ``change``: ``points`` or ``%``.
        limit: Largest change for the worse; null where it is shown alone.
        regressed: Whether the change for the worse is beyond the limit.
    """

    figure: str
    before: float
    after: float
    change: float
    unit: Literal["points", "%"]
    limit: float | None
    regressed: bool


@dataclass(frozen=True)
class Comparison:
    """What changed from one report to another.

    Attributes:
        passed: Nothing got worse by more than allowed.
        changes: Every figure that both have.
        problems: What fails the comparison although no figure says so, such as a precision that ran before.
        notes: What a reader must know, such as that the machines differ.
    """

    passed: bool
    changes: list[Change]
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def compare(before: Report, after: Report, limits: Gates) -> Comparison:
    """Compare two reports of the same images; baselines are left out.

    Raises:
        InputError: the reports are of different images, so that their figures do not compare.
    """
    if (before.data.fingerprint, before.data.split) != (after.data.fingerprint, after.data.split):
        raise InputError(
            f"the reports are of different images ({before.data.name} {before.data.split}, {after.data.name} "
            f"{after.data.split}): their figures do not compare"
        )
    if (before.data.images, _first(before)) != (after.data.images, _first(after)):
        raise InputError(
            f"the reports are of different parts of {before.data.name} {before.data.split}: {before.data.images:,} "
            f"images from {_first(before):,} on, and {after.data.images:,} from {_first(after):,} on"
        )
    changes: list[Change] = []
    problems: list[str] = []
    for precision, title in TITLES.items():
        old, new = before.row(precision), after.row(precision)
        if old is None or old.skipped is not None:
            continue
        if new is None or new.skipped is not None:
            problems.append(f"{title} ran before and did not now: {new.skipped if new else 'no such row'}")
            continue
        if old.accuracy is not None and new.accuracy is not None:
            changes += _accuracy_changes(title, old, new, limits.accuracy)
        changes += _output_changes(title, old, new)
        found, missing = _latency_changes(title, old, new, limits.latency)
        changes += found
        problems += missing
        if old.size and new.size:
            changes.append(_relative(f"{title} size, bytes", old.size, new.size, limits.size))
    passed = not problems and not any(change.regressed for change in changes)
    return Comparison(passed, changes, problems, _notes(before, after))


def _first(report: Report) -> int:
    return report.data.start * report.data.batch_size


def _accuracy_changes(title: str, old: Row, new: Row, limit: float | None) -> list[Change]:
    assert old.accuracy is not None  # the caller left the others out
    assert new.accuracy is not None
    changes = []
    for name, before, after in (
        ("top-1", old.accuracy.top1, new.accuracy.top1),
        ("top-5", old.accuracy.top5, new.accuracy.top5),
    ):
        change = after - before
        regressed = limit is not None and -change > limit + 1e-9
        changes.append(Change(f"{title} {name}, %", before, after, change, "points", limit, regressed))
    if new.paired is not None:
        agreement = new.accuracy.agreement - old.accuracy.agreement
        name = f"{title} agreement with FP32, %"
        changes.append(
            Change(name, old.accuracy.agreement, new.accuracy.agreement, agreement, "points", None, regressed=False)
        )
    return changes


def _output_changes(title: str, old: Row, new: Row) -> list[Change]:
    """Mean absolute errors against FP32 and the targets, shown alone: the verdict of each report has its limits."""
    pairs = [
        (f"{title} {after.name}, mean absolute error against FP32", before.mae, after.mae)
        for before in old.outputs
        for after in new.outputs
        if before.name == after.name
    ]
    if old.targets is not None and new.targets is not None:
        pairs.append((f"{title} mean absolute error against the targets", old.targets.mae, new.targets.mae))
    return [_relative(name, before, after, None) for name, before, after in pairs if before > 0]


def _latency_changes(title: str, old: Row, new: Row, limit: float | None) -> tuple[list[Change], list[str]]:
    """Medians of the batch sizes that both measured; a latency that is not representative is shown alone."""
    if old.latency_note or new.latency_note:
        limit = None
    times = {entry.batch_size: entry.compute.median for entry in new.latency}
    missing = [str(entry.batch_size) for entry in old.latency if entry.batch_size not in times]
    changes = [
        _relative(f"{title} latency at batch {entry.batch_size}, ms", entry.compute.median, time, limit)
        for entry in old.latency
        if (time := times.get(entry.batch_size)) is not None
    ]
    if missing and limit is not None:
        return changes, [f"{title} was timed at batch {', '.join(missing)} before and is not now"]
    return changes, []


def _relative(figure: str, before: float, after: float, limit: float | None) -> Change:
    change = 100 * (after / before - 1)
    return Change(figure, before, after, change, "%", limit, limit is not None and change > limit + 1e-9)


def _notes(before: Report, after: Report) -> list[str]:
    pairs = (
        ("engine", before.engine, after.engine),
        ("processor", before.environment.processor, after.environment.processor),
        ("threads", before.environment.threads, after.environment.threads),
        ("GPU", before.environment.gpu, after.environment.gpu),
        ("network", before.model.name, after.model.name),
        ("task", before.model.task, after.model.task),
        ("calibration", _algorithm(before), _algorithm(after)),
        ("verdict", before.verdict.word, after.verdict.word),
    )
    notes = [f"{name} changed from {old} to {new}" for name, old, new in pairs if old != new]
    old_versions, new_versions = before.environment.versions, after.environment.versions
    for package in dict.fromkeys((*old_versions, *new_versions)):
        old, new = old_versions.get(package, "none"), new_versions.get(package, "none")
        if old != new:
            notes.append(f"{package} changed from {old} to {new}")
    return notes


def _algorithm(report: Report) -> str:
    return report.calibration.algorithm if report.calibration else "none"
