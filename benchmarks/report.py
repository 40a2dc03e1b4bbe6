"""Where the time of ``evaluate.py --report`` goes."""

from __future__ import annotations

import pstats
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.results import Entry, Findings, Table, Target
from benchmarks.setting import Setting
from benchmarks.timing import spread
from common.cli import ROOT
from common.files import read_json

METHOD = (
    "The command runs as a user starts it, analysis included, and its report.json says what each part took; the rest "
    "is starting, reading and writing. Then it runs once more under cProfile, which lists the functions in which most "
    "time passes, what they call included (cumulative) or not (own); PyTorch's kernels count to their callers."
)
SHOWN = 12


def run(setting: Setting) -> Findings:
    """See the module."""
    _ = setting.quantized  # evaluate.py wants its table
    with tempfile.TemporaryDirectory() as folder:
        profile = Path(folder) / "profile"
        profiled = ("-m", "cProfile", "-o", str(profile))

        def evaluate(python: Sequence[str] = ()) -> float:
            begin = time.perf_counter()
            setting.command("evaluate.py", "--report", folder, python=python, codes=(0, 1))
            return time.perf_counter() - begin

        # In a trial, the run under the profiler serves as the other one, too.
        seconds = [evaluate(profiled)] if setting.quick else [evaluate(), evaluate()]
        parts: dict[str, float] = read_json(Path(folder) / "report.json")["seconds"]
        if not setting.quick:
            evaluate(profiled)
        tables = [
            Table("evaluate.py --report", "s", [Entry("whole command", spread(seconds))]),
            _parts(parts, seconds[-1]),
            *_functions(profile),
        ]
    target = Target("evaluate.py --report, analysis included", "at most", 90.0, "s", spread(seconds).median)
    return Findings(METHOD, tables, [target])


def _parts(parts: dict[str, float], whole: float) -> Table:
    """The report's own account of the last run, the largest first."""
    rest = whole - sum(parts.values())
    named = {**parts, "start-up, reading the run, writing the report": rest}
    entries = [
        Entry(name, figures={"seconds": seconds, "share, %": 100 * seconds / whole})
        for name, seconds in sorted(named.items(), key=lambda item: -item[1])
    ]
    return Table("its parts", "", entries)


def _functions(profile: Path) -> list[Table]:
    """The functions of this project by cumulative time, and all functions by their own."""
    stats: dict[tuple[str, int, str], tuple[int, int, float, float, object]] = vars(pstats.Stats(str(profile)))["stats"]
    root = f"{ROOT}/"
    project = [(key, row) for key, row in stats.items() if key[0].startswith(root) and "/." not in key[0]]
    by_cumulative = sorted(project, key=lambda item: -item[1][3])[:SHOWN]
    by_own = sorted(stats.items(), key=lambda item: -item[1][2])[:SHOWN]
    return [
        Table(
            "profile: functions of this project by cumulative time",
            "",
            [
                Entry(f"{key[0].removeprefix(root)}: {key[2]}", figures={"calls": row[1], "cumulative, s": row[3]})
                for key, row in by_cumulative
            ],
        ),
        Table(
            "profile: all functions by their own time",
            "",
            [
                Entry(_place(key), figures={"calls": row[1], "own, s": row[2], "cumulative, s": row[3]})
                for key, row in by_own
            ],
        ),
    ]


def _place(key: tuple[str, int, str]) -> str:
    """A function, without the folders of this machine."""
    file, _, name = key
    if file == "~":
        return name.strip("<>")
    path = Path(file)
    inside = path.parts[path.parts.index("site-packages") + 1 :] if "site-packages" in path.parts else path.parts[-2:]
    if file.startswith(f"{ROOT}/"):
        inside = path.relative_to(ROOT).parts
    return f"{'/'.join(inside)}: {name}"
