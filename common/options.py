"""The options of the three commands: those of the configuration, with short flags, and their own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from calib.algorithms import ALGORITHMS
from common.cli import Parser, config_parser
from common.config import PrecisionName
from common.errors import InputError

if TYPE_CHECKING:
    from jsonargparse import Namespace

RUN_FOLDER = Path("<artifacts>/<run>")
"""What ``--report`` without a path stands for."""

_TRAIN_ALIASES = {"--task": "model.task", "--data-dir": "data.dir", "--batch-size": "data.batch_size"}
_QUANTIZE_ALIASES = {
    "--task": "model.task",
    "--data-dir": "data.dir",
    "--algorithm": "calibration.algorithm",
    "--subset": "calibration.subset",
    "--batches": "calibration.batches",
    "--batch-size": "calibration.batch_size",
    "--skip": "calibration.skip",
    "--engine": "engine.name",
    "--quantization": "quantization.mode",
    "--quantize-output": "quantization.quantize_output",
    "--use-dla-core": "engine.dla_core",
    "--tolerance": "evaluation.tolerance",
    "--agreement": "evaluation.agreement",
    "--relative-error": "evaluation.relative_error",
    "--cosine": "evaluation.cosine",
    "--sqnr": "evaluation.sqnr",
}
_EVALUATE_ALIASES = {
    "--task": "model.task",
    "--data-dir": "data.dir",
    "--split": "evaluation.split",
    "--batch-size": "evaluation.batch_size",
    "--start": "evaluation.start",
    "--batches": "evaluation.batches",
    "--tolerance": "evaluation.tolerance",
    "--agreement": "evaluation.agreement",
    "--relative-error": "evaluation.relative_error",
    "--cosine": "evaluation.cosine",
    "--sqnr": "evaluation.sqnr",
    "--precisions": "evaluation.precisions",
    "--latency-batch-sizes": "evaluation.latency_batch_sizes",
    "--engine": "engine.name",
    "--threads": "engine.threads",
    "--use-dla-core": "engine.dla_core",
}


def train_parser() -> Parser:
    """The options of ``train.py``."""
    result = config_parser("train.py", "Train a network and write its checkpoint.", _TRAIN_ALIASES)
    result.add_argument("--epochs", type=int | None, help="short for --trainer.max_epochs")
    result.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    result.add_argument("--json", action="store_true", help="print JSON alone on stdout")
    return result


def quantize_parser() -> Parser:
    """The options of ``quantize.py``."""
    result = config_parser("quantize.py", "Calibrate a trained network and prepare a precision.", _QUANTIZE_ALIASES)
    result.add_argument(
        "--precision", type=PrecisionName, default="int8", help="precision to prepare for the engine that runs here"
    )
    result.add_argument("--cache", type=Path | None, help="calibration table to use or make, instead of the run's own")
    result.add_argument("--recalibrate", action="store_true", help="calibrate even if the cached table serves")
    result.add_argument("--keep-fp", type=str | None, help="layers to keep in float, as in conv1,ip2")
    result.add_argument(
        "--auto-mixed",
        action="store_true",
        help="keep the fewest layers in float that bring INT8 within --tolerance and --agreement (validation images)",
    )
    result.add_argument(
        "--export", type=Literal["onnx"] | None, help="write the FP32 and the Q/DQ INT8 network as ONNX"
    )
    result.add_argument(
        "--any-size", action="store_true", help="with --export: leave height and width of the images free in the files"
    )
    result.add_argument(
        "--compare-algorithms",
        nargs="?",
        const=",".join(ALGORITHMS),
        type=str | None,
        help="study: accuracy and scales of each algorithm, as in entropy2,minmax (default: all); the run is unchanged",
    )
    result.add_argument(
        "--sweep-images",
        type=str | None,
        help="study: accuracy and spread of the scales with so many images, as in 50,100,500; the run is unchanged",
    )
    result.add_argument("--sweep-seeds", type=int, default=3, help="calibrations for each number of images")
    result.add_argument("--json", action="store_true", help="print JSON alone on stdout")
    return result


def check_quantize(flags: Namespace) -> None:
    """Refuse options of ``quantize.py`` that go with another one. Raises InputError."""
    if flags.any_size and not flags.export:
        raise InputError("--any-size goes with --export onnx")
    if flags.auto_mixed and flags.precision != "int8":
        raise InputError("--auto-mixed goes with --precision int8")


def evaluate_parser() -> Parser:
    """The options of ``evaluate.py``."""
    result = config_parser("evaluate.py", "Compare FP32, FP16 and INT8 on the same images.", _EVALUATE_ALIASES)
    result.add_argument(
        "--report",
        nargs="?",
        type=Path,
        const=RUN_FOLDER,
        metavar="PATH",
        help="write report.json, report.md and report.html into the run's folder, or into PATH",
    )
    result.add_argument("--json", action="store_true", help="print the report as JSON alone on stdout")
    result.add_argument("--no-analysis", action="store_true", help="leave the per-layer analysis out of the report")
    result.add_argument("--cache", type=Path | None, help="calibration table to use instead of the run's own")
    return result
