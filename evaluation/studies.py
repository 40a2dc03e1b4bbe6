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

from calib.calibrator import algorithm_options, find_thresholds
from calib.collect import Histograms, collect, collect_prefixes
from calib.network import Network
from calib.plan import plan_int8
from calib.subset import draw
from calib.table import CalibrationTable
from common.config import AlgorithmName, CalibrationConfig, EvaluationConfig, QuantizationConfig
from common.errors import InputError
from data import Splits
from engines.base import Compiled
from engines.integer import IntegerNetwork
from evaluation.accuracy import Predictions
from evaluation.analysis import layers_to_keep, sample, sensitivities
from evaluation.running import Measure, run_shared
from evaluation.tasks import changed, points
from evaluation.verdict import Limits

logger = logging.getLogger(__name__)

BATCH_SIZE = 256


@dataclass(frozen=True)
class Outcome:
    """What one calibration table gives on the validation images.

    Attributes:
        top1: Percent; None where no classes are given.
        points: Top-1 minus FP32's, points; None likewise.
        changed: Predictions that differ from FP32's, percent; None likewise.
        sqnr_db: Signal-to-noise ratio of the outputs, dB; None where they are identical.
        scales: Tensor name -> scale.
    """

    top1: float | None
    points: float | None
    changed: float | None
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
        InputError: as ``calib.subset.draw`` and ``calib.collect.collect`` do.
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
    measure: Measure,
) -> dict[AlgorithmName, Outcome]:
    """Calibrate by each algorithm from the same histograms.

    Args:
        network: The traced network.
        data: Calibrated on its training images, measured on its validation images.
        config: The subset, and the parameters of the algorithms.
        quantization: Layers kept in float.
        seed: Of the subset.
        algorithms: What to compare.
        measure: What the outputs are compared by.
    """
    histograms = subset_histograms(network, data, config, seed)
    tables = {}
    for algorithm in algorithms:
        options = algorithm_options(dataclasses.replace(config, algorithm=algorithm))
        tables[algorithm] = find_thresholds(histograms, algorithm, options=options).table
    return dict(zip(tables, outcomes(network, data, quantization, tables.values(), measure), strict=True))


def sweep_images(
    network: Network,
    data: Splits,
    config: CalibrationConfig,
    quantization: QuantizationConfig,
    counts: Sequence[int],
    seeds: Sequence[int],
    measure: Measure,
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
        measure: What the outputs are compared by.

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
    measured = outcomes(network, data, quantization, tables, measure)
    return [
        SweepPoint(count, tuple(measured[index * len(seeds) : (index + 1) * len(seeds)]))
        for index, count in enumerate(counts)
    ]


def outcomes(
    network: Network,
    data: Splits,
    quantization: QuantizationConfig,
    tables: Iterable[CalibrationTable],
    measure: Measure,
) -> list[Outcome]:
    """Run the integer simulation with each table over the validation images."""
    tables = list(tables)
    networks = [_compiled("fp32", network.module.forward)]
    for table in tables:
        plan = plan_int8(network, table, quantization.keep_fp, quantization.quantize_output)
        networks.append(_compiled("int8", IntegerNetwork(plan)))
    with torch.inference_mode():
        measured = run_shared(networks, data.validation, measure, BATCH_SIZE)
    assert measured is not None, "the only process is the first"
    labels, (reference, *found) = measured
    return [
        Outcome(
            top1=100 * float(ours.correct(labels).double().mean()) if isinstance(ours, Predictions) else None,
            points=points(ours, reference, labels),
            changed=changed(ours, reference),
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
    measure: Measure,
    limits: Limits,
) -> tuple[list[str], str] | None:
    """The fewest layers to keep in float so that INT8 is what the verdict asks for.

    Args:
        network: The traced network.
        data: Measured on its validation images.
        table: The calibration table.
        quantization: Layers kept in float already.
        measure: What the outputs are compared by.
        limits: What the verdict asks for.

    Returns:
        The layers, what hurts most first, and how far from FP32 the network is with them in float, in words; None if
        nothing suffices.
    """
    plan = plan_int8(network, table, quantization.keep_fp, quantization.quantize_output)
    images = sample(data.validation, 0, len(data.validation), len(data.validation))
    ranked = [layer.layer for layer in sensitivities(network, plan, images, BATCH_SIZE, measure).layers]
    return layers_to_keep(network, plan, ranked, images, BATCH_SIZE, measure, limits)


def keep_in_float(
    network: Network,
    data: Splits,
    table: CalibrationTable,
    quantization: QuantizationConfig,
    options: EvaluationConfig,
    measure: Measure,
) -> None:
    """Extend ``quantization.keep_fp`` by what :func:`mixed_precision` finds.

    Args:
        network: The traced network.
        data: Measured on its validation images.
        table: The calibration table.
        quantization: Layers kept in float already; changed.
        options: What may be lost.
        measure: What the outputs are compared by.

    Raises:
        InputError: no choice of layers suffices.
    """
    found = mixed_precision(network, data, table, quantization, measure, Limits.of(options))
    if found is None:
        raise InputError(
            "no choice of layers kept in float lets INT8 pass (evaluate.py's verdict, on the validation images): "
            "calibrate with more images or another algorithm, or allow more"
        )
    layers, left = found
    quantization.keep_fp = [*quantization.keep_fp, *layers]
    logger.info(
        "mixed precision: %s stay in float; INT8 is then %s on the validation images",
        ", ".join(quantization.keep_fp) or "no layers",
        left,
    )


def _compiled(precision: str, run: object) -> Compiled:
    return Compiled("simulation", precision, "CPU", run, 0)  # type: ignore[arg-type]
