"""Tools for reports: ``python -m evaluation compare|render|schema``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from common.command import ToolParser, run_command
from common.console import print_table
from common.errors import ExitCode, InputError
from common.run import Run
from evaluation.compare import Change, Comparison, Gates, compare
from evaluation.results import VERSION, Report, read_report

DESCRIPTION = """\
Tools for the reports of evaluate.py.

Exit codes: 0 done, or nothing got worse; 1 something got worse by more than allowed; 2 bad input."""
SCHEMA_ID = f"urn:int8-workflow:report:{VERSION}"


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(
        prog="python -m evaluation", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="compare|render|schema")

    gate = commands.add_parser("compare", help="which figures changed; exit code 1 if one got worse than allowed")
    gate.add_argument("before", metavar="RUN_A", help="name of a run, its folder, or a report.json")
    gate.add_argument("after", metavar="RUN_B", help="the same for the newer one")
    gate.add_argument(
        "--max-accuracy-loss",
        type=_limit,
        default=Gates.accuracy,
        metavar="POINTS",
        help="top-1 and top-5 that may be lost, or 'none' (default: %(default)s)",
    )
    gate.add_argument(
        "--max-latency-increase",
        type=_limit,
        default=Gates.latency,
        metavar="PERCENT",
        help="by which a median latency may rise, or 'none' (default: %(default)s)",
    )
    gate.add_argument(
        "--max-size-increase",
        type=_limit,
        default=Gates.size,
        metavar="PERCENT",
        help="by which a deployed size may rise, or 'none' (default: none)",
    )
    gate.add_argument("--json", action="store_true", help="print JSON")
    _add_artifacts(gate)

    render = commands.add_parser("render", help="write report.html, report.md and the figures again from report.json")
    render.add_argument("report", metavar="RUN", help="name of a run, its folder, or a report.json")
    _add_artifacts(render)

    commands.add_parser("schema", help="print the JSON Schema of report.json")
    return parser


def _add_artifacts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--artifacts", type=Path, default=Path("artifacts"), help="folder of all runs (default: %(default)s)"
    )


def _limit(text: str) -> float | None:
    if text == "none":
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number from 0 on nor 'none'")
    return value


def _open(name: str, artifacts: Path) -> tuple[Report, Path]:
    """A report and its file, by the name of a run, its folder or the file."""
    path = Path(name)
    if not path.exists():
        try:
            path = Run(name, artifacts).folder
        except InputError as error:
            raise InputError(f"there is no report {name}") from error
    if path.is_dir():
        path /= "report.json"
    if not path.is_file():
        raise InputError(f"there is no report {path}: make one with evaluate.py --report")
    return read_report(path), path


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the tools and return its exit code."""
    arguments = _parser().parse_args(argv)
    if arguments.command == "schema":
        from evaluation.schema import json_schema

        print(json.dumps(json_schema(Report, SCHEMA_ID, "Report of evaluate.py"), indent=2))
        return ExitCode.PASSED
    if arguments.command == "render":
        from evaluation.report import write_pages

        report, path = _open(arguments.report, arguments.artifacts)
        for written in write_pages(report, path.parent):
            print(written)
        return ExitCode.PASSED
    before, after = (_open(name, arguments.artifacts)[0] for name in (arguments.before, arguments.after))
    limits = Gates(arguments.max_accuracy_loss, arguments.max_latency_increase, arguments.max_size_increase)
    comparison = compare(before, after, limits)
    if arguments.json:
        print(json.dumps(asdict(comparison), indent=2, allow_nan=False))
    else:
        _show(before, after, comparison)
    return ExitCode.PASSED if comparison.passed else ExitCode.FAILED


def _show(before: Report, after: Report, comparison: Comparison) -> None:
    print_table(
        f"{before.run} ({before.created}) -> {after.run} ({after.created})",
        ("figure", "before", "after", "change", "allowed", ""),
        [_cells(change) for change in comparison.changes],
    )
    for note in comparison.notes:
        print(f"note: {note}")
    for problem in comparison.problems:
        print(f"worse: {problem}")
    worse = [change.figure for change in comparison.changes if change.regressed]
    if comparison.passed:
        print("PASSED: nothing got worse by more than allowed")
    else:
        print(f"FAILED: {'; '.join([*worse, *comparison.problems])}")


def _cells(change: Change) -> tuple[str, ...]:
    sign = -1 if change.unit == "points" else 1
    allowed = "" if change.limit is None else f"{sign * change.limit:+g}"
    digits = 0 if "bytes" in change.figure else 3 if "ms" in change.figure else 2
    return (
        change.figure,
        f"{change.before:.{digits}f}",
        f"{change.after:.{digits}f}",
        f"{change.change:+.2f} {change.unit}",
        allowed,
        "worse" if change.regressed else "",
    )


if __name__ == "__main__":
    run_command(main)
