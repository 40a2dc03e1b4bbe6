"""What the commands are about: the trained network and, to evaluate, its images and the table that fits both."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from calib.cache import Provenance, changed_since, read_provenance, under_its_algorithm, weights_fingerprint
from calib.collect import Histograms
from calib.network import Network
from calib.record import read_record
from calib.run_table import collector, wanted_provenance
from calib.subset import SubsetImages, draw
from calib.table import CalibrationTable
from calib.task import Purpose, purpose
from calib.tracing import trace
from common.config import Config, QuantizationConfig
from common.decode import plain
from common.errors import InputError
from common.processes import Processes
from common.run import Run
from data import Splits
from data.base import DatasetInfo, ImageSet
from evaluation.results import Calibration
from evaluation.running import Measure
from evaluation.tasks import measure_of
from models.checkpoint import CheckpointMeta, load_checkpoint
from models.reopen import reopen_data

logger = logging.getLogger(__name__)

QUANTIZE = "run quantize.py --precision int8"


@dataclass(frozen=True)
class TrainedRun:
    """A trained network, ready to be calibrated.

    Attributes:
        network: Traced.
        meta: What its checkpoint says.
        weights: Fingerprint of the checkpoint's weights.
        purpose: What it is for.
    """

    network: Network
    meta: CheckpointMeta
    weights: str
    purpose: Purpose

    def announce(self, seed: int) -> None:
        """Log what it is, and what a reader must know."""
        logger.info("%s, trained on %s; seed %d", self.meta.network, self.meta.dataset.title, seed)
        for note in self.meta.dataset.notes:
            logger.warning("%s", note)
        logger.info("traced by %s", self.network.traced_by)
        logger.info("task: %s", self.purpose)
        if self.network.unsupported:
            logger.warning("in float, since INT8 gains nothing there or has no such operation: %s", self._in_float())

    def _in_float(self) -> str:
        """The operations that stay in float, each with the tensors that it makes."""
        tensors: dict[str, list[str]] = {}
        for tensor, operation in self.network.unsupported.items():
            tensors.setdefault(operation, []).append(tensor)
        return ", ".join(
            f"{operation} ({names[0]}{f' and {len(names) - 1} more' if names[1:] else ''})"
            for operation, names in tensors.items()
        )

    def metadata(self, seed: int) -> dict[str, str]:
        """What its ONNX files say of it, as text by key."""
        return {
            "network": self.network.name,
            "dataset": self.meta.dataset.name,
            "weights": self.weights,
            "seed": str(seed),
        }

    @property
    def measure(self) -> Measure:
        """What its outputs are compared by."""
        return measure_of(self.network, self.purpose.task, len(self.meta.dataset.classes))

    def data(self, config: Config) -> Splits:
        """Open the data that it was trained on; raises as ``models.reopen.reopen_data`` does."""
        return reopen_data(self.meta, config.data)

    def subset(self, config: Config) -> SubsetImages:
        """Open the data, and draw the representative subset.

        Raises:
            InputError: as ``models.reopen.reopen_data`` and ``calib.subset.draw`` do.
        """
        data = self.data(config)
        return SubsetImages(data.train_file, draw(data, len(data.info.classes), config.calibration, config.seed))

    def wanted(self, config: Config) -> Provenance:
        """What a calibration now would record."""
        return wanted_provenance(self.network, self.weights, self.meta.dataset, config.calibration, config.seed)


@dataclass(frozen=True)
class OpenTable:
    """The calibration table that INT8 runs with.

    Attributes:
        table: None if there is none for these weights.
        problem: Why there is none; empty otherwise.
        description: The table for the report.
        quantization: Which layers stay in float, as ``quantize.py`` decided.
        notes: What a reader must know.
    """

    table: CalibrationTable | None
    quantization: QuantizationConfig
    problem: str = ""
    description: Calibration | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Subject:
    """What is evaluated.

    Attributes:
        network: The traced network.
        meta: What its checkpoint says.
        info: The data set.
        images: The split that was asked for.
        int8: The calibration table.
        purpose: What the network is for.
    """

    network: Network
    meta: CheckpointMeta
    info: DatasetInfo
    images: ImageSet
    int8: OpenTable
    purpose: Purpose

    @property
    def notes(self) -> list[str]:
        """What a reader must know."""
        return [*self.info.notes, *self.int8.notes]


def open_trained(config: Config, run: Run) -> TrainedRun:
    """Open the run's checkpoint, and trace its network.

    Raises:
        InputError: the checkpoint is missing or damaged, its network cannot be traced, or is not for the task that was
            asked for.
    """
    checkpoint = load_checkpoint(run.checkpoint, trusted=config.model.class_path)
    meta = checkpoint.meta
    network = trace(checkpoint.network, meta.network, meta.dataset.preprocessing.shape)
    asked = config.model.task if config.model.task != "auto" else meta.task
    found = purpose(network, asked, len(meta.dataset.classes), meta.dataset.targets)
    return TrainedRun(network, meta, weights_fingerprint(checkpoint.network), found)


def open_collector(config: Config, processes: Processes) -> Callable[[], Histograms]:
    """Open the run's checkpoint and data, for the histograms that the processes make together.

    Raises:
        InputError: as :func:`open_trained`, :meth:`TrainedRun.subset` and ``calib.run_table.collector`` do.
    """
    trained = open_trained(config, Run(config.run, config.artifacts))
    return collector(trained.network, trained.subset(config), processes, config.engine)


def open_subject(config: Config, run: Run, cache: Path | None = None) -> Subject:
    """Open the run's checkpoint, its data and its calibration table.

    The checkpoint decides the data set and its preprocessing; the configuration decides where the files lie.

    Args:
        config: Whose places of the data, quantization and task hold.
        run: Where the checkpoint and the table are.
        cache: Another calibration table than the one that ``quantize.py`` recorded.

    Raises:
        InputError: the checkpoint is missing or damaged, the data cannot be found or is not what the network was
            trained on, or the table is damaged.
    """
    trained = open_trained(config, run)
    meta, weights = trained.meta, trained.weights
    if config.data.dataset not in ("auto", meta.data.dataset):
        raise InputError(
            f"{run.checkpoint} was trained on {meta.data.dataset}, not on {config.data.dataset}: "
            "leave data.dataset out, or train again"
        )
    int8 = _named_table(cache, weights, config) if cache else _recorded_table(run, weights, config)
    data = reopen_data(meta, config.data)
    images = {"test": data.test, "train": data.train_file, "validation": data.validation}[config.evaluation.split]
    return Subject(trained.network, meta, data.info, images, int8, trained.purpose)


def _recorded_table(run: Run, weights: str, config: Config) -> OpenTable:
    """The table that ``quantize.py`` settled on."""
    record = read_record(run.folder)
    if record is None:
        return OpenTable(None, config.quantization, f"there is no calibration table yet: {QUANTIZE}")
    if config.quantization not in (QuantizationConfig(), record.quantization):
        logger.warning("INT8 is quantized as quantize.py prepared it, not as the options given here say")
    path = run.folder / record.table
    if record.weights != weights:
        return OpenTable(None, record.quantization, f"the calibration table is of other weights: {QUANTIZE}")
    if not path.exists():
        return OpenTable(None, record.quantization, f"the calibration table {path} is gone: {QUANTIZE}")
    provenance = read_provenance(path)
    problem = ""
    if provenance is not None and provenance.weights != weights:
        problem = f"the calibration table {path} was made for other weights since: {QUANTIZE}"
    elif provenance is not None and changed_since(path, provenance):
        problem = f"the calibration table {path} was changed since it was calibrated: {QUANTIZE}, or give --cache"
    return OpenTable(None, record.quantization, problem) if problem else _read_table(path, record.quantization)


def _named_table(path: Path, weights: str, config: Config) -> OpenTable:
    """A table that the user named."""
    provenance = read_provenance(path)
    if provenance is not None and provenance.weights != weights:
        raise InputError(f"{path} was made for other weights: {QUANTIZE}")
    return _read_table(path, config.quantization)


def _read_table(path: Path, quantization: QuantizationConfig) -> OpenTable:
    table = CalibrationTable.read(path)
    provenance = read_provenance(path)
    if provenance is None or changed_since(path, provenance):
        why = "has no side file" if provenance is None else "was changed since its side file was written"
        note = f"the calibration table {path.name} {why}: what it was made from is not known"
        logger.warning("%s", note)
        source, notes = {"maker": "unknown"}, [note]
    else:
        table = under_its_algorithm(table, provenance)
        source, notes = {key: _text(value) for key, value in plain(provenance).items() if key != "format"}, []
    description = Calibration(table.algorithm, table.tensorrt_version, source, table.finite)
    return OpenTable(table, quantization, "", description, tuple(notes))


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items() if item not in (None, [], ""))
    if isinstance(value, list):
        return " ".join(map(_text, value))
    return str(value)
