"""Classifiers: what each precision predicts, and how far its outputs are from FP32's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from common.errors import InputError
from engines.base import Compiled, Outputs
from evaluation.measures import Accuracy, ClassAccuracy, Interval, Mistake, Paired
from evaluation.running import Collector, sqnr_db
from evaluation.statistics import calibration_error, confusion_matrix, mcnemar, paired_interval, wilson_interval

TOP_K = 5


@dataclass(frozen=True)
class Predictions:
    """What one precision says about every image, compactly.

    Attributes:
        predicted: Most probable class, int32 [N]; -1 where the output is not finite.
        confidence: Its probability, float32 [N]; 0 where the output is not finite.
        in_top: Whether the label is among the five most probable (all, with fewer classes), bool [N].
        signal: Sum of squares of FP32's outputs over the images where both are finite.
        noise: Sum of squares of the difference to FP32's outputs there.
    """

    predicted: Tensor
    confidence: Tensor
    in_top: Tensor
    signal: float
    noise: float

    def correct(self, labels: Tensor) -> Tensor:
        """Whether each prediction is right, bool [N]."""
        return self.predicted == labels

    @property
    def non_finite(self) -> int:
        """Images whose output has a NaN or an infinity."""
        return int((self.predicted < 0).sum())

    @property
    def sqnr_db(self) -> float | None:
        """Signal-to-noise ratio of the outputs against FP32's, in dB; None where they are identical."""
        return sqnr_db(self.signal, self.noise)


@dataclass(frozen=True)
class Classes:
    """Outputs are compared by the class that they give (:class:`evaluation.running.Measure`).

    Attributes:
        count: Number of classes.
        scores: Whether the networks give scores, of which the softmax makes probabilities.
    """

    count: int
    scores: bool = False

    def collector(self, network: Compiled) -> ClassCollector:
        """See :class:`evaluation.running.Measure`."""
        return ClassCollector(self, f"{network.engine} {network.precision}")


class ClassCollector:
    """Gathers one network's predictions batch by batch.

    Args:
        measure: How many classes, and whether the outputs are scores.
        title: Of the network, for errors.
    """

    def __init__(self, measure: Classes, title: str) -> None:
        self._measure = measure
        self._title = title
        self.predicted: list[Tensor] = []
        self.confidence: list[Tensor] = []
        self.in_top: list[Tensor] = []
        self.signal: list[float] = []
        self.noise: list[float] = []

    def add(self, outputs: Outputs, reference: Outputs, labels: Tensor) -> None:
        """Take one batch.

        Raises:
            InputError: a label is out of range, or the output is not one row of scores for each image.
        """
        classes = self._measure.count
        if int(labels.min()) < 0 or int(labels.max()) >= classes:
            raise InputError(
                f"the data set has labels from {int(labels.min())} to {int(labels.max())}, "
                f"but the network has {classes} classes"
            )
        (output, *more), truth = outputs, reference[0]
        if more or output.shape != (len(labels), classes):
            shape = tuple(output.shape) if not more else f"{len(outputs)} outputs"
            raise InputError(
                f"{self._title} gives {'an output of shape ' if not more else ''}{shape} for {len(labels)} images of "
                f"{classes} classes: not a classifier of this data set"
            )
        finite = output.isfinite().all(dim=1)
        safe = torch.where(finite[:, None], output, torch.zeros_like(output))
        top = safe.topk(min(TOP_K, output.shape[1]), dim=1)
        self.predicted.append(top.indices[:, 0].int().masked_fill_(~finite, -1))
        highest = top.values[:, 0].float()
        if self._measure.scores:
            highest = (highest - safe.float().logsumexp(dim=1)).exp().masked_fill_(~finite, 0.0)
        self.confidence.append(highest)
        self.in_top.append((top.indices == labels[:, None]).any(dim=1) & finite)
        both = finite & truth.isfinite().all(dim=1)
        expected, other = truth[both].double(), output[both].double()
        self.signal.append(float(expected.square().sum()))
        self.noise.append(float((expected - other).square().sum()))

    def found(self, parts: Sequence[Collector]) -> Predictions:
        """See :class:`evaluation.running.Collector`."""
        collectors = cast("Sequence[ClassCollector]", parts)
        return Predictions(
            predicted=torch.cat([item for collector in collectors for item in collector.predicted]),
            confidence=torch.cat([item for collector in collectors for item in collector.confidence]),
            in_top=torch.cat([item for collector in collectors for item in collector.in_top]),
            # Rounded once, so that the sum is the same however the batches were shared.
            signal=math.fsum(item for collector in collectors for item in collector.signal),
            noise=math.fsum(item for collector in collectors for item in collector.noise),
        )


def accuracy(predictions: Predictions, reference: Predictions, labels: Tensor, classes: int) -> Accuracy:
    """The figures of one precision."""
    images = len(labels)
    correct = predictions.correct(labels)
    right, in_top = int(correct.sum()), int(predictions.in_top.sum())
    matrix = confusion_matrix(predictions.predicted, labels, classes)
    per_label = torch.bincount(labels, minlength=classes)
    low, high = wilson_interval(right, images)
    return Accuracy(
        images=images,
        correct_top1=right,
        correct_top5=in_top,
        top1=100 * right / images,
        top5=100 * in_top / images,
        top1_interval=Interval(100 * low, 100 * high),
        agreement=100 * int((predictions.predicted == reference.predicted).sum()) / images,
        sqnr_db=predictions.sqnr_db,
        non_finite=predictions.non_finite,
        calibration_error=100 * calibration_error(predictions.confidence, correct),
        per_class=[
            ClassAccuracy(images, correct)
            for images, correct in zip(per_label.tolist(), matrix.diagonal().tolist(), strict=True)
        ],
        mistakes=_mistakes(matrix),
    )


def _mistakes(matrix: Tensor) -> list[Mistake]:
    cells = matrix.clone().fill_diagonal_(0).nonzero().tolist()
    found = [Mistake(label, predicted, int(matrix[label, predicted])) for label, predicted in cells]
    return sorted(found, key=lambda mistake: -mistake.count)


def paired(predictions: Predictions, reference: Predictions, labels: Tensor) -> Paired:
    """One precision against FP32 on the same images, with McNemar's test and the interval of the difference."""
    images = len(labels)
    ours, theirs = predictions.correct(labels), reference.correct(labels)
    lost, gained = int((theirs & ~ours).sum()), int((ours & ~theirs).sum())
    exact, mid = mcnemar(lost, gained)
    low, high = paired_interval(lost, gained, images)
    top5 = int(predictions.in_top.sum()) - int(reference.in_top.sum())
    return Paired(
        lost=lost,
        gained=gained,
        top1_points=100 * (gained - lost) / images,
        top1_interval=Interval(100 * low, 100 * high),
        top5_points=100 * top5 / images,
        mcnemar_exact=exact,
        mcnemar_mid=mid,
    )
