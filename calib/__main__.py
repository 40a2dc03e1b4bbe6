"""The command ``python -m calib``: tools for calibration tables."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from calib.onnx import command, from_qdq_command
from calib.table import tools
from common.command import ToolParser, run_command

DESCRIPTION = """\
Tools for TensorRT's calibration tables (artifacts/<run>/CalibrationTable<NetworkName>).

Exit codes: 0 done, or nothing found; 1 the tables differ, or the table is not valid; 2 bad input."""


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(
        prog="python -m calib", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="TOOL")
    tools.add_parsers(commands)
    command.add_parser(commands)
    from_qdq_command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one tool and return its exit code. Raises InputError for bad input."""
    arguments = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    return run(arguments)


if __name__ == "__main__":
    run_command(main)
