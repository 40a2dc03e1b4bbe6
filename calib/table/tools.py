"""The tools of ``python -m calib`` that work on tables: show, diff, check, convert, set, remove, merge.

Each tool is a function of its parsed arguments that returns an exit code.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from calib.algorithms import ALGORITHMS
from calib.table import formats
from calib.table.text import LEVELS, CalibrationTable, scale_to_hex, scan
from common.errors import ExitCode, InputError
from common.files import read_bytes, read_text
from common.side_file import side_file

_NAMED = 5
"""How many tensors a line about several of them names."""

_ANY_TABLE = "calibration table, or one in another format (see convert)"


def add_parsers(commands: Any) -> None:
    """Add the tools to argparse's subparsers; each sets ``run``."""
    show = _tool(commands, "show", _show, "print tensors, scales and dynamic ranges")
    show.add_argument("table", type=Path, metavar="TABLE", help=_ANY_TABLE)
    show.add_argument("--json", action="store_true", help="print JSON")
    add_replacements(show)

    diff = _tool(commands, "diff", _diff, "compare two tables; exit code 1 if their tensors or scales differ")
    diff.add_argument("table", type=Path, metavar="TABLE", help=_ANY_TABLE)
    diff.add_argument("other", type=Path, metavar="OTHER", help="another one")
    diff.add_argument(
        "--tolerance",
        type=_share,
        default=0.0,
        help="largest relative difference between scales that counts as equal, such as 0.01 (default: 0)",
    )
    diff.add_argument("--json", action="store_true", help="print JSON")

    check = _tool(commands, "check", _check, "validate a table, every line of it; exit code 1 if anything is wrong")
    check.add_argument("table", type=Path, metavar="TABLE")
    check.add_argument(
        "--onnx",
        type=Path,
        metavar="FILE",
        help="float network whose tensors the table should name, as trtexec takes it",
    )
    check.add_argument("--json", action="store_true", help="print JSON")

    convert = _tool(commands, "convert", _convert, "rewrite line 1, or the format")
    convert.add_argument("table", type=Path, metavar="TABLE", help=_ANY_TABLE)
    convert.add_argument("output", type=Path, metavar="OUTPUT", help="file to write; may be TABLE itself")
    convert.add_argument(
        "--to",
        choices=formats.FORMATS,
        help="format of OUTPUT: table (TensorRT's), json, onnxruntime (calibration.flatbuffers), onnxruntime-json, "
        "onnxruntime-cache, ranges (sampleINT8API's lines), nvdla (default: json for *.json, onnxruntime for "
        "*.flatbuffers, else table)",
    )
    add_replacements(convert)

    change = _tool(commands, "set", _set, "set the dynamic range of tensors by hand")
    change.add_argument("table", type=Path, metavar="TABLE")
    change.add_argument(
        "values",
        nargs="+",
        metavar="TENSOR=RANGE",
        help="largest absolute value that INT8 shall represent for this tensor, such as ip1=7.5",
    )
    change.add_argument("--scale", action="store_true", help="values are scales (range / 127)")
    change.add_argument("--add", action="store_true", help="allow tensors that the table does not have yet")
    _add_output(change)

    remove = _tool(commands, "remove", _remove, "remove tensors, so that what reads or writes them stays in float")
    remove.add_argument("table", type=Path, metavar="TABLE")
    remove.add_argument("names", nargs="+", metavar="NAME", help="tensor, or a pattern with * and ?")
    _add_output(remove)

    merge = _tool(commands, "merge", _merge, "replace entries by those of another table, such as another algorithm's")
    merge.add_argument("table", type=Path, metavar="TABLE", help="gives line 1 and all other entries")
    merge.add_argument("other", type=Path, metavar="OTHER", help=_ANY_TABLE)
    merge.add_argument(
        "--take",
        nargs="+",
        required=True,
        metavar="NAME",
        help="tensors whose scale is taken from OTHER: names, or patterns with * and ?",
    )
    merge.add_argument("--add", action="store_true", help="take those that TABLE does not have, too")
    _add_output(merge)


def _tool(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], description: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=description, description=description)
    parser.set_defaults(run=run)
    return parser


def add_replacements(parser: argparse.ArgumentParser) -> None:
    """The options for line 1: ``--tensorrt-version`` and ``--algorithm``."""
    parser.add_argument("--tensorrt-version", metavar="VERSION", help="TensorRT of line 1, such as 8.5.2")
    parser.add_argument(
        "--algorithm",
        choices=tuple(ALGORITHMS),
        help="algorithm of line 1: TensorRT takes a table only from a calibrator of the same algorithm "
        "(trtexec's is entropy2)",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, metavar="FILE", help="write there instead of to TABLE")


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number from 0 up, not {text!r}")
    return value


def _show(arguments: argparse.Namespace) -> int:
    table = _read_any(arguments)
    if arguments.json:
        print(json.dumps({**formats.to_json(table), "unusable": table.unusable}, indent=2))
        return ExitCode.PASSED
    version = f", TensorRT {table.tensorrt_version}" if table.has_version else ""
    print(f"{arguments.table}: {table.algorithm}{version}, {counted(len(table.scales), 'tensor')}")
    rows = [
        (name, table.spelling.get(name, scale_to_hex(scale)), f"{scale:.9g}", f"{LEVELS * scale:.7g}")
        for name, scale in table.scales.items()
    ]
    print_rows(("tensor", "hex", "scale", "dynamic range"), rows)
    for line in _by_reason(table.unusable, " cannot be quantized:"):
        print(line)
    return ExitCode.PASSED


def _read_any(arguments: argparse.Namespace) -> CalibrationTable:
    """The table in any format, with the replacements for line 1; warns of what may be wrong with its ranges."""
    found = formats.scan_file(arguments.table)
    table = formats.made(
        found, arguments.table, algorithm=arguments.algorithm, tensorrt_version=arguments.tensorrt_version
    )
    for oddity in found.oddities:
        print(f"warning: {arguments.table}: {oddity}", file=sys.stderr)
    return table


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
        if name in others and not _same(scale, others[name], arguments.tolerance)
    ]
    differ = bool(changed or any(missing.values()))
    if arguments.json:
        content = {
            "headers": [header, other_header],
            "missing": missing,
            "changed": {
                name: {"scales": [_json_number(a), _json_number(b)], "ratio": _ratio(a, b)} for name, a, b in changed
            },
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
        print_rows(("tensor", "scale", "other scale", "other / this"), rows)
    both = len(scales.keys() & others.keys())
    print(f"{both - len(changed)} of {both} tensors in both tables have the same scale")
    return ExitCode.FAILED if differ else ExitCode.PASSED


def _same(scale: float, other: float, tolerance: float) -> bool:
    # NaN equals nothing, itself included, and here is as it was.
    return math.isclose(scale, other, rel_tol=tolerance) or (math.isnan(scale) and math.isnan(other))


def _json_number(scale: float) -> float | str:
    return scale if math.isfinite(scale) else scale_to_hex(scale)


def _ratio(scale: float, other: float) -> float | None:
    return other / scale if scale and math.isfinite(scale) and math.isfinite(other) else None


def _check(arguments: argparse.Namespace) -> int:
    _require_text(arguments.table)
    found = scan(read_text(arguments.table))
    findings = [problem.text(str(arguments.table)) for problem in found.found_problems()]
    table = None if findings else found.table(str(arguments.table))
    warnings = list(found.oddities)
    if found.scales:
        scales = table.scales if table else found.scales
        unusable = CalibrationTable(scales).unusable
        warnings += _by_reason(unusable, ":")
        if arguments.onnx:
            usable = {name: scale for name, scale in scales.items() if name not in unusable}
            differences, advice = _compare_with_network(scales, usable, arguments.onnx, found.algorithm)
            findings += differences
            warnings += advice
    if arguments.json:
        content = {
            "table": str(arguments.table),
            "valid": not findings,
            "header": table.header if table else None,
            "tensors": len(found.scales),
            "problems": findings,
            "warnings": warnings,
        }
        print(json.dumps(content, indent=2))
        return ExitCode.FAILED if findings else ExitCode.PASSED
    for finding in findings:
        print(finding)
    for warning in warnings:
        print(f"warning: {arguments.table}: {warning}")
    if findings or table is None:
        print(f"{arguments.table}: {counted(len(findings), 'problem')}")
        return ExitCode.FAILED
    print(f"{arguments.table}: valid, {table.header}, {counted(len(table.scales), 'tensor')}")
    return ExitCode.PASSED


def _compare_with_network(
    scales: Mapping[str, float], usable: Mapping[str, float], path: Path, algorithm: str | None
) -> tuple[list[str], list[str]]:
    """What is wrong with the names of a table for the network in ``path``, and what may be."""
    from calib.onnx.names import network_names

    network = network_names(path, algorithm)
    findings = []
    if unknown := [name for name in scales if not network.knows(name)]:
        findings.append(f"the network {path} has no {named(unknown)}")
    missing = {
        name: need
        for name, need in network.needs.items()
        if name not in usable and network.same.get(name) not in usable
    }
    for name, need in missing.items():
        if need == "required" and name not in scales:
            layers = ", ".join(network.layers[name][:_NAMED])
            findings.append(f"tensor {name!r} of the network {path} has no scale here, which keeps in float: {layers}")
    advised = [name for name, need in missing.items() if need == "advised"]
    if not advised:
        return findings, []
    layers = ", ".join(list(dict.fromkeys(layer for name in advised for layer in network.layers[name]))[:_NAMED])
    consequence = f"TensorRT may run what reads or writes them in float ({layers})"
    return findings, [f"without a scale for {named(advised)} of the network {path}, {consequence}"]


def named(names: Sequence[str]) -> str:
    """The first few names in quotes and how many more there are: ``tensor 'a'``, ``tensors 'a', 'b' and 4 more``."""
    first = ", ".join(map(repr, names[:_NAMED]))
    more = f" and {len(names) - _NAMED} more ({len(names)} in all)" if len(names) > _NAMED else ""
    return f"{'tensor' if len(names) == 1 else 'tensors'} {first}{more}"


def counted(number: int, what: str) -> str:
    """A number of things: ``1 tensor``, ``2 tensors``, ``3 batches``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}{'es' if what.endswith('ch') else 's'}"


def _by_reason(unusable: Mapping[str, str], verb: str) -> list[str]:
    """A line for each reason: the tensors that it holds for, ``verb``, and the reason."""
    names: dict[str, list[str]] = {}
    for name, reason in unusable.items():
        names.setdefault(reason, []).append(name)
    return [f"{named(found)}{verb} {reason}" for reason, found in names.items()]


def _convert(arguments: argparse.Namespace) -> int:
    table = _read_any(arguments)
    suffixes: dict[str, formats.Format] = {".json": "json", ".flatbuffers": "onnxruntime"}
    to: formats.Format = arguments.to or suffixes.get(arguments.output.suffix, "table")
    write_table(arguments.output, table, to)
    for line in _by_reason(table.unusable, " cannot be quantized:"):
        print(f"warning: {arguments.table}: {line}", file=sys.stderr)
    return ExitCode.PASSED


def _set(arguments: argparse.Namespace) -> int:
    table = _read_text_table(arguments.table)
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
    changed = table.replaced(scales)
    for name, text in given.items():
        if name in changed.unusable:
            reason = changed.unusable[name] if changed.scales[name] else "its scale rounds to 0"
            raise InputError(f"tensor {name!r}: {text} cannot be used: {reason}")
    write_table(arguments.output or arguments.table, changed, "table")
    return ExitCode.PASSED


def _remove(arguments: argparse.Namespace) -> int:
    table = _read_text_table(arguments.table)
    gone = _chosen(table.scales, arguments.names, arguments.table)
    left = set(table.scales).difference(gone)
    kept = {name: scale for name, scale in table.scales.items() if name in left}
    if not kept:
        raise InputError(f"nothing would be left in {arguments.table}: leave the table away instead")
    write_table(arguments.output or arguments.table, table.replaced(kept), "table")
    print(f"removed {named(gone)}")
    return ExitCode.PASSED


def _merge(arguments: argparse.Namespace) -> int:
    table = _read_text_table(arguments.table)
    others, _ = formats.read_scales(arguments.other)
    taken = _chosen(others, arguments.take, arguments.other)
    if not arguments.add:
        taken = [name for name in taken if name in table.scales]
        if not taken:
            raise InputError(f"{arguments.table} has none of these tensors: give --add if they shall be added")
    merged = table.replaced({**table.scales, **{name: others[name] for name in taken}})
    write_table(arguments.output or arguments.table, merged, "table")
    print(f"took {named(taken)} from {arguments.other}")
    for line in _by_reason(
        {name: why for name, why in merged.unusable.items() if name in taken}, " cannot be quantized:"
    ):
        print(f"warning: {line}", file=sys.stderr)
    return ExitCode.PASSED


def _chosen(names: Iterable[str], patterns: Sequence[str], path: Path) -> list[str]:
    """The names that patterns choose, in their order: the tensor of exactly that name, else all that match.

    Raises:
        InputError: a pattern chooses nothing.
    """
    known = dict.fromkeys(names)
    chosen: set[str] = set()
    for pattern in patterns:
        # Only * and ? are special: names of TensorRT's hold brackets.
        parts = (".*" if part == "*" else "." if part == "?" else re.escape(part) for part in pattern)
        expression = re.compile("".join(parts), re.DOTALL)
        found = [pattern] if pattern in known else [name for name in known if expression.fullmatch(name)]
        if not found:
            raise InputError(f"{path} has no tensor {pattern!r}")
        chosen.update(found)
    return [name for name in known if name in chosen]


def _read_text_table(path: Path) -> CalibrationTable:
    _require_text(path)
    return CalibrationTable.read(path)


def _require_text(path: Path) -> None:
    """Refuse other formats than TensorRT's, for tools that are about its lines."""
    found = formats.format_of(read_bytes(path))
    if found != "table":
        what = {"json": "JSON", "onnxruntime-json": "JSON", "nvdla": "JSON", "onnxruntime": "no text"}.get(found)
        raise InputError(
            f"{path} is {what or 'a list of ranges'}, and this tool takes TensorRT's text alone: "
            "python -m calib convert FILE TABLE writes it"
        )


def write_table(output: Path, table: CalibrationTable, to: formats.Format = "table", *, quiet: bool = False) -> None:
    """Write a table and say so, or be quiet on stdout.

    The side file of another table is not overwritten, and one beside it is mentioned.
    """
    if output.suffix == ".json" and output.with_suffix("").is_file():
        raise InputError(f"{output} is the name of the side file of {output.with_suffix('')}: choose another")
    left_out = formats.write(output, table, to)
    if not quiet:
        print(f"wrote {output}" + (f" ({table.header})" if to == "table" else ""))
    if left_out:
        print(f"warning: {output} holds usable ranges alone, and not {named(left_out)}", file=sys.stderr)
    beside = side_file(output)
    if to == "table" and beside.is_file():
        print(
            f"note: {beside} describes the table as it was calibrated and fits it no longer, so that quantize.py "
            "would calibrate again. To use this table, copy it elsewhere and name the copy: quantize.py --cache PATH",
            file=sys.stderr,
        )


def print_rows(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout: names left-aligned, figures right-aligned."""
    widths = [max(len(row[index]) for row in [columns, *rows]) for index in range(len(columns))]
    for row in [columns, *rows]:
        figures = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *figures]).rstrip())
