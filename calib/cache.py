"""The calibration cache: when a table may be reused, and the JSON side file that says what it was made from.

TensorRT's table says nothing of the weights, the data or the preprocessing, so a stale one is used silently. The side
file ``<table>.json`` records them; a table is reused only when all of it still holds.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from calib.subset import Strategy
from calib.table import CalibrationTable
from common.config import AlgorithmName
from common.errors import InputError
from common.side_file import changes, digest, read_record, side_file, write_side_file

FORMAT = 1

RULES = 3
"""Revision of the rules that find the reference's thresholds and say which tensors share one.

1: bins of exact arithmetic, the smallest candidate of equals, one scale for all inputs of a concatenation.
2: TensorRT's own (docs/algorithm.md).
3: and for ranges that grow more than 2048-fold, or are below 6e-36.
"""


@dataclass(frozen=True)
class SubsetRecord:
    """Which images calibrated.

    Attributes:
        strategy: How they were chosen.
        batches: Number of batches.
        batch_size: Images per batch.
        skip: Batches skipped at the start (``first``).
        seed: Decided which images were drawn.
    """

    strategy: Strategy
    batches: int
    batch_size: int
    skip: int
    seed: int


@dataclass(frozen=True)
class Provenance:
    """What a table was made from: the content of its side file.

    Attributes:
        maker: ``reference`` (this project's calibrator) or ``tensorrt``.
        network: Name of the network.
        algorithm: The true algorithm, which line 1 of the table cannot always say (``percentile``).
        options: Its parameters.
        tensorrt_version: In line 1 of the table.
        subset: Which images, and in which batches.
        dataset: Name of the data set.
        data: Its fingerprint.
        preprocessing: How pixels became inputs.
        weights: Fingerprint of the weights.
        table: SHA-256 of the table's file, so that the two cannot drift apart.
        rules: Revision of the rules that made it, see :data:`RULES`; files from before it was recorded have 1.
        format: Of this file.
    """

    maker: Literal["reference", "tensorrt"]
    network: str
    algorithm: AlgorithmName
    options: dict[str, float]
    tensorrt_version: str
    subset: SubsetRecord
    dataset: str
    data: str
    preprocessing: dict[str, Any]
    weights: str
    table: str = ""
    rules: int = RULES
    format: int = field(default=FORMAT)


@dataclass(frozen=True)
class Decision:
    """Whether to calibrate, and why.

    Attributes:
        table: The table to reuse; None to calibrate.
        reason: For the log: why this was decided.
        foreign: Whether the table comes without a side file, so that nothing is known of its making.
    """

    table: CalibrationTable | None
    reason: str
    foreign: bool = False


def weights_fingerprint(model: nn.Module) -> str:
    """Hex digest of a module's parameters and buffers, with their names, shapes and dtypes."""
    result = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        result.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        result.update(value.detach().cpu().contiguous().reshape(-1).view(dtype=torch.uint8).numpy().tobytes())
    return result.hexdigest()


def write(path: Path, table: CalibrationTable, provenance: Provenance) -> None:
    """Write a table and its side file, each atomically, the side file last."""
    table.write(path)
    write_side_file(path, provenance, "table")


def read_provenance(path: Path) -> Provenance | None:
    """The provenance of the table file ``path``, or None if it has no side file.

    Raises:
        InputError: the side file is damaged or of another format.
    """
    return read_record(Provenance, side_file(path), FORMAT, "remove it or give --recalibrate", missing={"rules": 1})


def changed_since(path: Path, provenance: Provenance) -> bool:
    """Whether the table file ``path`` is not the one that its side file describes: edited, or half replaced."""
    return provenance.table != digest(path)


def decide(path: Path, wanted: Provenance, *, named: bool, recalibrate: bool = False) -> Decision:
    """Decide whether the table in ``path`` serves or calibration has to run.

    Args:
        path: The table's file, there or not.
        wanted: What a calibration now would record.
        named: Whether the user named the file (``--cache``), which may be another run's: only then is a table without a
            side file accepted, and only if asked is one of another network or of other weights replaced.
        recalibrate: Whether calibration was asked for in any case.

    Raises:
        InputError: the user named a file that is not a calibration table, or, without ``recalibrate``, one that was
            made for another network or other weights.
    """
    if recalibrate:
        if named and path.exists():
            _check_replaceable(path)
        return Decision(None, "asked to calibrate again")
    if not path.exists():
        return Decision(None, f"there is no {path} yet")
    try:
        table = CalibrationTable.read(path)
        recorded = read_provenance(path)
    except InputError as error:
        if named:
            raise
        return Decision(None, f"the cache cannot be used: {error}")
    if recorded is None:
        if named:
            return Decision(table, f"{path} has no side file: what it was made from is not known", foreign=True)
        return Decision(None, f"{path} has no side file that says what it was made from")
    if named and (recorded.network, recorded.weights) != (wanted.network, wanted.weights):
        what = "other weights" if recorded.network == wanted.network else f"another network, {recorded.network}"
        raise InputError(f"{path} was made for {what}: name another file, or replace it with --recalibrate")
    differences = changed(recorded, wanted)
    if changed_since(path, recorded):
        differences.append("the table was changed since")
    if differences:
        return Decision(None, "; ".join(differences))
    return Decision(under_its_algorithm(table, recorded), f"model, data, subset and algorithm are those of {path}")


def _check_replaceable(path: Path) -> None:
    """Refuse to replace a file that is not a calibration table."""
    try:
        CalibrationTable.read(path)
    except InputError as error:
        raise InputError(f"{path} is not replaced, since it is no calibration table: {error}") from error


def changed(recorded: Provenance, wanted: Provenance) -> list[str]:
    """What differs between two provenances, each difference in words."""
    names = {"weights": "the weights", "data": "the images"}
    differences = [
        f"{names[name]} changed" if name in names else f"{name} changed from {old} to {new}"
        for name, (old, new) in changes(recorded, wanted, apart=("table", "format", "rules")).items()
    ]
    if recorded.maker == "reference" and recorded.rules != wanted.rules:
        differences.append(f"it was made by revision {recorded.rules} of the calibration rules, now {wanted.rules}")
    return differences


def under_its_algorithm(table: CalibrationTable, provenance: Provenance) -> CalibrationTable:
    """The table under its true algorithm: line 1 calls ``percentile`` MinMaxCalibration."""
    return dataclasses.replace(table, algorithm=provenance.algorithm)
