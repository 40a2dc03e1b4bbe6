"""The table tools: ``python -m calib show|diff|check|convert|set TABLE ...``."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from calib import formats
from calib.table import HEADER_NAMES, LEVELS, CalibrationTable, parse, scale_to_hex
from common.command import run_command
from common.errors import ExitCode, InputError
from common.files import read_bytes, read_text

DESCRIPTION = """\
Tools for TensorRT's calibration tables (artifacts/<run>/CalibrationTable<NetworkName>).

Exit codes: 0 done, or nothing found; 1 the tables differ, or the table is not valid; 2 bad input."""

_NAMED = 5
"""How many tensors a warning about several names."""


class _Parser(argparse.ArgumentParser):
    """argparse's parser, with an error that is one line."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(int(ExitCode.BAD_INPUT))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m calib", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="show|diff|check|convert|set")

    show = commands.add_parser("show", help="print tensors, scales and dynamic ranges")
    show.add_argument("table", type=Path, metavar="TABLE", help="calibration table, its JSON form or ONNX Runtime's")
    show.add_argument("--json", action="store_true", help="print JSON")
    _add_replacements(show)

    diff = commands.add_parser("diff", help="compare two tables; exit code 1 if their tensors or scales differ")
    diff.add_argument("table", type=Path, metavar="TABLE")
    diff.add_argument("other", type=Path, metavar="OTHER")
    diff.add_argument(
        "--tolerance",
        type=_share,
        default=0.0,
        help="largest relative difference between scales that counts as equal, such as 0.01 (default: 0)",
    )
    diff.add_argument("--json", action="store_true", help="print JSON")

    check = commands.add_parser("check", help="validate a table, every line of it; exit code 1 if anything is wrong")
    check.add_argument("table", type=Path, metavar="TABLE")
    check.add_argument(
        "--onnx",
        type=Path,
        metavar="FILE",
        help="float network whose tensors the table should name, as trtexec takes it",
    )

    convert = commands.add_parser("convert", help="rewrite line 1, or the format")
    convert.add_argument("table", type=Path, metavar="TABLE", help="calibration table, its JSON form or ONNX Runtime's")
    convert.add_argument("output", type=Path, metavar="OUTPUT", help="file to write; may be TABLE itself")
    convert.add_argument(
        "--to",
        choices=formats.FORMATS,
        help="format of OUTPUT (default: json for *.json, onnxruntime for *.flatbuffers, else table)",
    )
    _add_replacements(convert)

    change = commands.add_parser("set", help="set the dynamic range of tensors by hand")
    change.add_argument("table", type=Path, metavar="TABLE")
    change.add_argument(
        "values",
        nargs="+",
        metavar="TENSOR=RANGE",
        help="largest absolute value that INT8 shall represent for this tensor, such as ip1=7.5",
    )
    change.add_argument("--scale", action="store_true", help="values are scales (range / 127)")
    change.add_argument("--add", action="store_true", help="allow tensors that the table does not have yet")
    change.add_argument("--output", type=Path, metavar="FILE", help="write there instead of to TABLE")
    return parser


def _add_replacements(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tensorrt-version", metavar="VERSION", help="TensorRT of line 1, such as 8.5.2")
    parser.add_argument(
        "--algorithm",
        choices=tuple(HEADER_NAMES),
        help="algorithm of line 1: TensorRT takes a table only from a calibrator of the same algorithm "
        "(trtexec's is entropy2)",
    )


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number from 0 up, not {text!r}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run one table tool and return its exit code. Raises InputError for bad input."""
    arguments = _parser().parse_args(argv)
    return {"show": _show, "diff": _diff, "check": _check, "convert": _convert, "set": _set}[arguments.command](
        arguments
    )


def _show(arguments: argparse.Namespace) -> int:
    table = formats.read(arguments.table, algorithm=arguments.algorithm, tensorrt_version=arguments.tensorrt_version)
    if arguments.json:
        print(json.dumps({**formats.to_json(table), "unusable": table.unusable}, indent=2))
        return ExitCode.PASSED
    print(f"{arguments.table}: {table.algorithm}, TensorRT {table.tensorrt_version}, {len(table.scales)} tensors")
    rows = [
        (name, scale_to_hex(scale), f"{scale:.9g}", f"{LEVELS * scale:.7g}") for name, scale in table.scales.items()
    ]
    _print_rows(("tensor", "hex", "scale", "dynamic range"), rows)
    for name, reason in table.unusable.items():
        print(f"tensor {name!r} cannot be quantized: {reason}")
    return ExitCode.PASSED


def _diff(arguments: argparse.Namespace) -> int:
    scales, header = formats.read_scales(arguments.table)
    others, other_header = formats.read_scales(arguments.other)
    missing = {
        str(arguments.table): [name for name in others if name not in scales],
        str(arguments.other): [name for name in scales if name not in others],
    }
    changed = [
        (name, scale, others[name])
        for name, scale in scales.items()
        if name in others and not math.isclose(scale, others[name], rel_tol=arguments.tolerance)
    ]
    differ = bool(changed or any(missing.values()))
    if arguments.json:
        content = {
            "headers": [header, other_header],
            "missing": missing,
            "changed": {name: {"scales": [a, b], "ratio": _ratio(a, b)} for name, a, b in changed},
            "equal": not differ,
        }
        print(json.dumps(content, indent=2))
        return ExitCode.FAILED if differ else ExitCode.PASSED
    if header and other_header and header != other_header:
        print(f"line 1 differs: {header} and {other_header}")
    for path, names in missing.items():
        for name in names:
            print(f"not in {path}: {name}")
    rows = [
        (name, f"{a:.9g}", f"{b:.9g}", "" if (ratio := _ratio(a, b)) is None else f"{ratio:.6f}")
        for name, a, b in changed
    ]
    if rows:
        _print_rows(("tensor", "scale", "other scale", "other / this"), rows)
    both = len(scales.keys() & others.keys())
    print(f"{both - len(changed)} of {both} tensors in both tables have the same scale")
    return ExitCode.FAILED if differ else ExitCode.PASSED


def _ratio(scale: float, other: float) -> float | None:
    return other / scale if scale else None


def _check(arguments: argparse.Namespace) -> int:
    _require_text(arguments.table)
    text = read_text(arguments.table)
    table, problems = parse(text)
    findings = [problem.text(str(arguments.table)) for problem in problems]
    warnings = []
    if "\r" in text:
        warnings.append("lines end in CR LF: TensorRT does not recognise line 1; `convert` writes plain line ends")
    if table is not None:
        warnings += [f"tensor {name!r}: {reason}" for name, reason in table.unusable.items()]
        if arguments.onnx:
            differences, advice = _compare_with_network(table.scales, arguments.onnx)
            findings += differences
            warnings += advice
    for finding in findings:
        print(finding)
    for warning in warnings:
        print(f"warning: {arguments.table}: {warning}")
    if findings:
        print(f"{arguments.table}: {len(findings)} {'problem' if len(findings) == 1 else 'problems'}")
        return ExitCode.FAILED
    assert table is not None
    print(f"{arguments.table}: valid, {table.header}, {len(table.scales)} tensors")
    return ExitCode.PASSED


def _compare_with_network(scales: Mapping[str, float], path: Path) -> tuple[list[str], list[str]]:
    """What is wrong with the names of a table for the network in ``path``, and what may be."""
    from calib.onnx_names import network_tensors

    names = network_tensors(path)
    unknown = [f"tensor {name!r}: the network {path} has no such tensor" for name in scales if name not in names]
    lacking = [
        f"tensor {name!r} of the network {path} has no scale here"
        for name, need in names.items()
        if need == "required" and name not in scales
    ]
    advised = [repr(name) for name, need in names.items() if need == "advised" and name not in scales]
    if not advised:
        return unknown + lacking, []
    named = ", ".join(advised[:_NAMED]) + (f" and {len(advised) - _NAMED} more" if len(advised) > _NAMED else "")
    return unknown + lacking, [
        f"without a scale for {named} of the network {path}, TensorRT may run what reads or writes them in float"
    ]


def _convert(arguments: argparse.Namespace) -> int:
    table = formats.read(arguments.table, algorithm=arguments.algorithm, tensorrt_version=arguments.tensorrt_version)
    suffixes: dict[str, formats.Format] = {".json": "json", ".flatbuffers": "onnxruntime"}
    to: formats.Format = arguments.to or suffixes.get(arguments.output.suffix, "table")
    _write(arguments.output, table, to)
    return ExitCode.PASSED


def _set(arguments: argparse.Namespace) -> int:
    _require_text(arguments.table)
    table = CalibrationTable.read(arguments.table)
    scales = dict(table.scales)
    given: dict[str, str] = {}
    for item in arguments.values:
        name, _, text = item.rpartition("=")
        if not name:
            raise InputError(f"expected TENSOR=RANGE, not {item!r}")
        if name not in scales and not arguments.add:
            raise InputError(f"{arguments.table} has no tensor {name!r}: give --add if it shall be added")
        try:
            value = float(text)
        except ValueError:
            raise InputError(f"tensor {name!r}: {text!r} is not a number") from None
        if not 0 < value < math.inf:
            raise InputError(f"tensor {name!r}: the value must be a positive number, not {text}")
        scales[name], given[name] = value if arguments.scale else value / LEVELS, text
    changed = CalibrationTable(scales, table.algorithm, table.tensorrt_version)
    for name, text in given.items():
        if name in changed.unusable:
            reason = changed.unusable[name] if changed.scales[name] else "its scale rounds to 0"
            raise InputError(f"tensor {name!r}: {text} cannot be used: {reason}")
    _write(arguments.output or arguments.table, changed, "table")
    return ExitCode.PASSED


def _require_text(path: Path) -> None:
    """Refuse other formats than TensorRT's, for tools that are about its lines."""
    found = formats.format_of(read_bytes(path))
    if found != "table":
        what = "JSON" if found == "json" else "no text"
        raise InputError(
            f"{path} is {what}, and this tool takes TensorRT's text alone: python -m calib convert FILE TABLE writes it"
        )


def _write(output: Path, table: CalibrationTable, to: formats.Format) -> None:
    """Write a table and say so; the side file of another table is not overwritten, and one beside it is mentioned."""
    if output.suffix == ".json" and output.with_suffix("").is_file():
        raise InputError(f"{output} is the name of the side file of {output.with_suffix('')}: choose another")
    formats.write(output, table, to)
    print(f"wrote {output}" + (f" ({table.header})" if to == "table" else ""))
    side_file = output.with_name(f"{output.name}.json")
    if to == "table" and side_file.is_file():
        print(
            f"note: {side_file} describes the table as it was calibrated and fits it no longer, so that quantize.py "
            "would calibrate again. To use this table, copy it elsewhere and name the copy: quantize.py --cache PATH",
            file=sys.stderr,
        )


def _print_rows(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout: names left-aligned, figures right-aligned."""
    widths = [max(len(row[index]) for row in [columns, *rows]) for index in range(len(columns))]
    for row in [columns, *rows]:
        figures = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *figures]).rstrip())


if __name__ == "__main__":
    run_command(main)
