"""``python -m calib from-qdq``: the table of an ONNX network that holds quantize/dequantize pairs."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from calib.algorithms import ALGORITHMS, DEFAULT
from calib.onnx.write import refuse_own_input, write_model
from calib.table import TESTED_TENSORRT
from calib.table.tools import counted, named, write_table
from common.errors import ExitCode


def add_parser(commands: Any) -> None:
    """Add ``from-qdq`` to argparse's subparsers; it sets ``run``."""
    text = "the calibration table of an ONNX network with quantize/dequantize pairs, for DLA and older TensorRT"
    parser: argparse.ArgumentParser = commands.add_parser("from-qdq", help=text, description=text)
    parser.set_defaults(run=_from_qdq)
    parser.add_argument("model", type=Path, metavar="MODEL_qat.onnx", help="trained with quantization, or quantized")
    parser.add_argument("--output", type=Path, required=True, metavar="TABLE", help="table to write")
    parser.add_argument(
        "--onnx",
        type=Path,
        metavar="FILE",
        help="also write the float network that the table goes with: without the pairs, weights as they were rounded",
    )
    parser.add_argument(
        "--algorithm", choices=tuple(ALGORITHMS), default=DEFAULT, help=f"of line 1 (default: {DEFAULT})"
    )
    parser.add_argument(
        "--tensorrt-version", default=TESTED_TENSORRT, metavar="VERSION", help=f"of line 1 (default: {TESTED_TENSORRT})"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _from_qdq(arguments: argparse.Namespace) -> int:
    from calib.onnx.from_qdq import table_of_quantized
    from calib.onnx.model import read_model
    from calib.table import CalibrationTable

    refuse_own_input([arguments.output, arguments.onnx], [arguments.model])
    found = table_of_quantized(read_model(arguments.model), arguments.model)
    table = CalibrationTable(found.scales, arguments.algorithm, arguments.tensorrt_version)
    if arguments.onnx:
        write_model(arguments.onnx, found.model, arguments.model)
    if found.asymmetric:
        print(f"warning: a symmetric range that covers the asymmetric one: {named(found.asymmetric)}", file=sys.stderr)
    for name, reason in table.unusable.items():
        print(f"warning: tensor {name!r} cannot be quantized: {reason}", file=sys.stderr)
    write_table(arguments.output, table, quiet=arguments.json)
    if arguments.json:
        summary = {
            "table": str(arguments.output),
            "header": table.header,
            "algorithm": table.algorithm,
            "scales": table.finite,
            "asymmetric": list(found.asymmetric),
            "unusable": table.unusable,
            "unknown": list(found.unknown),
            "onnx": str(arguments.onnx) if arguments.onnx else None,
        }
        print(json.dumps(summary, indent=2))
        return ExitCode.PASSED
    if arguments.onnx:
        print(f"wrote {arguments.onnx}")
    print(counted(len(table.scales), "tensor"))
    if found.unknown:
        print(f"no scale, since no pair says one: {named(found.unknown)}")
    return ExitCode.PASSED
