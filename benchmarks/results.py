"""What a benchmark finds: the dataclasses that ``bench.json`` is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from common.decode import decode
from common.errors import InputError
from common.files import read_json
from evaluation.results import Environment

FORMAT = 1
"""Of ``bench.json``; raised when a member is added, removed or changes its meaning."""


@dataclass(frozen=True)
class Spread:
    """Repeated measurements of one thing, in the unit of their table.

    Attributes:
        runs: How many there are.
        median: The figure.
        minimum: Smallest.
        maximum: Largest.
        lower_quartile: A quarter of them lie below.
        upper_quartile: A quarter of them lie above.
        values: All, in order of time.
    """

    runs: int
    median: float
    minimum: float
    maximum: float
    lower_quartile: float
    upper_quartile: float
    values: list[float]


@dataclass(frozen=True)
class Entry:
    """A row of a table.

    Attributes:
        name: What was measured.
        measured: None for a row without measurements.
        ratio: How many times as fast as the table's reference: the median of the rounds' ratios.
        figures: Further columns: heading -> number or text.
    """

    name: str
    measured: Spread | None = None
    ratio: float | None = None
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """Things that were measured side by side.

    Attributes:
        title: What they are.
        unit: What the measurements are in: ``s``, ``ms``, ``images/s``; empty if there are none.
        entries: The rows.
        reference: Name of the entry that the ratios are to.
        notes: What a reader must know.
    """

    title: str
    unit: str
    entries: list[Entry]
    reference: str | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Target:
    """What was aimed at, and what came out.

    Attributes:
        what: What is measured.
        kind: Which side of ``bound`` is good.
        bound: In ``unit``.
        unit: Empty for a ratio.
        figure: None where it could not be measured; ``note`` says why.
        note: What a reader must know.
    """

    what: str
    kind: Literal["at most", "at least"]
    bound: float
    unit: str
    figure: float | None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the figure is on the good side; None without a figure."""
        if self.figure is None:
            return None
        return self.figure <= self.bound if self.kind == "at most" else self.figure >= self.bound


@dataclass(frozen=True)
class Findings:
    """What one benchmark returns.

    Attributes:
        method: How it was measured, in a few sentences.
        tables: The results.
        targets: What was aimed at.
        skipped: What was left out -> why.
    """

    method: str
    tables: list[Table]
    targets: list[Target] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Benchmark:
    """A benchmark that was run.

    Attributes:
        name: As on the command line.
        title: For people.
        created: When it began, ISO 8601.
        seconds: How long it took.
        load: The machine's load average over a minute, before and after; empty where the system has none. The
            benchmark itself adds up to one for each thread.
        findings: What it found.
    """

    name: str
    title: str
    created: str
    seconds: float
    load: list[float]
    findings: Findings


@dataclass(frozen=True)
class Results:
    """The content of ``bench.json``.

    Attributes:
        format: Version of this file's members.
        quick: Whether this was only a trial with few repetitions, whose figures mean nothing.
        subject: Network and data set.
        environment: What it ran on.
        benchmarks: In the order of the page.
    """

    format: int
    quick: bool
    subject: str
    environment: Environment
    benchmarks: list[Benchmark]

    @property
    def targets(self) -> list[Target]:
        """All targets, in order."""
        return [target for benchmark in self.benchmarks for target in benchmark.findings.targets]


def read_results(path: Path) -> Results:
    """Read ``bench.json``.

    Raises:
        InputError: it is missing, damaged or of another format.
    """
    content = read_json(path)
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise InputError(f"{path} has format {found!r:.20}, not {FORMAT}: run the benchmarks again")
    return decode(Results, content, str(path))
