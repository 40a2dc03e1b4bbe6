"""What the benchmarks work on: a run of their own, trained and calibrated by the commands themselves."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor, nn

from benchmarks.process import run_process
from calib.calibrator import calibrate
from calib.network import Network
from calib.plan import Int8Plan, plan_int8
from calib.table import CalibrationTable
from calib.tracing import trace
from common.cli import ROOT, config_parser, parse
from common.config import Config
from common.files import write_text
from common.run import Run
from data import Splits, open_splits
from models.checkpoint import Checkpoint, load_checkpoint
from models.network import network_name
from models.reopen import reopen_data

logger = logging.getLogger(__name__)

EPOCHS = 3
BATCHES, BATCH, FIRST = 10, 50, 50
"""Calibration as sampleINT8 does it: 10 batches of 50 of the training file, in its order; the first batch skipped."""

SHORT = [f"--evaluation.{option}" for option in ("latency_seconds=0.01", "latency_runs=1", "analysis_images=32")]
"""Options of the commands in a trial."""


@dataclass
class Setting:
    """A trained network and its data; what is expensive is made at first use.

    Args:
        artifacts: Folder of all runs.
        quick: A trial on the digits with few repetitions, to see that everything works.
    """

    artifacts: Path
    quick: bool = False

    @property
    def run(self) -> Run:
        """The run that the benchmarks train for themselves, and that ``bench.json`` is written to."""
        return Run("bench-quick" if self.quick else "bench", self.artifacts)

    @property
    def arguments(self) -> list[str]:
        """The options that all three commands get for this run."""
        config = ROOT / "configs" / ("lenet_digits.yaml" if self.quick else "lenet_mnist.yaml")
        common = ["--config", str(config), "--run", self.run.name, "--artifacts", str(self.artifacts.absolute())]
        return common + (SHORT if self.quick else [])

    @property
    def subject(self) -> str:
        """Network and data set, for people; nothing is trained for it."""
        title = open_splits(self.config.data, self.config.seed).info.title
        return f"{network_name(self.config.model.class_path)} on {title}"

    def rounds(self, full: int) -> int:
        """How often to repeat; once in a trial."""
        return 1 if self.quick else full

    def images(self, full: int) -> int:
        """How many images to take; a tenth in a trial."""
        return full // 10 if self.quick else full

    @cached_property
    def config(self) -> Config:
        """The run's configuration."""
        return parse(config_parser("benchmarks", "", {}), self.arguments)[0]

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The run's network, trained now if it was not before, or was with another configuration."""
        epochs = 1 if self.quick else EPOCHS
        config = {
            "epochs": epochs,
            **{key: asdict(getattr(self.config, key)) for key in ("data", "model", "optimizer")},
        }
        wanted = json.dumps({**config, "trainer": self.config.trainer}, sort_keys=True, default=str)
        record = self.run.folder / "trained.json"
        if not (self.run.checkpoint.exists() and record.exists() and record.read_text(encoding="utf-8") == wanted):
            logger.info("training the network that the benchmarks run")
            self.command("train.py", "--epochs", str(epochs))
            write_text(record, wanted)
        return load_checkpoint(self.run.checkpoint)

    @cached_property
    def data(self) -> Splits:
        """The run's data."""
        return reopen_data(self.checkpoint.meta, self.config.data)

    @cached_property
    def network(self) -> Network:
        """The run's network, traced."""
        meta = self.checkpoint.meta
        return trace(self.checkpoint.network, meta.network, meta.dataset.preprocessing.shape)

    @cached_property
    def batches(self) -> list[Tensor]:
        """The calibration batches."""
        starts = range(FIRST, FIRST + BATCHES * BATCH, BATCH)
        return [self.data.train_file.images(slice(start, start + BATCH)) for start in starts]

    @cached_property
    def table(self) -> CalibrationTable:
        """The network's calibration table."""
        return calibrate(self.network, self.batches)

    @property
    def plan(self) -> Int8Plan:
        """All layers in INT8."""
        return plan_int8(self.network, self.table)

    @cached_property
    def quantized(self) -> Path:
        """The table that quantize.py wrote for the run, calibrated now if it was not before."""
        self.command("quantize.py", "--precision", "int8")
        return self.run.table(self.network.name)

    def new_network(self) -> nn.Module:
        """The same network, untrained."""
        meta = self.checkpoint.meta
        return type(self.checkpoint.network)(**meta.init_args)

    def command(
        self, name: str, *arguments: str, python: Sequence[str] = (), codes: Sequence[int] = (0,)
    ) -> subprocess.CompletedProcess[str]:
        """Run one of the commands on this run.

        Args:
            name: Such as ``train.py``.
            arguments: After the run's own.
            python: Options of the interpreter.
            codes: Exit codes that are no failure.

        Raises:
            InputError: another exit code; the message ends with the command's last line.
        """
        line = [sys.executable, *python, str(ROOT / name), *self.arguments, *arguments]
        return run_process(name, line, codes)


def top1(run: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> float:
    """Percent of the images whose most probable class is the label; ``run`` gives probabilities, batch by batch."""
    right = 0
    for part, truth in zip(images.split(500), labels.split(500), strict=True):
        right += int((run(part).argmax(1) == truth).sum())
    return 100 * right / len(labels)
