"""The tables that ``evaluate.py`` prints."""

from __future__ import annotations

import sys

from common.console import print_table
from evaluation.measures import TITLES, Latency, OutputFigures, Row, Timing
from evaluation.results import Report
from evaluation.text import decibel, milliseconds, p_value, percent, points, rate, short, similarity, size


def print_report(report: Report) -> None:
    """Print the tables and the verdict on stdout."""
    data = report.data
    print(f"{report.model.name} on {data.title}: {data.images:,} {data.split} images, engine {report.engine}")
    for note in report.notes:
        print(f"note: {note}")
    print(f"task: {report.model.task} ({report.model.task_reason})")
    if report.model.task == "classify":
        columns = ("", "top-1 %", "points", "95 % interval", "top-5 %", "points", "agree %", "SQNR dB", "p", "size")
        judged = [row for row in report.rows if row.accuracy is not None]
        print_table("Accuracy", columns, [(report.title(row), *_accuracy(row)) for row in judged])
    else:
        _print_outputs(report)
    if any(row.latency for row in report.rows):
        _print_latency(report)
    for row in report.rows:
        if row.latency_note and row.latency:
            print(f"* {report.title(row)}: {row.latency_note}")
        if row.skipped:
            print(f"{TITLES[row.precision]} skipped: {row.skipped}")
    if report.macs is not None:
        print(f"{report.macs.summary()} ({report.macs.source})")
        if report.macs.warning() is not None:
            print(f"warning: {report.macs.warning()}")
    if report.analysis is not None:
        print(report.analysis.advice)
    print_verdict(report)


def print_verdict(report: Report) -> None:
    """Print the verdict, in colour on a terminal."""
    from rich.console import Console
    from rich.text import Text

    verdict = report.verdict
    text = Text.assemble((verdict.word, "bold green" if verdict.passed else "bold red"), f": {verdict.summary}")
    Console(file=sys.stdout, highlight=False, soft_wrap=True).print(text)


def _accuracy(row: Row) -> tuple[str, ...]:
    assert row.accuracy is not None  # the caller chose those that have it
    top1, top5 = f"{row.accuracy.top1:.2f}", f"{row.accuracy.top5:.2f}"
    if row.paired is None:
        return top1, "", "", top5, "", "", "", "", size(row.size)
    interval = row.paired.top1_interval
    return (
        top1,
        points(row.paired.top1_points),
        f"{points(interval.low)} to {points(interval.high)}",
        top5,
        points(row.paired.top5_points),
        f"{row.accuracy.agreement:.2f}",
        decibel(row.accuracy.sqnr_db),
        p_value(row.paired.mcnemar_mid),
        size(row.size),
    )


def _print_outputs(report: Report) -> None:
    """Each output of each precision against FP32, and of regression the error against the targets."""
    several = any(len(row.outputs) > 1 for row in report.rows)
    regression = report.model.task == "regress"
    columns = [
        *(["", "output"] if several else [""]),
        *("cosine", "least", "SQNR dB", "MSE", "MAE"),
        *(["error %"] if regression else []),
        "size",
    ]

    def cells(row: Row, output: OutputFigures) -> tuple[str, ...]:
        return (
            report.title(row),
            *([output.name] if several else []),
            similarity(output.cosine),
            similarity(output.least_cosine),
            decibel(output.sqnr_db),
            short(output.mse),
            short(output.mae),
            *([percent(output.relative_error)] if regression else []),
            size(row.size),
        )

    print_table("Outputs against FP32", columns, [cells(row, one) for row in report.rows for one in row.outputs])
    rows = [
        (report.title(row), short(row.targets.mse), short(row.targets.mae), percent(row.targets.relative_error))
        for row in report.rows
        if row.targets is not None
    ]
    if rows:
        print_table("Against the targets", ("", "MSE", "MAE", "error %"), rows)


def _print_latency(report: Report) -> None:
    """The timings, by batch size, so that the precisions stand below each other."""
    timed = [(row, entry) for row in report.rows for entry in row.latency]
    timed.sort(key=lambda found: found[1].batch_size)
    graphs = any(entry.without_graph for _, entry in timed)
    copies = any(entry.end_to_end for _, entry in timed)
    columns = (
        *("", "batch", "median ms", "p90 ms", "p99 ms", "ms/image", "images/s", "speed-up"),
        *(["without graph ms"] if graphs else []),
        *(["with copies ms"] if copies else []),
    )

    def median(timing: Timing | None) -> str:
        return "" if timing is None else milliseconds(timing.median)

    def cells(row: Row, entry: Latency) -> tuple[str, ...]:
        timing = entry.compute
        return (
            report.title(row) + ("*" if row.latency_note else ""),
            str(entry.batch_size),
            milliseconds(timing.median),
            milliseconds(timing.p90),
            milliseconds(timing.p99),
            milliseconds(timing.per_image),
            rate(timing.images_per_second),
            "" if entry.speedup is None else f"{entry.speedup:.2f}",
            *([median(entry.without_graph)] if graphs else []),
            *([median(entry.end_to_end)] if copies else []),
        )

    print_table("Latency", columns, [cells(row, entry) for row, entry in timed])
    tf32 = next((row.details["TF32"] for row in report.rows if row.precision == "fp32" and "TF32" in row.details), None)
    if tf32:
        print(f"FP32 on the GPU: TF32 {tf32}")
