"""What a reader should take away from a report, in sentences."""

from __future__ import annotations

from evaluation.results import TITLES, Report, Row
from evaluation.text import p_value, points, size


def findings(report: Report) -> list[str]:
    """What a reader should take away, a sentence each."""
    sentences = []
    reference = report.row("fp32")
    for precision in ("int8", "fp16"):
        row = report.row(precision)
        if row is None or reference is None:
            continue
        if row.accuracy is None or row.paired is None:
            sentences.append(f"{TITLES[precision]} was skipped: {row.skipped}.")
            continue
        sentences.append(_loss(row, report.verdict.tolerance))
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


def _p(value: float) -> str:
    text = p_value(value)
    return f"p {text}" if text.startswith("<") else f"p = {text}"
