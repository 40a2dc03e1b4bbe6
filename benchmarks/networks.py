"""Other networks through the three commands: accuracy of a residual one, time and memory of two from torchvision."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from benchmarks.process import run_process
from benchmarks.results import Entry, Findings, Table, Target
from benchmarks.setting import SHORT, Setting, top1
from calib.table import CalibrationTable
from calib.tracing import trace
from common.cli import ROOT, config_parser, parse
from common.run import Run
from engines.base import EngineError
from engines.select import make_engine
from models.checkpoint import load_checkpoint
from models.reopen import reopen_data

FOLDERS = {"ResNet-18": "resnet18_imagefolder", "MobileNetV3-small": "mobilenet_v3_small_imagefolder"}
RESIDUAL = "small_resnet_mnist"
CLASSES, TRAIN, TEST = 10, 60, 10
"""Of the synthetic image folder: classes, images of each for training and for the test."""

METHOD = (
    "Each command once, as a process of its own, in its shipped configuration but for one epoch of training from "
    "random weights, after which accuracy means nothing, and a tolerance that lets it pass. The image folder is "
    f"synthetic: {CLASSES} classes of {TRAIN} training and {TEST} test images of 320 x 256 pixels, as JPEG. Peak "
    "memory is the largest resident set of the process, PyTorch's libraries included. The small residual network is "
    "trained in full."
)


@dataclass(frozen=True)
class Ran:
    """A command that was run: seconds, peak memory in MiB, and what it printed."""

    seconds: float
    peak: float
    stdout: str


def run(setting: Setting) -> Findings:
    """See the module."""
    with tempfile.TemporaryDirectory() as folder:
        images = _image_folder(Path(folder, "images"), setting)
        entries = []
        for title, name in list(FOLDERS.items())[: 1 if setting.quick else None]:
            arguments = _arguments(name, Path(folder), "--data-dir", str(images))
            train = ["--epochs", "1"]
            evaluate = ["--tolerance", "100", "--agreement", "0"]
            if setting.quick:
                arguments += ["--data.batch_size=16", "--data.image_size=64", "--data.resize=72"]
                arguments += ["--calibration.batches=1"]
                evaluate += [*SHORT, "--latency-batch-sizes", "[1]"]
            entries += _commands(title, arguments, train, evaluate)
        costs = Table("the three commands on 224 x 224 images", "", entries)
    residual, targets, skipped = _residual(setting)
    return Findings(METHOD, [costs, residual], targets, skipped)


def _arguments(name: str, artifacts: Path, *more: str) -> list[str]:
    return ["--config", str(ROOT / "configs" / f"{name}.yaml"), "--artifacts", str(artifacts.absolute()), *more]


def _image_folder(folder: Path, setting: Setting) -> Path:
    """Smooth images: noise of 16 x 20 pixels, enlarged, brighter from class to class."""
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", setting.images(TRAIN)), ("test", setting.images(TEST))):
        for label in range(CLASSES):
            place = folder / part / f"class{label}"
            place.mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(0, 160, (16, 20, 3), generator=generator) + 9 * label
                image = Image.fromarray(pixels.byte().numpy()).resize((320, 256), Image.Resampling.BILINEAR)
                image.save(place / f"{number}.jpg")
    return folder


def _commands(title: str, arguments: Sequence[str], train: Sequence[str], evaluate: Sequence[str]) -> list[Entry]:
    """Run the three commands; an entry for each."""
    commands = {
        "train.py": ["train.py", *arguments, *train],
        "quantize.py": ["quantize.py", *arguments, "--precision", "int8", "--export", "onnx"],
        "evaluate.py --report": ["evaluate.py", *arguments, *evaluate, "--report", "--json"],
    }
    entries = []
    for name, line in commands.items():
        ran = measured(line, codes=(0, 1) if name.startswith("evaluate") else (0,))
        figures: dict[str, Any] = {"s": round(ran.seconds, 1), "peak memory, MiB": round(ran.peak)}
        if name.startswith("evaluate"):
            rows = json.loads(ran.stdout)["rows"]
            figures |= {"through": ", ".join(dict.fromkeys(f"{row['precision']} {row['engine']}" for row in rows))}
        entries.append(Entry(f"{title}: {name}", figures=figures))
    return entries


def measured(line: Sequence[str], codes: Sequence[int] = (0,)) -> Ran:
    """Run a command of this project and wait for it.

    Args:
        line: The script and its arguments.
        codes: Exit codes that are no failure.

    Raises:
        InputError: another exit code; the message ends with the last line on its stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder, "figures.json")
        launcher = [sys.executable, "-S", str(ROOT / "benchmarks" / "peak.py"), str(figures), sys.executable]
        done = run_process(line[0], [*launcher, *line], codes)
        return Ran(**json.loads(figures.read_text(encoding="ascii")), stdout=done.stdout)


def _residual(setting: Setting) -> tuple[Table, list[Target], dict[str, str]]:
    """The small residual network: trained, calibrated, and evaluated by both engines that need no GPU."""
    arguments = _arguments(RESIDUAL, setting.artifacts, "--run", f"{setting.run.name}-residual")
    if setting.quick:
        arguments += ["--data.dataset", "digits", "--trainer.max_epochs", "1"]
    train = measured(["train.py", *arguments])
    quantize = measured(["quantize.py", *arguments, "--precision", "int8", "--recalibrate"])
    config = parse(config_parser("benchmarks", "", {}), arguments)[0]
    run = Run(config.run, config.artifacts)
    checkpoint = load_checkpoint(run.checkpoint)
    network = trace(checkpoint.network, checkpoint.meta.network, checkpoint.meta.dataset.preprocessing.shape)
    table = CalibrationTable.read(run.table(network.name))
    test = reopen_data(checkpoint.meta, config.data).test
    images = test.images(slice(0, len(test)))
    right: dict[str, float] = {}
    classes: dict[str, Tensor] = {}
    skipped: dict[str, str] = {}
    for name in ("torch", "onnxruntime"):
        engine = make_engine(name, config.engine, config.quantization, run.folder)
        for precision in ("fp32", "int8"):
            try:
                compiled = engine.compile(network, precision, table)
            except EngineError as error:
                skipped[f"{precision}, {name}"] = str(error)
                continue
            found = torch.cat([compiled(part) for part in images.split(500)])
            classes[f"{precision}, {name}"] = found.argmax(1)
            right[f"{precision}, {name}"] = top1(lambda part: part, found, test.labels)
    agree = None
    if "int8, onnxruntime" in classes:
        agree = 100 * float((classes["int8, torch"] == classes["int8, onnxruntime"]).float().mean())
    reference = "fp32, torch"
    entries = [
        Entry(name, figures={"top-1, %": share, "to FP32, points": round(share - right[reference], 4)})
        for name, share in right.items()
    ]
    costs = ", ".join(
        f"{name} took {ran.seconds:.1f} s and {ran.peak:.0f} MiB"
        for name, ran in (("train.py", train), ("quantize.py", quantize))
    )
    notes = [f"{costs}. INT8, torch is the exact integer simulation."]
    lost = max(right[reference] - share for name, share in right.items() if name.startswith("int8"))
    targets = [
        Target("small residual network on MNIST: FP32 top-1", "at least", 99.4, "%", right[reference]),
        Target("small residual network: what INT8 loses in the worse engine", "at most", 0.15, "points", lost),
        Target("small residual network: images on which both engines' INT8 agree", "at least", 99.9, "%", agree),
    ]
    title = f"{checkpoint.meta.network} on {checkpoint.meta.dataset.title}, trained in full"
    return Table(title, "", entries, notes=notes), targets, skipped
