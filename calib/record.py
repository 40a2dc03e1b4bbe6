"""What ``quantize.py`` decided for a run, so that ``evaluate.py`` runs exactly that."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from common import side_file
from common.config import QuantizationConfig
from common.decode import plain
from common.files import write_json

FORMAT = 1


@dataclass(frozen=True)
class QuantizationRecord:
    """The content of ``artifacts/<run>/quantization.json``.

    Attributes:
        table: The calibration table's file, relative to the run's folder where it lies inside.
        weights: Fingerprint of the weights that were quantized.
        quantization: Which layers stay in float, and how the others are quantized.
        format: Of this file.
    """

    table: Path
    weights: str
    quantization: QuantizationConfig
    format: int = FORMAT


def _path(folder: Path) -> Path:
    return folder / "quantization.json"


def write_record(folder: Path, record: QuantizationRecord) -> None:
    """Write the record of the run in ``folder``, atomically."""
    write_json(_path(folder), plain(record))


def record_quantization(folder: Path, table: Path, weights: str, quantization: QuantizationConfig) -> None:
    """Write the record of the run in ``folder``.

    Args:
        folder: The run's.
        table: The calibration table's file, inside or elsewhere.
        weights: Fingerprint of the weights that were quantized.
        quantization: How they were.
    """
    write_record(folder, QuantizationRecord(Path(os.path.relpath(table, folder)), weights, quantization))


def read_record(folder: Path) -> QuantizationRecord | None:
    """The record of the run in ``folder``, or None if ``quantize.py`` has not run.

    Raises:
        InputError: the file is damaged or of another format.
    """
    return side_file.read_record(QuantizationRecord, _path(folder), FORMAT, "run quantize.py again")
