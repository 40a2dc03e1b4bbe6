"""What an evaluation finds: the dataclasses that ``report.json`` is made of, and the verdict.

Shares are in percent, differences in points (percent of the images), times in milliseconds, sizes in bytes. None
stands for "does not apply", never for zero. Imports no torch: reading and comparing reports starts at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from common.config import PrecisionName
from common.decode import decode
from common.errors import InputError
from common.files import read_json
from common.macs import MacCount
from evaluation.text import points as signed

VERSION = 3
"""Of the format of ``report.json``; raised when a member is added, removed or changes its meaning."""


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
        accuracy: Null if it did not run, or was timed alone (a baseline).
        paired: Against FP32; null for FP32 itself.
        latency: One entry per batch size.
        details: What the engine says of it.
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


@dataclass(frozen=True)
class Verdict:
    """Whether the lower precisions may replace FP32.

    Attributes:
        passed: FP16 (where it ran) and INT8 lose at most ``tolerance`` points of top-1 and of top-5, and predict the
            same class as FP32 for at least ``agreement`` percent of the images.
        tolerance: Points.
        agreement: Percent.
        summary: One sentence.
        reasons: Each finding that decided it.
    """

    passed: bool
    tolerance: float
    agreement: float
    summary: str
    reasons: list[str]

    @property
    def word(self) -> str:
        return "PASSED" if self.passed else "FAILED"


TITLES: Mapping[PrecisionName, str] = {"fp32": "FP32", "fp16": "FP16", "int8": "INT8"}


def is_within(paired: Paired, tolerance: float) -> bool:
    """Whether at most ``tolerance`` points of top-1 and of top-5 are lost against FP32."""
    return all(_within(points, tolerance) for points in (paired.top1_points, paired.top5_points))


def _within(points: float, tolerance: float) -> bool:
    # A loss of exactly the tolerance passes; the slack is far below one image in any data set.
    return -points <= tolerance + 1e-9


def agrees(agreement: float, least: float) -> bool:
    """Whether at least ``least`` percent of the images are given the class that FP32 gives them."""
    return agreement >= least - 1e-9


def judge(rows: Sequence[Row], tolerance: float, agreement: float) -> Verdict:
    """The verdict on FP16 and INT8, each against FP32.

    Each must lose at most ``tolerance`` points of top-1 and of top-5, and predict the same class for at least
    ``agreement`` percent of the images. A small gain passes; a precision that is right more often because it is another
    network does not agree. FP16 may be absent (hardware without it); without INT8 there is no PASSED.
    """
    reasons: list[str] = []
    failed: list[str] = []
    for row in rows:
        if row.role != "compared":
            continue
        title = TITLES[row.precision]
        if row.accuracy is None or row.paired is None:
            reasons.append(f"{title} did not run: {row.skipped}")
            if row.precision == "int8":
                failed.append(reasons[-1])
            continue
        for name, points in (("top-1", row.paired.top1_points), ("top-5", row.paired.top5_points)):
            side = "within" if _within(points, tolerance) else "outside"
            reasons.append(f"{title} {name} is {signed(points)} points from FP32: {side} {tolerance:g}")
            if side == "outside":
                failed.append(reasons[-1])
        same = f"{title} predicts the same class as FP32 for {row.accuracy.agreement:.2f} % of the images"
        if agrees(row.accuracy.agreement, agreement):
            reasons.append(f"{same}: at least {agreement:g} %")
        else:
            reasons.append(f"{same}: less than {agreement:g} %")
            failed.append(reasons[-1])
        if row.accuracy.non_finite:
            reasons.append(f"{title} gave NaN or infinity for {row.accuracy.non_finite:,} images, counted as wrong")
    if not any(row.precision == "int8" and row.role == "compared" for row in rows):
        failed.append("INT8 did not run")
        reasons.append(failed[-1])
    if failed:
        return Verdict(False, tolerance, agreement, "; ".join(failed), reasons)
    judged = [TITLES[row.precision] for row in rows if row.role == "compared" and row.paired is not None]
    verb = "is" if len(judged) == 1 else "are each"
    summary = f"{' and '.join(judged)} {verb} within {tolerance:g} point{'' if tolerance == 1 else 's'} of FP32"
    return Verdict(True, tolerance, agreement, summary, reasons)


@dataclass(frozen=True)
class Data:
    """The images.

    Attributes:
        name: ``mnist``, ``digits``, ...
        title: For people.
        split: ``test``, ``train`` or ``validation``.
        images: How many were evaluated.
        batch_size: Images per batch.
        start: Batches skipped at the beginning.
        batches: Batches evaluated; null for all.
        classes: Names, in label order.
        shape: Channels, height, width.
        fingerprint: Hex digest of the data set.
        notes: What a reader must know of it.
    """

    name: str
    title: str
    split: str
    images: int
    batch_size: int
    start: int
    batches: int | None
    classes: list[str]
    shape: list[int]
    fingerprint: str
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Model:
    """The network.

    Attributes:
        name: Names its files.
        class_path: Its class or factory.
        parameters: Number of weights.
        epochs: Of its training.
        seed: Of its training.
        layers: Names of the layers that can run in INT8.
        unsupported: Operations that stay in float: tensor -> operation.
    """

    name: str
    class_path: str
    parameters: int
    epochs: int
    seed: int
    layers: list[str]
    unsupported: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Environment:
    """The machine and the software.

    Attributes:
        processor: The CPU's model.
        instructions: Those of its instruction sets that matter to these engines, such as ``avx512_vnni``.
        cores: Logical CPUs that this process may use.
        threads: Threads that PyTorch uses within an operation.
        memory: Bytes of RAM; null if unknown.
        system: Operating system.
        versions: Package -> version.
        gpu: The GPU's name; null without one.
        gpu_details: Driver, compute capability, clocks, power state, as text.
    """

    processor: str
    instructions: list[str]
    cores: int
    threads: int
    memory: int | None
    system: str
    versions: dict[str, str]
    gpu: str | None = None
    gpu_details: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Histogram:
    """Counts of |x| in equal bins over [0, range).

    Attributes:
        range: Upper end of the last bin.
        counts: One per bin.
        maximum: Largest |x| seen.
    """

    range: float
    counts: list[int]
    maximum: float


@dataclass(frozen=True)
class TensorFigures:
    """One tensor of the network over some of the evaluated images, and what quantizing it does.

    Attributes:
        name: As in the calibration table.
        histogram: Of its FP32 values.
        quantized: Whether a layer reads it in INT8.
        scale: From the table; null if it has none that can be used.
        threshold: 127 * scale: the largest value that INT8 represents; null without a scale.
        clipped: Percent of the FP32 values beyond the threshold; null without a scale.
        own_sqnr_db: Signal-to-noise ratio when the FP32 values themselves are quantized, dB: what its scale costs.
        sqnr_db: Signal-to-noise ratio of its values in the INT8 network against FP32, dB: what has gathered so far;
            null where identical or not analysed.
        cosine: Cosine similarity of the two; null where one of them is zero or it was not analysed.
    """

    name: str
    histogram: Histogram
    quantized: bool
    scale: float | None = None
    threshold: float | None = None
    clipped: float | None = None
    own_sqnr_db: float | None = None
    sqnr_db: float | None = None
    cosine: float | None = None


@dataclass(frozen=True)
class Calibration:
    """The calibration table.

    Attributes:
        algorithm: ``entropy2``, ...
        tensorrt_version: In the table's first line.
        source: Who made it, and from what: the table's side file, as text.
        scales: Tensor -> scale, in network order.
    """

    algorithm: str
    tensorrt_version: str
    source: dict[str, str]
    scales: dict[str, float]


@dataclass(frozen=True)
class LayerSensitivity:
    """What one layer costs.

    Attributes:
        layer: Its name.
        kind: ``conv``, ``linear``, ...
        noise_share: Its part of the noise that the layers make in the outputs, each on its own, percent; the list is
            ranked by it.
        only_points: Top-1 minus FP32's when only this layer runs in INT8, points.
        only_changed: Percent of the images whose prediction then differs from FP32's.
        only_sqnr_db: Of the outputs then, dB; null where identical.
        without_points: Top-1 minus FP32's when all but this layer run in INT8, points.
        without_changed: Percent of the images whose prediction then differs from FP32's.
        without_sqnr_db: Of the outputs then, dB; null where identical.
    """

    layer: str
    kind: str
    noise_share: float
    only_points: float
    only_changed: float
    only_sqnr_db: float | None
    without_points: float
    without_changed: float
    without_sqnr_db: float | None


@dataclass(frozen=True)
class ChangedImage:
    """An image whose prediction changed from FP32 to another precision.

    Attributes:
        index: Position in the evaluated split.
        label: Its class.
        precision: What it is compared with.
        change: ``lost`` (FP32 is right), ``gained`` (FP32 is wrong) or ``other`` (both are wrong).
        fp32: Class that FP32 predicts.
        fp32_confidence: Its probability.
        predicted: Class that the other precision predicts.
        confidence: Its probability.
        picture: PNG as a data URI.
    """

    index: int
    label: int
    precision: PrecisionName
    change: Literal["lost", "gained", "other"]
    fp32: int
    fp32_confidence: float
    predicted: int
    confidence: float
    picture: str


@dataclass(frozen=True)
class Analysis:
    """Where INT8 loses, and what to do about it.

    Attributes:
        images: Images that the layers were measured on.
        engine: What ran the layers in INT8, for people.
        layers: Ranked: what hurts most comes first.
        suggestion: Layers to keep in higher precision; empty if none is needed or none helps.
        advice: One or two sentences.
    """

    images: int
    engine: str
    layers: list[LayerSensitivity]
    suggestion: list[str]
    advice: str


@dataclass(frozen=True)
class Report:
    """All of an evaluation.

    Attributes:
        version: Of this format.
        run: Name of the run.
        created: Time, ISO 8601 with offset.
        seconds: What the evaluation took, by part.
        verdict: Whether the lower precisions may replace FP32.
        model: The network.
        data: The images.
        engine: What executed the network.
        engine_reason: Why that one.
        rows: One per precision, FP32 first, then baselines.
        calibration: The table; null without one.
        macs: What INT8 multiplies in INT8 and in float, by layer; null where INT8 did not run or cannot be exported.
        tensors: In network order; empty where no report was asked for.
        analysis: Null where it was not asked for.
        changed: Images whose prediction changed; at most a few dozen per precision.
        changed_total: Precision -> how many changed.
        environment: The machine and the software.
        seed: Of the run.
        config: The configuration, every value.
        notes: What a reader must know, such as that stand-in data was used.
    """

    version: int
    run: str
    created: str
    seconds: dict[str, float]
    verdict: Verdict
    model: Model
    data: Data
    engine: str
    engine_reason: str
    rows: list[Row]
    calibration: Calibration | None
    macs: MacCount | None
    tensors: list[TensorFigures]
    analysis: Analysis | None
    changed: list[ChangedImage]
    changed_total: dict[str, int]
    environment: Environment
    seed: int
    config: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def row(self, precision: PrecisionName) -> Row | None:
        """The judged row of a precision."""
        return next((row for row in self.rows if row.precision == precision and row.role != "baseline"), None)

    def title(self, row: Row) -> str:
        """Of a row: the precision, with the engine where that is not the report's."""
        title = TITLES[row.precision]
        return title if row.engine == self.engine else f"{title} {row.engine}"


def read_report(path: Path) -> Report:
    """Read ``report.json``.

    Raises:
        InputError: missing, too large, not JSON, of another version, or of another form.
    """
    value = read_json(path)
    version = value.get("version") if isinstance(value, dict) else None
    if version != VERSION:
        raise InputError(f"{path} is not a report of version {VERSION}: make it again with evaluate.py --report")
    return decode(Report, value, str(path))
