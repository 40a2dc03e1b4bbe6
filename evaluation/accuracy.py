"""Running several precisions over the same images: what each predicts, and how far its outputs are from FP32's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import InputError
from common.processes import ALONE, Processes
from data.base import ImageSet, batches
from engines.base import Compiled
from evaluation.results import Accuracy, ClassAccuracy, Interval, Mistake, Paired
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


def sqnr_db(signal: float, noise: float) -> float | None:
    """10 log10(signal / noise) of two energies; None without noise (or without signal)."""
    return 10 * math.log10(signal / noise) if noise > 0 and signal > 0 else None


def check_range(source: ImageSet, batch_size: int, start: int, count: int | None) -> int:
    """Number of images that ``batches`` will give.

    Raises:
        InputError: none, or fewer batches than asked for.
    """
    total = math.ceil(len(source) / batch_size)
    if start >= total:
        raise InputError(
            f"evaluation.start {start} skips all {total} batches of {batch_size} images ({len(source)} images): "
            "lower --start or --batch-size"
        )
    if count is not None and start + count > total:
        raise InputError(
            f"evaluation.batches {count} from batch {start} on is more than the {total} batches of {batch_size} "
            f"images there are ({len(source)} images)"
        )
    last = len(source) if count is None else min(len(source), (start + count) * batch_size)
    return last - start * batch_size


def predict(
    compiled: Sequence[Compiled], stream: Iterable[tuple[Tensor, Tensor]], classes: int, scores: bool = False
) -> tuple[Tensor, list[Predictions]]:
    """Run every network over the same batches; the first is the reference that the others are measured against.

    Every batch is read once and given to all, so that only predictions are kept, never outputs or images.

    Args:
        compiled: Networks; the first is FP32.
        stream: Batches of (float32 images [B, C, H, W], int64 labels [B]).
        classes: Number of classes.
        scores: Whether the networks give scores, of which the softmax makes probabilities.

    Returns:
        The labels, int64 [N], and the predictions of each network.

    Raises:
        InputError: a label is out of range, an output has another shape, or FP32's outputs are not finite.
    """
    return _finish([_collect(compiled, stream, classes, scores)])


@dataclass(frozen=True)
class _Part:
    """What some of the batches gave: their labels, and each network's predictions."""

    labels: list[Tensor]
    collectors: list[_Collector]


def _collect(
    compiled: Sequence[Compiled], stream: Iterable[tuple[Tensor, Tensor]], classes: int, scores: bool
) -> _Part:
    collectors = [_Collector(scores) for _ in compiled]
    labels: list[Tensor] = []
    for images, target in stream:
        if int(target.min()) < 0 or int(target.max()) >= classes:
            raise InputError(
                f"the data set has labels from {int(target.min())} to {int(target.max())}, "
                f"but the network has {classes} classes"
            )
        labels.append(target)
        reference: Tensor | None = None
        for network, collector in zip(compiled, collectors, strict=True):
            output = network(images)
            if output.shape != (len(images), classes):
                raise InputError(
                    f"{network.engine} {network.precision} gives an output of shape {tuple(output.shape)} for "
                    f"{len(images)} images of {classes} classes: not a classifier of this data set"
                )
            reference = output if reference is None else reference
            collector.add(output, reference, target)
    return _Part(labels, collectors)


def _finish(parts: Sequence[_Part]) -> tuple[Tensor, list[Predictions]]:
    """The labels and each network's predictions from all parts in order."""
    labels = [labels for part in parts for labels in part.labels]
    if not labels:
        raise InputError("there are no images to evaluate")
    results = [_predictions(collectors) for collectors in zip(*(part.collectors for part in parts), strict=True)]
    if results[0].non_finite:
        raise InputError(
            f"the FP32 outputs are not finite for {results[0].non_finite} of {sum(map(len, labels))} images: "
            "the weights are broken, or so large that values overflow; train again"
        )
    return torch.cat(labels), results


class _Collector:
    """Gathers one network's predictions batch by batch."""

    def __init__(self, scores: bool) -> None:
        self._scores = scores
        self.predicted: list[Tensor] = []
        self.confidence: list[Tensor] = []
        self.in_top: list[Tensor] = []
        self.signal: list[float] = []
        self.noise: list[float] = []

    def add(self, output: Tensor, reference: Tensor, labels: Tensor) -> None:
        finite = output.isfinite().all(dim=1)
        safe = torch.where(finite[:, None], output, torch.zeros_like(output))
        top = safe.topk(min(TOP_K, output.shape[1]), dim=1)
        self.predicted.append(top.indices[:, 0].int().masked_fill_(~finite, -1))
        highest = top.values[:, 0].float()
        if self._scores:
            highest = (highest - safe.float().logsumexp(dim=1)).exp().masked_fill_(~finite, 0.0)
        self.confidence.append(highest)
        self.in_top.append((top.indices == labels[:, None]).any(dim=1) & finite)
        both = finite & reference.isfinite().all(dim=1)
        truth, other = reference[both].double(), output[both].double()
        self.signal.append(float(truth.square().sum()))
        self.noise.append(float((truth - other).square().sum()))


def _predictions(collectors: Sequence[_Collector]) -> Predictions:
    return Predictions(
        predicted=torch.cat([item for collector in collectors for item in collector.predicted]),
        confidence=torch.cat([item for collector in collectors for item in collector.confidence]),
        in_top=torch.cat([item for collector in collectors for item in collector.in_top]),
        # Rounded once, so that the sum is the same however the batches were shared.
        signal=math.fsum(item for collector in collectors for item in collector.signal),
        noise=math.fsum(item for collector in collectors for item in collector.noise),
    )


def tracked(
    stream: Iterator[tuple[Tensor, Tensor]], total: int, title: str, shown: bool = True
) -> Iterator[tuple[Tensor, Tensor]]:
    """``stream`` with a progress bar of ``total`` images on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not (shown and console.is_terminal)) as progress:
        task = progress.add_task(title, total=total)
        for images, labels in stream:
            yield images, labels
            progress.advance(task, len(images))


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


def measure(
    compiled: Sequence[Compiled], source: ImageSet, classes: int, batch_size: int, start: int, count: int | None
) -> tuple[Tensor, list[Predictions]]:
    """:func:`predict` over a part of an image set, with a progress bar; see there and :func:`check_range`."""
    found = measure_shared(compiled, source, classes, batch_size, start, count, ALONE)
    assert found is not None, "the only process is the first"
    return found


def measure_shared(
    compiled: Sequence[Compiled],
    source: ImageSet,
    classes: int,
    batch_size: int,
    start: int,
    count: int | None,
    processes: Processes,
    scores: bool = False,
) -> tuple[Tensor, list[Predictions]] | None:
    """:func:`measure` with each process taking a run of the batches; the first gets everything, the others None.

    Raises:
        InputError: as :func:`predict` and :func:`check_range` do, in any process; the first tells.
    """
    total = check_range(source, batch_size, start, count)
    share = processes.share(math.ceil(total / batch_size))
    mine: _Part | InputError
    try:
        stream = batches(source, batch_size, start + share.start, len(share))
        shown = tracked(stream, total // processes.count, "accuracy", processes.first)
        mine = _collect(compiled, shown, classes, scores)
    except InputError as error:
        mine = error
    parts = processes.gather(mine)
    if parts is None:
        return None
    for part in parts:
        if isinstance(part, InputError):
            raise part
    done = [part for part in parts if isinstance(part, _Part)]
    if len({len(part.collectors) for part in done}) > 1:
        raise InputError("the processes cannot all run the same precisions: use equal machines, or --precisions")
    return _finish(done)
