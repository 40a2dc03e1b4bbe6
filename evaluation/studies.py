"""Calibration studies: which algorithm, how many images, which layers to keep in float.

All run the exact integer simulation on the validation images: the test set is for the final figure alone.
"""

from __future__ import annotations

import dataclasses
import logging
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calib.calibrator import Histograms, algorithm_options, collect, collect_prefixes, find_thresholds
from calib.network import Network
from calib.plan import plan_int8
from calib.subset import draw
from calib.table import CalibrationTable
from common.config import AlgorithmName, CalibrationConfig, EvaluationConfig, QuantizationConfig
from common.errors import InputError
from data import Splits
from engines.base import Compiled
from engines.integer import IntegerNetwork
from evaluation.accuracy import measure, paired
from evaluation.analysis import layers_to_keep, sample, sensitivities

logger = logging.getLogger(__name__)

BATCH_SIZE = 256


@dataclass(frozen=True)
class Outcome:
    """What one calibration table gives on the validation images.

    Attributes:
        top1: Percent.
        points: Top-1 minus FP32's, points.
        changed: Predictions that differ from FP32's, percent.
        sqnr_db: Signal-to-noise ratio of the outputs, dB; None where they are identical.
        scales: Tensor name -> scale.
    """

    top1: float
    points: float
    changed: float
    sqnr_db: float | None
    scales: dict[str, float]


@dataclass(frozen=True)
class SweepPoint:
    """Several calibrations with as many images, each with a seed of its own.

    Attributes:
        images: Calibration images.
        outcomes: One for each seed, in order.
    """

    images: int
    outcomes: tuple[Outcome, ...]

    @property
    def spread(self) -> dict[str, float]:
        """Tensor name -> standard deviation of its scale over the seeds, relative to their mean (0 for one seed)."""
        result = {}
        for name in self.outcomes[0].scales:
            values = [outcome.scales[name] for outcome in self.outcomes]
            mean = statistics.fmean(values)
            result[name] = statistics.pstdev(values) / mean if mean > 0 else 0.0
        return result


def subset_histograms(network: Network, data: Splits, config: CalibrationConfig, seed: int) -> Histograms:
    """Histograms over the representative subset, as configured.

    Raises:
        InputError: as ``calib.subset.draw`` and ``calib.calibrator.collect`` do.
    """
    subset = draw(data, len(data.info.classes), config, seed)
    return collect(network, (data.train_file.images(positions) for positions in subset.batches))


def compare_algorithms(
    network: Network,
    data: Splits,
    config: CalibrationConfig,
    quantization: QuantizationConfig,
    seed: int,
    algorithms: Sequence[AlgorithmName],
) -> dict[AlgorithmName, Outcome]:
    """Calibrate by each algorithm from the same histograms.

    Args:
        network: The traced network.
        data: Calibrated on its training images, measured on its validation images.
        config: The subset, and the parameters of the algorithms.
        quantization: Layers kept in float.
        seed: Of the subset.
        algorithms: What to compare.
    """
    histograms = subset_histograms(network, data, config, seed)
    tables = {}
    for algorithm in algorithms:
        options = algorithm_options(dataclasses.replace(config, algorithm=algorithm))
        tables[algorithm] = find_thresholds(histograms, algorithm, options=options).table
    return dict(zip(tables, outcomes(network, data, quantization, tables.values()), strict=True))


def sweep_images(
    network: Network,
    data: Splits,
    config: CalibrationConfig,
    quantization: QuantizationConfig,
    counts: Sequence[int],
    seeds: Sequence[int],
) -> list[SweepPoint]:
    """Calibrate with more and more images, several times each.

    Every seed draws one subset, of the largest number of images, and reads it once: fewer images are its first ones.

    Args:
        network: The traced network.
        data: Calibrated on its training images, measured on its validation images.
        config: The algorithm, the kind of subset and the size of the batches, of which the last may be smaller.
        quantization: Layers kept in float.
        counts: Numbers of calibration images.
        seeds: One calibration each.

    Raises:
        InputError: there are not as many images, or too few for every class.
    """
    largest = max(counts)
    # One batch of all images, where they are not a whole number of batches: only their order matters here.
    size = config.batch_size if largest % config.batch_size == 0 else largest
    whole = dataclasses.replace(config, batches=largest // size, batch_size=size)
    found: dict[tuple[int, int], CalibrationTable] = {}
    for seed in seeds:
        positions = draw(data, len(data.info.classes), whole, seed).positions

        def images(begin: int, end: int, positions: Tensor = positions) -> Tensor:
            return data.train_file.images(positions[begin:end])

        def progress(count: int, seconds: float, seed: int = seed) -> None:
            logger.info("  seed %d: calibrated %d images, %.0f images/s", seed, count, count / seconds)

        for count, histograms in collect_prefixes(network, images, counts, config.batch_size, progress).items():
            options = algorithm_options(config)
            found[count, seed] = find_thresholds(histograms, config.algorithm, options=options).table
    tables = [found[count, seed] for count in counts for seed in seeds]
    measured = outcomes(network, data, quantization, tables)
    return [
        SweepPoint(count, tuple(measured[index * len(seeds) : (index + 1) * len(seeds)]))
        for index, count in enumerate(counts)
    ]


def outcomes(
    network: Network, data: Splits, quantization: QuantizationConfig, tables: Iterable[CalibrationTable]
) -> list[Outcome]:
    """Run the integer simulation with each table over the validation images."""
    tables = list(tables)
    networks = [_compiled("fp32", network.module.forward)]
    for table in tables:
        plan = plan_int8(network, table, quantization.keep_fp, quantization.quantize_output)
        networks.append(_compiled("int8", IntegerNetwork(plan)))
    with torch.inference_mode():
        labels, (reference, *found) = measure(
            networks, data.validation, len(data.info.classes), BATCH_SIZE, start=0, count=None
        )
    return [
        Outcome(
            top1=100 * float(ours.correct(labels).double().mean()),
            points=paired(ours, reference, labels).top1_points,
            changed=100 * float((ours.predicted != reference.predicted).double().mean()),
            sqnr_db=ours.sqnr_db,
            scales=dict(table.scales),
        )
        for ours, table in zip(found, tables, strict=True)
    ]


def mixed_precision(
    network: Network,
    data: Splits,
    table: CalibrationTable,
    quantization: QuantizationConfig,
    tolerance: float,
    agreement: float,
) -> tuple[list[str], float] | None:
    """The fewest layers to keep in float so that INT8 is what the verdict asks for.

    Args:
        network: The traced network.
        data: Measured on its validation images.
        table: The calibration table.
        quantization: Layers kept in float already.
        tolerance: Points of top-1 and of top-5 that may be lost.
        agreement: Percent of the images that must get the same class as in FP32.

    Returns:
        The layers, what hurts most first, and the points against FP32 with them in float; None if nothing suffices.
    """
    plan = plan_int8(network, table, quantization.keep_fp, quantization.quantize_output)
    classes = len(data.info.classes)
    images = sample(data.validation, 0, len(data.validation), len(data.validation))
    ranked = [layer.layer for layer in sensitivities(network, plan, images, BATCH_SIZE, classes).layers]
    return layers_to_keep(network, plan, ranked, images, BATCH_SIZE, classes, tolerance, agreement)


def keep_in_float(
    network: Network,
    data: Splits,
    table: CalibrationTable,
    quantization: QuantizationConfig,
    options: EvaluationConfig,
) -> None:
    """Extend ``quantization.keep_fp`` by what :func:`mixed_precision` finds.

    Args:
        network: The traced network.
        data: Measured on its validation images.
        table: The calibration table.
        quantization: Layers kept in float already; changed.
        options: What may be lost.

    Raises:
        InputError: no choice of layers suffices.
    """
    found = mixed_precision(network, data, table, quantization, options.tolerance, options.agreement)
    if found is None:
        raise InputError(
            f"no choice of layers kept in float brings INT8 within {options.tolerance:g} points of FP32 and to the "
            f"same class for {options.agreement:g} % of the images: calibrate with more images or another algorithm"
        )
    layers, points = found
    quantization.keep_fp = [*quantization.keep_fp, *layers]
    logger.info(
        "mixed precision: %s stay in float; INT8 is then %+.2f points from FP32 on the validation images",
        ", ".join(quantization.keep_fp) or "no layers",
        points,
    )


def _compiled(precision: str, run: object) -> Compiled:
    return Compiled("simulation", precision, "CPU", run, 0)  # type: ignore[arg-type]
