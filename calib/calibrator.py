"""Calibration on any device: run the network over the subset, collect histograms, find thresholds, make the table.

This is the reference calibrator. It follows TensorRT's IInt8EntropyCalibrator2 to the bin; see ``calib.threshold``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calib.graph import INPUT, Network, trace
from calib.histogram import AbsHistogram
from calib.table import LEVELS, TESTED_TENSORRT, CalibrationTable
from calib.threshold import Threshold, threshold
from common.config import AlgorithmName, CalibrationConfig
from common.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Histograms:
    """What the network's tensors looked like over the calibration batches.

    Attributes:
        network: The traced network.
        of: Histogram of every tensor that has a scale of its own (``scale_source`` points to itself).
        batch_seconds: Time of each batch.
        images: Images seen.
    """

    network: Network
    of: Mapping[str, AbsHistogram]
    batch_seconds: tuple[float, ...]
    images: int


@dataclass(frozen=True)
class Calibration:
    """A table and how it came about.

    Attributes:
        table: The result.
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
    algorithm: AlgorithmName = "entropy2",
    *,
    tensorrt_version: str = TESTED_TENSORRT,
    options: Mapping[str, float] | None = None,
) -> CalibrationTable:
    """Calibrate ``model`` over ``batches`` and return its calibration table.

    Args:
        model: A float classifier that ``torch.fx`` can trace, or what ``trace`` returned.
        batches: Image batches in order, each float32 [N, C, H, W] (or a tuple that starts with one, as a DataLoader
            with labels gives it). The result depends on their order: the first batch sets the histograms' range.
        algorithm: ``entropy2`` (IInt8EntropyCalibrator2), ``minmax``, ``percentile``, ``entropy`` or ``legacy``.
        tensorrt_version: Version for the table's first line.
        options: Parameters of the algorithm, such as ``{"percentile": 99.9}``.

    Returns:
        The table; ``table.scales`` holds the scales by tensor name, in network order. A tensor that was zero
        throughout has the scale 0, which quantizes nothing (``table.unusable``), and is named in a warning.

    Raises:
        InputError: no batch, a batch that is not float32 [N, C, H, W] or does not fit the network, or values that are
            not finite.
    """
    network = model if isinstance(model, Network) else trace(model)
    histograms = collect(network, batches)
    return find_thresholds(histograms, algorithm, tensorrt_version=tensorrt_version, options=options).table


def collect(
    network: Network, batches: Iterable[Any], progress: Callable[[int, float], None] | None = None
) -> Histograms:
    """Run ``network`` over ``batches`` and histogram its tensors; memory does not grow with their number.

    Args:
        network: The traced network.
        batches: As :func:`calibrate` takes them.
        progress: Called after each batch with (batches done, seconds it took).

    Raises:
        InputError: as :func:`calibrate` does.
    """
    of = {name: AbsHistogram() for name in network.tensors if network.scale_source[name] == name}
    device = next((parameter.device for parameter in network.module.parameters()), torch.device("cpu"))
    seconds: list[float] = []
    images = 0
    constant = same = True
    first: Tensor | None = None

    def observe(name: str, value: Tensor) -> None:
        histogram = of.get(name)
        if histogram is None:
            return
        try:
            histogram.add(value)
        except InputError as error:
            raise InputError(f"calibration batch {len(seconds) + 1}, tensor {name}: {error}") from error

    for batch in batches:
        start = time.perf_counter()
        inputs = _images(batch)
        first = inputs[:1] if first is None else first
        constant = constant and bool((inputs == inputs[0, 0, 0, 0]).all())
        same = same and inputs.shape[1:] == first.shape[1:] and bool((inputs == first).all())
        network.run(inputs.to(device), observe)
        seconds.append(time.perf_counter() - start)
        images += len(inputs)
        if progress is not None:
            progress(len(seconds), seconds[-1])
    if not seconds:
        raise InputError("calibration needs at least one batch of images, and got none")
    if constant:
        logger.warning("all pixels of each calibration batch are equal: these images represent nothing")
    elif same and images > 1:
        logger.warning("all %d calibration images are the same one: it represents nothing but itself", images)
    return Histograms(network, of, tuple(seconds), images)


def _images(batch: Any) -> Tensor:
    images = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(images, Tensor) or images.dtype != torch.float32 or images.dim() != 4 or not len(images):
        kind = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise InputError(f"a calibration batch must be a float32 tensor [N, C, H, W], not {kind}")
    return images


def find_thresholds(
    histograms: Histograms,
    algorithm: AlgorithmName = "entropy2",
    *,
    tensorrt_version: str = TESTED_TENSORRT,
    options: Mapping[str, float] | None = None,
) -> Calibration:
    """Find every tensor's threshold and scale from its histogram (threshold / 127).

    Args:
        histograms: From :func:`collect`.
        algorithm: As :func:`calibrate` takes it.
        tensorrt_version: Version for the table's first line.
        options: Parameters of the algorithm.
    """
    start = time.perf_counter()
    network = histograms.network
    found = {name: threshold(histogram, algorithm, **(options or {})) for name, histogram in histograms.of.items()}
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
    table = CalibrationTable(scales, algorithm, tensorrt_version)
    return Calibration(table, thresholds, histograms, time.perf_counter() - start)


def algorithm_options(config: CalibrationConfig) -> dict[str, float]:
    """The parameters that the configured algorithm takes."""
    if config.algorithm == "percentile":
        return {"percentile": config.percentile}
    if config.algorithm == "legacy":
        return {"quantile": config.quantile, "cutoff": config.cutoff}
    return {}
