"""The calibration table of an ONNX network, without TensorRT: histograms of its values over calibration batches.

The rules are those of :mod:`calib.histogram` and :mod:`calib.algorithms`; which value gives which entry of the table,
and under which name, is :mod:`calib.onnx.rules`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from calib.algorithms import DEFAULT, thresholds
from calib.calibrator import MUCH_CLIPPED
from calib.histogram.base import AbsHistogram
from calib.histogram.native import native_counter
from calib.onnx.graph import WEIGHTED
from calib.onnx.histograms import collect
from calib.onnx.model import read_float_model
from calib.onnx.observe import Observed
from calib.onnx.rules import TableEntry, entries
from calib.onnx.source import Batches
from calib.table import LEVELS, TESTED_TENSORRT, CalibrationTable, Legacy
from calib.table.text import name_problem
from common.errors import InputError

if TYPE_CHECKING:
    import onnx

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OnnxCalibration:
    """A table and how it came about.

    Attributes:
        table: By the names that TensorRT gives the file's values.
        images: Images seen.
        batches: Batches seen.
        zero: Entries whose values were zero throughout.
        infinite: Values that were infinite, and so have no entry.
        unnamed: Values whose names the table cannot hold, and which so have no entry.
        clipped: Values that layers with weights read and of which the threshold cuts much off -> the share.
        seconds: Time of the network and the histograms.
        provider: What ONNX Runtime computed with, such as ``CUDAExecutionProvider``.
    """

    table: CalibrationTable
    images: int
    batches: int
    zero: tuple[str, ...]
    infinite: tuple[str, ...]
    unnamed: tuple[str, ...]
    clipped: Mapping[str, float]
    seconds: float
    provider: str


def calibrate_onnx(
    path: Path,
    model: onnx.ModelProto,
    entries: list[TableEntry],
    batches: Batches,
    algorithm: str = DEFAULT,
    *,
    tensorrt_version: str = TESTED_TENSORRT,
    options: Mapping[str, float] | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> OnnxCalibration:
    """Calibrate the network of an ONNX file.

    Args:
        path: The file.
        model: Its float network, as :func:`calib.onnx.model.read_float_model` reads it.
        entries: Of the table.
        batches: The calibration batches. The first one sets the histograms' range.
        algorithm: As :func:`calib.algorithms.thresholds` takes it.
        tensorrt_version: Version for the table's first line.
        options: Parameters of the algorithm.
        progress: Called after each batch with (batches done, seconds it took).

    Raises:
        InputError: ONNX Runtime does not run the network, values are NaN, or an input is zero throughout.
    """
    options = dict(options or {})
    start = time.perf_counter()
    wanted = [value for entry in entries for value in (entry.value, *entry.whole) if value is not None]
    heads = {entry.value: entry.whole for entry in entries if entry.value is not None and entry.whole}
    in_order = {name for value, whole in heads.items() for name in (value, *whole)}
    with ThreadPoolExecutor(1) as other:
        other.submit(native_counter)  # compiled while ONNX Runtime optimizes the network
        observed = Observed(path, model, wanted, in_order)
    if not observed.values:
        raise InputError(f"{path} computes with integers alone: there is nothing to calibrate")
    histograms, infinite = collect(observed, batches, progress, heads)
    seconds = time.perf_counter() - start
    arrays: dict[str, NDArray[Any]] = {entry.name: entry.array for entry in entries if entry.array is not None}
    for name, array in arrays.items():
        histograms[f"{name} "] = AbsHistogram()
        histograms[f"{name} "].add(torch.from_numpy(np.ascontiguousarray(array, np.float32)))
    values = thresholds(list(histograms.values()), algorithm, device=None, **options)
    found = {name: one.value for name, one in zip(histograms, values, strict=True)}
    sources = {entry.name: f"{entry.name} " if entry.name in arrays else entry.value for entry in entries}
    scales = {name: found[source] / LEVELS for name, source in sources.items() if source in found}
    unnamed = tuple(name for name in scales if name_problem(name) is not None)
    for name in unnamed:
        del scales[name]
    zero = tuple(name for name, scale in scales.items() if scale == 0)
    for value in model.graph.input:
        if scales.get(value.name) == 0:
            raise InputError(f"input {value.name!r} is zero in all calibration batches: there is nothing to calibrate")
    legacy = Legacy(quantile=options.get("quantile", Legacy.quantile))
    table = CalibrationTable(scales, algorithm, tensorrt_version, legacy)
    read = dict.fromkeys(node.input[0] for node in model.graph.node if node.op_type in WEIGHTED)
    counted = {name: source for name in read if (source := sources.get(name)) in found and scales.get(name)}
    shares = {name: histograms[source].share_above(found[source]) for name, source in counted.items()}
    clipped = {name: share for name, share in shares.items() if share > MUCH_CLIPPED}
    return OnnxCalibration(
        table, batches.images, len(batches), zero, infinite, unnamed, clipped, seconds, observed.provider
    )


def complete_table(
    path: Path, batches: Batches, algorithm: str = DEFAULT, options: Mapping[str, float] | None = None
) -> CalibrationTable:
    """The table that TensorRT would make of an ONNX file, with all entries.

    Args:
        path: The file of a float network.
        batches: The calibration batches.
        algorithm: As :func:`calibrate_onnx` takes it.
        options: Likewise.

    Raises:
        InputError: as :func:`calibrate_onnx` and :func:`calib.onnx.model.read_float_model` do.
    """
    model = read_float_model(path)
    found, observed = entries(model, algorithm, path.parent)
    return calibrate_onnx(path, observed, found, batches, algorithm, options=options).table
