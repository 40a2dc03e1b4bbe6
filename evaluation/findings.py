"""What a reader should take away from a report, in sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence

from evaluation.measures import TITLES, OutputFigures, Row
from evaluation.results import Report
from evaluation.text import decibel, p_value, points, short, size


def findings(report: Report) -> list[str]:
    """What a reader should take away, a sentence each."""
    sentences = []
    reference = report.row("fp32")
    for precision in ("int8", "fp16"):
        row = report.row(precision)
        if row is None or reference is None:
            continue
        if not row.judged:
            sentences.append(f"{TITLES[precision]} was skipped: {row.skipped}.")
            continue
        sentences.append(_loss(row, report.verdict.limits.tolerance) if row.paired else _distance(row))
        if row.size and reference.size:
            sentences[-1] += f" It takes {size(row.size)} instead of {size(reference.size)}."
        if row.latency_note is None and row.latency:
            fastest = max(row.latency, key=lambda entry: entry.batch_size)
            if fastest.speedup is not None:
                sentences[-1] += f" At batch {fastest.batch_size} it is {fastest.speedup:.2f} times as fast as FP32."
    if report.macs is not None:
        sentences.append(f"{report.macs.summary()} ({report.macs.source}).")
        warning = report.macs.warning()
        if warning is not None:
            sentences.append(f"{warning[0].upper()}{warning[1:]}.")
    if report.analysis is not None:
        sentences.append(report.analysis.advice)
    return sentences


def _loss(row: Row, tolerance: float) -> str:
    """How much top-1 changed, and what that means."""
    assert row.paired is not None  # it ran, and is not FP32
    paired, title = row.paired, TITLES[row.precision]
    if paired.lost == paired.gained == 0:
        return f"{title} gets exactly the same images right as FP32."
    interval = f"95 % interval {points(paired.top1_interval.low)} to {points(paired.top1_interval.high)}"
    change = f"{title} is {points(paired.top1_points)} points from FP32 in top-1 ({interval})"
    images = f"{paired.lost:,} image{'' if paired.lost == 1 else 's'} lost, {paired.gained:,} gained"
    chance = "no more than chance would do" if paired.mcnemar_mid >= 0.05 else "more than chance"
    bound = (
        "the whole interval is within the tolerance"
        if paired.top1_interval.low >= -tolerance
        else "the interval reaches beyond the tolerance, so that more images are needed to be sure"
    )
    return f"{change}: {images}, {chance} (McNemar {_p(paired.mcnemar_mid)}); {bound}."


def _distance(row: Row) -> str:
    """How far the outputs are from FP32's, by the one that is farthest."""
    output = farthest(row.outputs)
    title = TITLES[row.precision]
    where = f" in {output.name}" if len(row.outputs) > 1 else ""
    if output.sqnr_db is None:
        return f"{title} gives the same as FP32{where}."
    figures = [f"SQNR {decibel(output.sqnr_db)} dB", f"mean absolute error {short(output.mae)}"]
    if output.cosine is not None:
        figures.insert(0, f"cosine similarity {output.cosine:.4f}")
    if output.relative_error is not None:
        figures.insert(0, f"error {output.relative_error:.2f} % of how much FP32 varies")
    return (
        f"{title} is farthest from FP32{where}: {', '.join(figures)}." if where else f"{title}: {', '.join(figures)}."
    )


def farthest(outputs: Sequence[OutputFigures]) -> OutputFigures:
    """The output with the least SQNR."""
    return min(outputs, key=lambda output: math.inf if output.sqnr_db is None else output.sqnr_db)


def _p(value: float) -> str:
    text = p_value(value)
    return f"p {text}" if text.startswith("<") else f"p = {text}"
