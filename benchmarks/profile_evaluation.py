"""Where the time of ``evaluate.py --report`` goes: ``python -m benchmarks.profile_evaluation [flags of evaluate.py]``.

Prints a Markdown table of the parts as the report has them, with what lies outside of them (imports, opening the data,
writing the files), and the functions that take most, by their own time.
"""

from __future__ import annotations

import cProfile
import io
import pstats
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

from common.command import run_command
from evaluation.results import read_report

FUNCTIONS = 12


def main(argv: Sequence[str] | None = None) -> int:
    """Run the evaluation once under the profiler and once without, and print both tables."""
    flags = list(sys.argv[1:] if argv is None else argv)
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        import evaluate

        code = _evaluate(evaluate.main, flags, folder)
        total = time.perf_counter() - begin
        report = read_report(Path(folder) / "report.json")
        profile = cProfile.Profile()
        profile.runcall(_evaluate, evaluate.main, flags, folder)
    parts = {**report.seconds, "the rest (imports, data, writing)": total - sum(report.seconds.values())}
    machine = f"{report.environment.processor}, {report.environment.cores} cores"
    print(f"`evaluate.py --report` took {total:.1f} s on {machine}\n")
    print("| part | seconds |\n|:--|--:|")
    for name, seconds in sorted(parts.items(), key=lambda item: -item[1]):
        print(f"| {name} | {seconds:.1f} |")
    print("\n| function | calls | own seconds |\n|:--|--:|--:|")
    for name, calls, seconds in _largest(profile):
        print(f"| `{name}` | {calls:,} | {seconds:.1f} |")
    return code


def _evaluate(command: object, flags: list[str], folder: str) -> int:
    assert callable(command)
    with redirect_stdout(io.StringIO()):
        return int(command([*flags, "--report", folder]))


def _largest(profile: cProfile.Profile) -> list[tuple[str, int, float]]:
    """(function, calls, seconds of its own), largest first."""
    statistics: dict[tuple[str, int, str], tuple[int, int, float, float, object]]
    statistics = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    ranked = sorted(statistics.items(), key=lambda item: -item[1][2])[:FUNCTIONS]
    return [
        (name if line == 0 else f"{Path(file).name}:{line} {name}", calls, own)
        for (file, line, name), (_, calls, own, _, _) in ranked
    ]


if __name__ == "__main__":
    run_command(main)
