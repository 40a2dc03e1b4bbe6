"""The README's hardware table: ``python -m benchmarks.hardware``, on a machine with an NVIDIA GPU and TensorRT.

For each configuration the three commands run as a user starts them: training, calibration by DataLoaderCalibrator
beside the reference, and FP32, FP16 and INT8 engines compared; then ``evaluate.py`` once more, which must build
nothing. Latency is that of the engine replayed as a CUDA graph, with the call through Torch-TensorRT in brackets.
Nothing else should run on the machine. ``--files`` asks and times the ONNX files with explicit quantization, too
(:mod:`benchmarks.onnx_in_tensorrt`).

    python -m benchmarks.hardware --epochs 3
    python -m benchmarks.hardware --configs configs/resnet18_imagefolder.yaml --data-dir /data/parts
    python -m benchmarks.hardware --configs configs/resnet18_imagefolder.yaml --digits
    python -m benchmarks.hardware --configs --files

Options that it does not know go to all three commands.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.process import run_process
from common.cli import ROOT, config_parser, parse
from common.command import run_command
from common.console import start_logging
from common.errors import ExitCode, InputError
from common.files import write_json, write_text
from evaluation.measures import Latency, Row
from evaluation.results import Report, read_report
from evaluation.text import milliseconds, percent, points, size

if TYPE_CHECKING:
    from benchmarks.onnx_in_tensorrt import Answer, Race
    from data import Splits

logger = logging.getLogger("benchmarks")

CONFIGS = ("configs/lenet_mnist.yaml", "configs/small_resnet_mnist.yaml")
TENSORRT = ("--engine", "torch-tensorrt")


@dataclass(frozen=True)
class MeasuredRun:
    """What the commands found with one configuration.

    Attributes:
        config: The file.
        seconds: Command -> seconds that it took; ``evaluate again`` is the second run.
        prepared: What ``quantize.py --json`` printed.
        report: Of ``evaluate.py``.
        rebuilt: Engines that the second run of ``evaluate.py`` built.
    """

    config: str
    seconds: dict[str, float]
    prepared: dict[str, Any]
    report: Report
    rebuilt: int


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.hardware",
        description="Run the three commands with TensorRT and print the hardware table.",
        epilog="Other options go to all three commands.",
        allow_abbrev=False,
    )
    result.add_argument("--configs", nargs="*", default=list(CONFIGS), help="configurations of the runs")
    result.add_argument("--digits", action="store_true", help="as --data-dir a folder of MNIST's digits as images")
    result.add_argument("--files", nargs="*", metavar="NETWORK", help="ask and time the ONNX files of these, or of all")
    result.add_argument("--seconds", type=float, default=5, help="of training, for each network of --files")
    result.add_argument("--builds", type=int, default=2, help="engines of each kind that --files times")
    result.add_argument("--epochs", type=int, help="epochs of training; the configuration's if not given")
    result.add_argument("--artifacts", type=Path, default=Path("artifacts/hardware"), help="folder of the runs")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options, others = parser().parse_known_args(argv)
    start_logging()
    if options.digits:
        others += ["--data-dir", str(digit_folder(options.artifacts.absolute() / "digits", _mnist()))]
    found = []
    for config in options.configs:
        found.append(measure(config, options.artifacts.absolute(), options.epochs, others))
        write_json(options.artifacts / "hardware.json", [_plain(one) for one in found])
    page = markdown(found) if found else ""
    if options.files is not None:
        page += files(options.files, options.seconds, options.builds)
    write_text(options.artifacts / "hardware.md", page)
    print(page)
    return ExitCode.PASSED


def measure(config: str, artifacts: Path, epochs: int | None, others: Sequence[str]) -> MeasuredRun:
    """Run the three commands with one configuration.

    Args:
        config: Its file, relative to the checkout.
        artifacts: Folder of the runs.
        epochs: Of training; None for the configuration's.
        others: Further arguments of all three commands.

    Raises:
        InputError: a command failed.
    """
    arguments = ["--config", config, "--artifacts", str(artifacts), *others]
    trained = [] if epochs is None else ["--trainer.max_epochs", str(epochs)]
    seconds: dict[str, float] = {}

    def command(name: str, program: str, *further: str) -> tuple[str, str]:
        logger.info("%s: %s", config, name)
        begin = time.perf_counter()
        line = [sys.executable, str(ROOT / program), *arguments, *further]
        done = run_process(name, line, codes=(ExitCode.PASSED, ExitCode.FAILED))
        seconds[name] = time.perf_counter() - begin
        return done.stdout, done.stderr

    command("train", "train.py", *trained)
    prepared = json.loads(command("quantize", "quantize.py", *TENSORRT, "--precision", "int8", "--json")[0])
    folder = artifacts / prepared["run"]
    command("evaluate", "evaluate.py", *TENSORRT, "--no-analysis", "--report", str(folder / "report"))
    _, log = command("evaluate again", "evaluate.py", *TENSORRT, "--no-analysis", "--json")
    rebuilt = sum(line.startswith("building ") for line in log.splitlines())
    return MeasuredRun(config, seconds, prepared, read_report(folder / "report" / "report.json"), rebuilt)


def markdown(found: Sequence[MeasuredRun]) -> str:
    """What was measured, as the README and docs/hardware.md show it."""
    return "\n\n".join([_machine(found[0].report), *(part for one in found for part in _section(one))]) + "\n"


def digit_folder(folder: Path, splits: Splits, train: int = 120, test: int = 40) -> Path:
    """Make a folder of images for ``imagefolder``, and return it: MNIST's digits as PNG files of 224 x 224 pixels.

    Args:
        folder: Gets the images.
        splits: MNIST.
        train: How many of each digit it gets from the training file, the first there.
        test: Likewise from the test file.
    """
    from PIL import Image

    for part, images, count in (("train", splits.train_file, train), ("test", splits.test, test)):
        for digit in range(10):
            place = folder / part / str(digit)
            place.mkdir(parents=True, exist_ok=True)
            found = (images.labels == digit).nonzero()[:count, 0]
            for number, pixels in enumerate((255 * images.images(found)).round().byte().numpy()):
                image = Image.fromarray(pixels[0]).resize((224, 224), Image.Resampling.BILINEAR)
                image.convert("RGB").save(place / f"{number}.png")
    return folder


def _mnist() -> Splits:
    """MNIST, where MNIST_DIR or the user's cache folder has it."""
    from data import open_splits

    config = parse(config_parser("benchmarks", "", {}), ["--config", str(ROOT / CONFIGS[0])])[0]
    return open_splits(config.data, config.seed)


def files(names: Sequence[str], seconds: float, builds: int) -> str:
    """Ask and time the ONNX files with explicit quantization in TensorRT; the tables.

    Args:
        names: Of networks to ask; none for all.
        seconds: Of training, for each.
        builds: Engines of each kind that are timed.

    Raises:
        InputError: there is no GPU with TensorRT, or no such network.
    """
    from benchmarks.bare_tensorrt import TensorRT
    from benchmarks.onnx_in_tensorrt import NETWORKS, answers, races
    from engines.tensorrt.support import usable

    if unknown := set(names) - NETWORKS.keys():
        raise InputError(f"unknown network {min(unknown)}: take some of {', '.join(NETWORKS)}")
    usable(0)
    answered, timed = [], []
    for one in answers(names or list(NETWORKS), _mnist(), seconds, TensorRT().build):
        logger.info("%s", one)
        answered.append(one)
    for race in races((1, 32, 256), builds):
        logger.info("%s", race)
        timed.append(race)
    return f"\n{answer_table(answered)}\n\n{race_table(timed)}\n"


def answer_table(found: Sequence[Answer | str]) -> str:
    """What the engines answered, and the lines of what failed behind it."""
    columns = (
        *("network", "built in", "engine's layers", "classes as simulated", "mean difference of a score"),
        *("the same, FP32 to INT8", "FP32 and INT8 agree", "top-1, FP32", "top-1, INT8"),
    )
    rows = [
        (
            *(one.network, f"{one.built:.1f} s", str(one.layers), f"{one.agrees:.1f} %", f"{one.off:.2g}"),
            *(f"{one.moved:.2g}", f"{one.agrees_with_fp32:.1f} %", f"{one.fp32:.1f} %", f"{one.top1:.1f} %"),
        )
        for one in found
        if not isinstance(one, str)
    ]
    return "\n".join([table(columns, rows), *(f"\n- {one}" for one in found if isinstance(one, str))])


def race_table(found: Sequence[Race]) -> str:
    """Median ms of the builds, of each build in brackets."""
    columns = ("", "FP32 without TF32", "implicit INT8", "`*_int8.onnx`", "file to implicit")

    def cell(builds: Sequence[float]) -> str:
        return f"{statistics.median(builds):.4f} ({' '.join(f'{time:.4f}' for time in builds)})"

    return table(
        columns,
        [
            (f"{one.network}, batch {one.batch}", *map(cell, one.milliseconds.values()), f"{one.ratio:.2f}")
            for one in found
        ],
    )


def _machine(report: Report) -> str:
    here = report.environment
    versions = {**here.versions, "TensorRT": next((row.details["TensorRT"] for row in _tensorrt(report)), "none")}
    rows = [
        ("GPU", f"{here.gpu}, driver {here.gpu_details.get('driver_version', 'unknown')}"),
        ("host", f"{here.processor}, {here.cores} cores"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
    return table(("", ""), rows)


def _section(one: MeasuredRun) -> list[str]:
    report, row = one.report, {row.precision: row for row in one.report.rows if row.role != "baseline"}
    title = f"{report.model.name} on {report.data.title}"
    sizes = sorted({entry.batch_size for item in row.values() for entry in item.latency})
    columns = (title, "top-1", "points", "engine", *(f"batch {batch}" for batch in sizes))
    lines = [_line(item, sizes) for item in row.values()]
    return [table(columns, lines), "\n".join(f"- {sentence}" for sentence in _facts(one))]


def _line(row: Row, sizes: Iterable[int]) -> tuple[str, ...]:
    name = row.precision.upper()
    if row.accuracy is None:
        return (name, f"skipped: {row.skipped}", "", "", *("" for _ in sizes))
    latency = {entry.batch_size: entry for entry in row.latency}
    lost = "" if row.paired is None else points(row.paired.top1_points)
    cells = [_latency(latency[batch]) if batch in latency else "" for batch in sizes]
    return (name, f"{percent(row.accuracy.top1)} %", lost, size(row.size), *cells)


def _latency(entry: Latency) -> str:
    """Median milliseconds; in brackets those of the call."""
    call = entry.without_graph
    graph = milliseconds(entry.compute.median)
    return graph if call is None else f"{graph} ({milliseconds(call.median)})"


def _facts(one: MeasuredRun) -> list[str]:
    calibration, tensorrt = one.prepared.get("calibration"), one.prepared.get("tensorrt")
    facts = [f"Verdict: {'PASSED' if one.report.verdict.passed else 'FAILED'}."]
    facts += [f"{row.precision.upper()}: TF32 {row.details['TF32']}." for row in _tensorrt(one.report)[:1]]
    if calibration is not None:
        took = sum(calibration["batch_seconds"]) + calibration["post_seconds"]
        facts.append(f"The reference calibration of {calibration['images']} images took {took:.3g} s.")
    if tensorrt is not None:
        paired = [pair for pair in tensorrt["tensors"] if pair["ratio"] is not None]
        equal = sum(abs(pair["ratio"] - 1) < 1e-6 for pair in paired)
        named = sum(pair["reference"] is not None for pair in tensorrt["tensors"])
        facts.append(
            f"TensorRT's own took {tensorrt['seconds']:.3g} s, its engine included. Of {named} tensors, "
            f"{len(paired)} have a counterpart in its table, {equal} of them with our scale to within 1e-6."
        )
    facts.append(
        f"Building took {one.report.seconds['compile']:.3g} s in evaluate.py; a second run built {one.rebuilt} engines."
    )
    facts.append("Commands: " + ", ".join(f"{name} {took:.3g} s" for name, took in one.seconds.items()) + ".")
    return facts


def _tensorrt(report: Report) -> list[Row]:
    return [row for row in report.rows if "TensorRT" in row.details]


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _plain(one: MeasuredRun) -> dict[str, Any]:
    return {
        "config": one.config,
        "seconds": one.seconds,
        "prepared": one.prepared,
        "report": f"{one.report.run}/report/report.json",
        "rebuilt": one.rebuilt,
    }


if __name__ == "__main__":
    run_command(main)
