"""Calibration on any device: histograms of the network over the subset, thresholds, the table.

This is the reference calibrator. It follows TensorRT's IInt8EntropyCalibrator2 to the bin; see ``calib.algorithms``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed import ProcessGroup

from calib.algorithms import ALGORITHMS, DEFAULT, Threshold
from calib.algorithms import thresholds as thresholds_of
from calib.collect import Histograms, collect, device_of
from calib.network import INPUT, Network
from calib.table import LEVELS, TESTED_TENSORRT, CalibrationTable, Legacy
from calib.tracing import trace
from common.config import AlgorithmName, CalibrationConfig
from common.errors import InputError

logger = logging.getLogger(__name__)

MUCH_CLIPPED = 0.05
"""Share of a tensor's values; where INT8 keeps its accuracy, entropy calibration clips 1 or 2 % at most."""


@dataclass(frozen=True)
class CalibrationResult:
    """A table and how it came about.

    Attributes:
        table: With a scale for every tensor whose values were not all zero.
        thresholds: Threshold of every tensor of the network, shared ones included; value 0 where there is none.
        histograms: What they were found from.
        post_seconds: Time that finding the thresholds took.
    """

    table: CalibrationTable
    thresholds: Mapping[str, Threshold]
    histograms: Histograms
    post_seconds: float

    def clipped(self, tensor: str) -> float:
        """Share of the tensor's values that lie beyond its threshold, in [0, 1], to the resolution of a bin."""
        histogram = self.histograms.of[self.histograms.network.scale_source[tensor]]
        return histogram.share_above(self.thresholds[tensor].value)


def calibrate(
    model: nn.Module | Network,
    batches: Iterable[Any],
    algorithm: AlgorithmName = DEFAULT,
    *,
    tensorrt_version: str = TESTED_TENSORRT,
    options: Mapping[str, float] | None = None,
    process_group: ProcessGroup | None = None,
) -> CalibrationTable:
    """Calibrate ``model`` over ``batches`` and return its calibration table.

    Args:
        model: A float classifier that ``torch.fx`` can trace, or what ``trace`` returned.
        batches: Image batches in order, each float32 [N, C, H, W] (or a tuple that starts with one, as a DataLoader
            with labels gives it). The result depends on their order: the first batch sets the histograms' range.
        algorithm: One of ``calib.algorithms.ALGORITHMS``; ``entropy2`` is IInt8EntropyCalibrator2.
        tensorrt_version: Version for the table's first line.
        options: Parameters of the algorithm, such as ``{"percentile": 99.9}``.
        process_group: Processes of torch.distributed that share the work, each with the same model and batches; every
            one gets the table that one process alone would make. See :func:`calib.collect.collect`.

    Returns:
        The table; ``table.scales`` holds the scales by tensor name, in network order. A tensor that was zero
        throughout has the scale 0, which quantizes nothing (``table.unusable``), and is named in a warning, as is one
        that INT8 layers read and that is clipped much.

    Raises:
        InputError: no batch, a batch that is not float32 [N, C, H, W] or does not fit the network, or values that are
            not finite.
    """
    network = model if isinstance(model, Network) else trace(model)
    histograms = collect(network, batches, process_group=process_group)
    calibration = find_thresholds(histograms, algorithm, tensorrt_version=tensorrt_version, options=options)
    layers = [layer for layer in network.layers if layer.kind != "softmax"]
    warn_of_clipping(calibration, {network.tensor_of[item] for layer in layers for item in layer.inputs})
    return calibration.table


def warn_of_clipping(
    calibration: CalibrationResult, read: Container[str], remedy: str = "try another algorithm"
) -> None:
    """Name the tensors of which a threshold cuts much off.

    Args:
        calibration: What was found.
        read: Tensors that INT8 layers read; others do not matter.
        remedy: What to do about it.
    """
    shares = {name: calibration.clipped(name) for name in calibration.thresholds if name in read}
    much = [f"{share:.1%} of {name}" for name, share in shares.items() if share > MUCH_CLIPPED]
    if much:
        logger.warning("%s clips %s: INT8 may lose accuracy; %s", calibration.table.algorithm, ", ".join(much), remedy)


def find_thresholds(
    histograms: Histograms,
    algorithm: AlgorithmName = DEFAULT,
    *,
    tensorrt_version: str = TESTED_TENSORRT,
    options: Mapping[str, float] | None = None,
) -> CalibrationResult:
    """Find every tensor's threshold and scale from its histogram (threshold / 127).

    Args:
        histograms: From :func:`collect`.
        algorithm: As :func:`calibrate` takes it.
        tensorrt_version: Version for the table's first line.
        options: Parameters of the algorithm.
    """
    start = time.perf_counter()
    network = histograms.network
    values = thresholds_of(list(histograms.of.values()), algorithm, device=device_of(network), **(options or {}))
    found = dict(zip(histograms.of, values, strict=True))
    thresholds = {name: found[network.scale_source[name]] for name in network.tensors}
    seen = {name for name, source in network.scale_source.items() if histograms.of[source].total}
    dead = [name for name, value in thresholds.items() if value.value == 0 and name in seen]
    if dead:
        logger.warning(
            "no usable range, all values were zero: %s; what reads %s stays in float",
            ", ".join(dead),
            "it" if len(dead) == 1 else "them",
        )
    scales = {name: value.value / LEVELS for name, value in thresholds.items()}
    if scales[INPUT] == 0:
        raise InputError("all calibration images are zero: there is nothing to calibrate")
    given = options or {}
    legacy = Legacy(quantile=given.get("quantile", Legacy.quantile))
    table = CalibrationTable(scales, algorithm, tensorrt_version, legacy)
    return CalibrationResult(table, thresholds, histograms, time.perf_counter() - start)


def algorithm_options(config: CalibrationConfig) -> dict[str, float]:
    """The parameters that the configured algorithm takes."""
    return {option.name: getattr(config, option.name) for option in ALGORITHMS[config.algorithm].options}
