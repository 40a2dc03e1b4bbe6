"""What one precision gave: the figures of a row of ``report.json``.

Shares are in percent, differences in points (percent of the images), times in milliseconds, sizes in bytes. None
stands for "does not apply", never for zero. Imports no torch: reading and comparing reports starts at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from common.config import PrecisionName

TITLES: Mapping[PrecisionName, str] = {"fp32": "FP32", "fp16": "FP16", "int8": "INT8"}


@dataclass(frozen=True)
class Interval:
    """A 95 % confidence interval, in the unit of what it belongs to."""

    low: float
    high: float


@dataclass(frozen=True)
class ClassAccuracy:
    """Of one class: its images, and how many of them are predicted right."""

    images: int
    correct: int


@dataclass(frozen=True)
class Mistake:
    """A cell of the confusion matrix off its diagonal: ``count`` images of ``label`` were taken for ``predicted``."""

    label: int
    predicted: int
    count: int


@dataclass(frozen=True)
class Accuracy:
    """What one precision got right.

    Attributes:
        images: Images evaluated.
        correct_top1: Images whose most probable class is the label.
        correct_top5: Images whose label is among the five most probable classes (all, with fewer classes).
        top1: Percent.
        top5: Percent.
        top1_interval: Wilson's interval of the top-1 accuracy, percent.
        agreement: Percent of the images for which it predicts the same class as FP32.
        sqnr_db: Signal-to-noise ratio of its outputs against FP32's, in dB; null where they are identical.
        non_finite: Images whose output has a NaN or an infinity; they count as wrong.
        calibration_error: Expected calibration error (15 bins), percent.
        per_class: In label order.
        mistakes: Confusion matrix without its diagonal (which ``per_class`` has), most frequent first.
    """

    images: int
    correct_top1: int
    correct_top5: int
    top1: float
    top5: float
    top1_interval: Interval
    agreement: float
    sqnr_db: float | None
    non_finite: int
    calibration_error: float
    per_class: list[ClassAccuracy]
    mistakes: list[Mistake]


@dataclass(frozen=True)
class Paired:
    """One precision against FP32 on the same images.

    Attributes:
        lost: Images that FP32 gets right and this precision wrong.
        gained: Images that FP32 gets wrong and this precision right.
        top1_points: Top-1 minus FP32's, points.
        top1_interval: Interval of that difference (Bonett and Price), points.
        top5_points: Top-5 minus FP32's, points.
        mcnemar_exact: p-value of McNemar's exact test, two-sided.
        mcnemar_mid: p-value of McNemar's mid-p test, two-sided: the one to read.
    """

    lost: int
    gained: int
    top1_points: float
    top1_interval: Interval
    top5_points: float
    mcnemar_exact: float
    mcnemar_mid: float


@dataclass(frozen=True)
class OutputFigures:
    """One output of a network that gives no class, against FP32's on the same images.

    Attributes:
        name: What the model calls it.
        shape: Of one image's value.
        cosine: Cosine similarity of an image's value to FP32's, mean over the images; null where one is all zero.
        least_cosine: That of the image where it is least.
        sqnr_db: Signal-to-noise ratio, dB; null where they are identical.
        mse: Mean squared error.
        mae: Mean absolute error.
        relative_error: Root of the mean squared error over the standard deviation of FP32's values from image to image
            (over their root mean square where they are the same for all), percent; of several numbers, the root of the
            mean of their squares. Null but for regression.
        non_finite: Images with a NaN or an infinity; they are in no other figure.
    """

    name: str
    shape: list[int]
    cosine: float | None
    least_cosine: float | None
    sqnr_db: float | None
    mse: float
    mae: float
    relative_error: float | None
    non_finite: int


@dataclass(frozen=True)
class TargetError:
    """How far a regression network is from the targets that the data has.

    Attributes:
        mse: Mean squared error.
        mae: Mean absolute error.
        relative_error: As in :class:`OutputFigures`, of the targets instead of FP32's values, percent.
    """

    mse: float
    mae: float
    relative_error: float


@dataclass(frozen=True)
class Timing:
    """Times of many runs of one batch.

    Attributes:
        runs: Timed runs.
        median: Milliseconds per batch.
        p90: 90th percentile, milliseconds per batch.
        p99: 99th percentile, milliseconds per batch.
        per_image: Median over the batch size, milliseconds.
        images_per_second: Batch size over the median.
    """

    runs: int
    median: float
    p90: float
    p99: float
    per_image: float
    images_per_second: float


@dataclass(frozen=True)
class Latency:
    """Latency at one batch size.

    Attributes:
        batch_size: Images per batch.
        compute: The network alone: inputs and outputs stay where it runs. On a GPU it is replayed as a CUDA graph where
            its engine can be; an entry is then the mean of up to 20 replays without a gap.
        without_graph: The same called through its framework instead; null where ``compute`` is no CUDA graph.
        end_to_end: With the copies from and to pinned host memory (GPU alone).
        speedup: FP32's median over this one's; null for FP32 itself and where the latency says nothing.
    """

    batch_size: int
    compute: Timing
    without_graph: Timing | None = None
    end_to_end: Timing | None = None
    speedup: float | None = None


@dataclass(frozen=True)
class Row:
    """One precision on one engine.

    Attributes:
        precision: ``fp32``, ``fp16`` or ``int8``.
        engine: What executed it.
        role: ``reference`` (FP32), ``compared`` (the verdict counts it) or ``baseline`` (shown beside, not judged).
        device: Where it ran; empty if it did not.
        skipped: Why it did not run; null if it did.
        size: Bytes of what would be deployed.
        latency_note: Why its latency says nothing about this precision; null if it does.
        accuracy: Of a classifier; null for other tasks, if it did not run, or was timed alone (a baseline).
        paired: Of a classifier against FP32; null for FP32 itself.
        latency: One entry per batch size.
        details: What the engine says of it.
        outputs: Of other tasks, each output against FP32's; empty for FP32 itself.
        targets: Of regression, against the data's targets; null where it has none.
    """

    precision: PrecisionName
    engine: str
    role: Literal["reference", "compared", "baseline"]
    device: str = ""
    skipped: str | None = None
    size: int | None = None
    latency_note: str | None = None
    accuracy: Accuracy | None = None
    paired: Paired | None = None
    latency: list[Latency] = field(default_factory=list)
    details: dict[str, str] = field(default_factory=dict)
    outputs: list[OutputFigures] = field(default_factory=list)
    targets: TargetError | None = None

    @property
    def judged(self) -> bool:
        """Whether it ran and its outputs were compared with FP32's."""
        return self.paired is not None or bool(self.outputs)
