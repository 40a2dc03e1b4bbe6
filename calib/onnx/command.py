"""``python -m calib calibrate``: the table of an ONNX network, without TensorRT."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib.algorithms import ALGORITHMS, DEFAULT, OPTIONS
from calib.onnx.write import refuse_own_input, write_model
from calib.table import TESTED_TENSORRT
from calib.table.tools import counted, named, write_table
from common.errors import ExitCode, InputError
from common.files import check_writable

if TYPE_CHECKING:
    import onnx

    from calib.onnx.calibrate import OnnxCalibration
    from calib.onnx.source import Batches, Pixels
    from calib.table import CalibrationTable

_PROGRESS_SECONDS = 2.0


def add_parser(commands: Any) -> None:
    """Add ``calibrate`` to argparse's subparsers; it sets ``run``."""
    text = "make the calibration table of an ONNX network from images, in ONNX Runtime"
    parser: argparse.ArgumentParser = commands.add_parser("calibrate", help=text, description=text)
    parser.set_defaults(run=_calibrate)
    parser.add_argument("model", type=Path, metavar="MODEL.onnx", help="the float network, as TensorRT shall read it")
    parser.add_argument(
        "--images",
        type=Path,
        required=True,
        metavar="SOURCE",
        help="folder of images; .npy file, float32 [N, ...] or [batches, N, ...]; or .npz file with an array for each "
        "input of the network",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="TABLE", help="table to write")
    parser.add_argument(
        "--qdq",
        type=Path,
        metavar="MODEL_int8.onnx",
        help="also write the network with quantize/dequantize pairs at the table's scales and int8 weights, and "
        "compare its outputs with the float network's",
    )
    parser.add_argument(
        "--algorithm", choices=tuple(ALGORITHMS), default=DEFAULT, help=f"default: {DEFAULT}, which trtexec takes"
    )
    for name, algorithm in ALGORITHMS.items():
        for option in algorithm.options:
            parser.add_argument(
                f"--{option.name}",
                type=float,
                default=option.default,
                metavar=option.name[0].upper(),
                help=f"of {name} (default: {option.default:g})",
            )
    parser.add_argument(
        "--tensorrt-version", default=TESTED_TENSORRT, metavar="VERSION", help=f"of line 1 (default: {TESTED_TENSORRT})"
    )
    parser.add_argument(
        "--batch-size",
        type=_positive,
        metavar="N",
        help="images of a batch (default: that of the file or the network, else 16); the first batch sets the range of "
        "the histograms, as in TensorRT",
    )
    parser.add_argument("--batches", type=_positive, metavar="N", help="at most so many batches (default: all)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    images = parser.add_argument_group("how images become the network's input: (pixel * scale - mean) / std")
    images.add_argument(
        "--size", type=_positive, nargs="+", metavar="N", help="height and width, or one number for both"
    )
    images.add_argument("--mean", type=float, nargs="+", default=[0.0], metavar="M", help="default: 0")
    images.add_argument("--std", type=float, nargs="+", default=[1.0], metavar="S", help="default: 1")
    images.add_argument("--scale", type=float, default=1 / 255, metavar="S", help="default: 1/255")
    images.add_argument("--channels", choices=("rgb", "bgr", "gray"), help="default: rgb, or gray for one channel")
    images.add_argument(
        "--fit",
        choices=("crop", "letterbox", "stretch"),
        default="crop",
        help="crop: resize the shorter side and cut out the centre (classifiers; the default); letterbox: resize the "
        "longer side and fill (detectors); stretch: resize both",
    )
    images.add_argument("--resize", type=_positive, metavar="N", help="shorter side before the cut, such as 256")
    images.add_argument("--fill", type=int, default=114, metavar="PIXEL", help="of a letterbox (default: 114)")


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not 0 < int(text) <= 1_000_000:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 up, not {text!r}")
    return int(text)


def _calibrate(arguments: argparse.Namespace) -> int:
    from calib.onnx.calibrate import calibrate_onnx
    from calib.onnx.model import network_inputs, read_float_model, subgraph_nodes
    from calib.onnx.rules import entries
    from calib.onnx.source import open_source
    from calib.table import CalibrationTable

    path = arguments.model
    refuse_own_input([arguments.output, arguments.qdq], [path, arguments.images])
    # A wrong version is told before the work, not after it.
    CalibrationTable({"data": 1.0}, arguments.algorithm, arguments.tensorrt_version)
    model = read_float_model(path)
    batches = open_source(
        arguments.images, network_inputs(model), _pixels(arguments), arguments.batch_size, arguments.batches
    )
    for output in filter(None, (arguments.output, arguments.qdq)):
        check_writable(output.parent, output.name)
    found, observed = entries(model, arguments.algorithm, path.parent)
    calibration = calibrate_onnx(
        path,
        observed,
        found,
        batches,
        arguments.algorithm,
        tensorrt_version=arguments.tensorrt_version,
        options=_options(arguments),
        progress=_Progress(len(batches)),
    )
    table = calibration.table
    inner = [node.name or node.op_type for node in subgraph_nodes(model)]
    for line in _warnings(calibration, inner, batches.left_over):
        print(f"warning: {line}", file=sys.stderr)
    # The table first: it is whole, whatever becomes of the other file.
    write_table(arguments.output, table, quiet=arguments.json)
    quantized = _write_quantized(arguments, model, table, batches) if arguments.qdq else None
    if not arguments.json:
        print(
            f"{counted(len(table.scales), 'tensor')}, {counted(calibration.images, 'image')} in "
            f"{counted(calibration.batches, 'batch')}, "
            f"{calibration.seconds:.1f} s with {calibration.provider}"
        )
        if quantized is not None:
            _print_quantized(arguments.qdq, quantized)
        return ExitCode.PASSED
    summary = {"table": str(arguments.output), **_summary(calibration), "subgraphs": inner}
    if quantized is not None:
        summary["qdq"] = {"path": str(arguments.qdq), **quantized}
    print(json.dumps(summary, indent=2))
    return ExitCode.PASSED


def _summary(calibration: OnnxCalibration) -> dict[str, Any]:
    """A calibration as JSON values."""
    return {
        "header": calibration.table.header,
        "algorithm": calibration.table.algorithm,
        "images": calibration.images,
        "batches": calibration.batches,
        "seconds": calibration.seconds,
        "provider": calibration.provider,
        "scales": calibration.table.finite,
        "zero": list(calibration.zero),
        "infinite": list(calibration.infinite),
        "unnamed": list(calibration.unnamed),
        "clipped": dict(calibration.clipped),
    }


def _write_quantized(
    arguments: argparse.Namespace, model: onnx.ModelProto, table: CalibrationTable, batches: Batches
) -> dict[str, Any]:
    """Write the network with explicit quantization; what it holds and how its outputs compare, as JSON values."""
    from calib.onnx.macs import count_macs
    from calib.onnx.model import network_inputs
    from calib.onnx.observe import compare_outputs
    from calib.onnx.qdq import quantize

    made = quantize(model, table, arguments.model)
    # It is run before it is written: a file that does not run is of no use.
    sqnr = compare_outputs(arguments.model, model, made.model, batches)
    write_model(arguments.qdq, made.model, arguments.model)
    images = next((item.batch for item in network_inputs(model) if item.batch), 1)
    shapes = {name: array.shape for name, array in batches.load(0, images).items()}
    found: dict[str, Any] = {}
    try:
        macs = count_macs(made.model, str(arguments.qdq), shapes=shapes).for_one_of(images)
    except InputError as error:
        print(f"warning: multiply-accumulates are not counted: {error}", file=sys.stderr)
    else:
        if warning := macs.warning():
            print(f"warning: {warning}", file=sys.stderr)
        found = {"macs": {"total": macs.total, "int8": macs.int8}, "summary": macs.summary()}
    compared = {name: decibels for name, decibels in sqnr.items() if decibels is None or math.isfinite(decibels)}
    return {
        "sqnr_db": compared,
        "not_compared": [name for name in sqnr if name not in compared],
        "int8": dict(made.int8),
        "float": dict(made.floats),
        "missing": dict(made.missing),
        **found,
    }


def _print_quantized(path: Path, quantized: dict[str, Any]) -> None:
    print(f"wrote {path}")
    if not quantized["sqnr_db"] and not quantized["not_compared"]:
        print("SQNR: the network has no output of floats")
    for name, decibels in quantized["sqnr_db"].items():
        print(f"SQNR of {name}: " + ("no error" if decibels is None else f"{decibels:.1f} dB"))
    for name in quantized["not_compared"]:
        print(f"SQNR of {name}: not compared, since it has no values or, once quantized, another number of them")
    for kind, what in (("int8", "in INT8"), ("float", "in float")):
        counts = ", ".join(f"{count} {operator}" for operator, count in quantized[kind].items()) or "none"
        print(f"operators {what}: {counts}")
    if "summary" in quantized:
        print(quantized["summary"])
    for layer, tensor in list(quantized["missing"].items())[:5]:
        print(f"{layer} stays in float: no usable scale for {tensor!r}")


def _options(arguments: argparse.Namespace) -> dict[str, float]:
    """The parameters of the algorithm, checked."""
    for name, option in OPTIONS.items():
        if not option.allows(getattr(arguments, name)):
            raise InputError(f"--{name} must lie in {option.range}, and is {getattr(arguments, name):g}")
    return {option.name: getattr(arguments, option.name) for option in ALGORITHMS[arguments.algorithm].options}


def _pixels(arguments: argparse.Namespace) -> Pixels:
    from calib.onnx.source import Pixels

    size = arguments.size
    if size is not None and len(size) > 2:
        raise InputError(f"--size takes height and width, not {len(size)} numbers")
    numbers = [*arguments.mean, *arguments.std, arguments.scale]
    if not all(map(math.isfinite, numbers)) or 0 in arguments.std or arguments.scale == 0:
        raise InputError("--mean, --std and --scale take finite numbers, and --std and --scale none that is 0")
    if not 0 <= arguments.fill <= 255:
        raise InputError(f"--fill takes a pixel from 0 to 255, not {arguments.fill}")
    return Pixels(
        size=(size[0], size[-1]) if size else None,
        mean=tuple(arguments.mean),
        std=tuple(arguments.std),
        scale=arguments.scale,
        channels=arguments.channels,
        resize=arguments.resize,
        fit=arguments.fit,
        fill=arguments.fill,
    )


def _warnings(calibration: OnnxCalibration, subgraphs: list[str], left_over: int) -> list[str]:
    from calib.onnx.session import has_cuda

    lines = []
    if has_cuda() and not calibration.provider.startswith("CUDA"):
        lines.append(
            "ONNX Runtime's CUDA provider does not start here (no GPU, or a library is missing): the CPU computed"
        )
    if left_over:
        images = "image is" if left_over == 1 else f"{left_over} images are"
        lines.append(f"the last {images} left out: they do not fill the batch that the network takes")
    if subgraphs:
        lines.append(f"what If, Loop and Scan hold stays in float: {', '.join(subgraphs[:5])}")
    if calibration.zero:
        lines.append(f"no usable range, all values were zero: {named(calibration.zero)}")
    if calibration.unnamed:
        lines.append(f"no entry, since the table cannot hold such a name: {named(calibration.unnamed)}")
    if calibration.clipped:
        shares = [f"{share:.1%} of {name!r}" for name, share in calibration.clipped.items()]
        more = f" and {len(shares) - 5} more" if len(shares) > 5 else ""
        lines.append(
            f"{calibration.table.algorithm} clips {', '.join(shares[:5])}{more}: INT8 may lose accuracy; take these "
            "entries from another algorithm's table (python -m calib merge)"
        )
    if calibration.infinite:
        lines.append(f"no entry, since values were infinite: {named(calibration.infinite)}")
    return lines


class _Progress:
    """Says on stderr how far calibration is, every few seconds."""

    def __init__(self, batches: int) -> None:
        self._batches = batches
        self._next = time.monotonic() + _PROGRESS_SECONDS

    def __call__(self, done: int, seconds: float) -> None:
        """One batch is done, in ``seconds``."""
        if time.monotonic() >= self._next:
            print(f"batch {done} of {self._batches}, {seconds:.2f} s each", file=sys.stderr)
            self._next = time.monotonic() + _PROGRESS_SECONDS
