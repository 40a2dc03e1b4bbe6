"""What an evaluation finds: the dataclasses that ``report.json`` is made of.

Its rows are in :mod:`evaluation.measures`, its verdict in :mod:`evaluation.verdict`; what is said there of units
holds here. Imports no torch: reading and comparing reports starts at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from common.config import PrecisionName, Task
from common.decode import decode
from common.errors import InputError
from common.files import read_json
from common.macs import MacCount
from evaluation.measures import TITLES, Row
from evaluation.verdict import Verdict

VERSION = 4
"""Of the format of ``report.json``; raised when a member is added, removed or changes its meaning."""


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
        classes: Names, in label order; empty where the images have none.
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
        task: What its outputs are: ``classify``, ``regress``, ``embed`` or ``detect``.
        task_reason: What told so.
    """

    name: str
    class_path: str
    parameters: int
    epochs: int
    seed: int
    layers: list[str]
    unsupported: dict[str, str] = field(default_factory=dict)
    task: Task = "classify"
    task_reason: str = ""


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
        only_points: Top-1 minus FP32's when only this layer runs in INT8, points; null where no classes are given.
        only_changed: Percent of the images whose prediction then differs from FP32's; null likewise.
        only_sqnr_db: Of the outputs then, dB; null where identical.
        without_points: Top-1 minus FP32's when all but this layer run in INT8, points; null likewise.
        without_changed: Percent of the images whose prediction then differs from FP32's; null likewise.
        without_sqnr_db: Of the outputs then, dB; null where identical.
    """

    layer: str
    kind: str
    noise_share: float
    only_points: float | None
    only_changed: float | None
    only_sqnr_db: float | None
    without_points: float | None
    without_changed: float | None
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
        model: The network, and how it was trained.
        data: The images, and which of them were taken.
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
        seed: Of every random choice.
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
