"""The results for people: tables on the terminal, and the page ``docs/benchmarks.md``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.results import Benchmark, Results, Spread, Table, Target
from common.console import print_table

INTRODUCTION = """\
# Benchmarks

What this project is measured against, side by side on one machine. `make bench` runs everything below, prints it, and
writes this page and `artifacts/bench/bench.json`, which has every single measurement;
`python -m benchmarks calibration training` runs some of it.

Whatever is compared takes turns, so that a change of clock or of load hits all alike. A figure is the median of the
turns, with the smallest and the largest beside it. "Times as fast" is against the row with 1: the median of the turns'
ratios.
"""
QUICK = "This was a trial without repetitions on the digits: the figures mean nothing."


def print_benchmark(benchmark: Benchmark) -> None:
    """Print one benchmark's tables on stdout."""
    for table in benchmark.findings.tables:
        columns, rows = _cells(table)
        print_table(f"{benchmark.title}: {table.title}", columns, rows)
        for note in table.notes:
            print(f"  {note}")
    for what, why in benchmark.findings.skipped.items():
        print(f"  skipped: {what}: {why}")


def print_targets(results: Results) -> None:
    """Print what was aimed at and what came out."""
    rows = [_target_cells(target) for target in results.targets]
    print_table("targets", ("target", "wanted", "measured", "met"), rows)
    if results.quick:
        print(QUICK)


def markdown(results: Results, elsewhere: Sequence[Results] = ()) -> str:
    """The page.

    Args:
        results: Of this machine.
        elsewhere: Of other machines; what was measured on this one, or one like it, is left out.
    """
    parts = [INTRODUCTION, "## Machine\n", _environment(results), "## Targets\n", *_targets(results)]
    for benchmark in results.benchmarks:
        parts += _section(benchmark)
    for other in elsewhere:
        where = _name(other)
        if where == _name(results):
            continue
        parts += [f"\n## On another machine: {where}\n", _environment(other), *_targets(other)]
        for benchmark in other.benchmarks:
            parts += _section(benchmark, f" on the {where}")
    return "\n".join(parts).replace("\n\n\n", "\n\n").rstrip() + "\n"


def _name(results: Results) -> str:
    """What tells a machine from others: its GPU, or its processor."""
    return results.environment.gpu or results.environment.processor


def _targets(results: Results) -> list[str]:
    noted = [target for target in results.targets if target.note]
    rows = [_target_cells(target) for target in results.targets]
    notes = dict.fromkeys(f"{target.what}: {target.note}." for target in noted)
    return [_table(("target", "wanted", "measured", "met"), rows), *(f"- {note}\n" for note in notes)]


def _environment(results: Results) -> str:
    here = results.environment
    cores = f"{here.cores} core{'s' if here.cores > 1 else ''}"
    threads = f"{here.threads} thread{'s' if here.threads > 1 else ''} in PyTorch"
    rows = [
        ("network and data", results.subject),
        ("processor", f"{here.processor}, {cores}, {threads}"),
        ("instructions", ", ".join(here.instructions) or "not known"),
        ("memory", "not known" if here.memory is None else f"{here.memory / 2**30:.0f} GiB"),
        ("system", here.system),
        ("versions", ", ".join(f"{name} {version}" for name, version in here.versions.items())),
    ]
    if here.gpu is not None:
        rows.append(("GPU", here.gpu))
    return _table(("", ""), rows)


def _section(benchmark: Benchmark, where: str = "") -> list[str]:
    load = " and ".join(f"{value:.1f}" for value in benchmark.load)
    when = f"Measured {benchmark.created[:16].replace('T', ' ')}, in {benchmark.seconds:.0f} s"
    parts = [f"\n## {benchmark.title}{where}\n", f"{benchmark.findings.method}\n"]
    parts.append(f"{when}; load average before and after: {load}.\n" if load else f"{when}.\n")
    for table in benchmark.findings.tables:
        columns, rows = _cells(table)
        file = ".py" in table.title.split()[0]
        title = table.title if file else table.title[0].upper() + table.title[1:]
        parts += [f"### {title}\n", _table(columns, rows)]
        parts += [f"{note}\n" for note in table.notes]
    parts += [f"Skipped: {what}: {why}.\n" for what, why in benchmark.findings.skipped.items()]
    return parts


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    if columns[-1] in ("", "met"):
        lines[1] = ["---"] * len(columns)
    return "\n".join("| " + " | ".join(_escaped(cell) for cell in line) + " |" for line in lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _cells(table: Table) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of a table."""
    timed = any(entry.measured for entry in table.entries)
    compared = any(entry.ratio is not None for entry in table.entries)
    further = list(dict.fromkeys(name for entry in table.entries for name in entry.figures))
    columns = [""]
    if timed:
        columns += [f"median, {table.unit}", "smallest to largest", "turns"]
    if compared:
        columns.append("times as fast")
    rows = []
    for entry in table.entries:
        row = [entry.name]
        if timed:
            row += _measured(entry.measured)
        if compared:
            row.append(number(entry.ratio, 3))
        rows.append(row + [number(entry.figures.get(name)) for name in further])
    return [*columns, *further], rows


def _measured(spread: Spread | None) -> list[str]:
    if spread is None:
        return ["-", "-", "-"]
    low, middle, high = (number(value, 3) for value in (spread.minimum, spread.median, spread.maximum))
    return [middle, f"{low} to {high}", str(spread.runs)]


def _target_cells(target: Target) -> tuple[str, str, str, str]:
    unit = f" {target.unit}" if target.unit else ""
    figure = "not measured" if target.figure is None else f"{number(target.figure, 4)}{unit}"
    verdict = {True: "yes", False: "**no**", None: "-"}[target.met]
    return target.what, f"{target.kind} {number(target.bound)}{unit}", figure, verdict


def number(value: Any, digits: int = 4) -> str:
    """A figure with so many significant digits, or what is left of the point; text as it is; nothing as a dash."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    text = f"{value:.{digits}g}"
    return f"{value:.6f}".rstrip("0") if "e" in text and abs(value) >= 1e-6 else text
