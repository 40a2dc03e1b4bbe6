"""One evaluation, from a subject to a :class:`evaluation.results.Report`."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime, timezone

from torch import Tensor

from calib.plan import plan_int8
from calib.table import CalibrationTable
from common.config import Config, PrecisionName
from common.decode import plain
from common.errors import InputError
from common.macs import MacCount
from common.processes import ALONE, Processes
from engines.base import Compiled, EngineError, StoppedError
from engines.select import SelectedEngine
from evaluation.analysis import (
    TENSOR_IMAGES,
    affordable_images,
    analyse,
    changed_images,
    sample,
    tensor_figures,
)
from evaluation.environment import environment
from evaluation.latency import measure_latency
from evaluation.measures import TITLES, Latency, Row
from evaluation.results import VERSION, ChangedImage, Data, Model, Report
from evaluation.running import Found, Measure, run_shared
from evaluation.subject import Subject
from evaluation.tasks import is_predictions, measure_of, with_figures
from evaluation.verdict import Limits, judge

logger = logging.getLogger(__name__)


@dataclass
class Stopwatch:
    """Seconds spent in each part of the evaluation, in order."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time the body under ``name``."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin


@dataclass(frozen=True)
class Measured:
    """What the accuracy run left for the analysis.

    Attributes:
        labels: int64 [N], or targets, float32 [N, K].
        found: Precision -> what it gave, for those that ran.
        measure: By which it was gathered.
        stopped: Precisions that their engine has, and was stopped at.
    """

    labels: Tensor
    found: dict[PrecisionName, Found]
    measure: Measure
    stopped: tuple[PrecisionName, ...] = ()


def evaluate(
    config: Config,
    subject: Subject,
    selection: SelectedEngine,
    baselines: Sequence[Compiled] = (),
    processes: Processes = ALONE,
) -> tuple[Report, Measured] | None:
    """Compile each precision, run them over the same images, time them in turns, and judge.

    Args:
        config: Its ``evaluation`` says which images, how long to time, and what passes.
        subject: What to evaluate.
        selection: What executes it.
        baselines: Other ways to execute the network, timed beside it.
        processes: Those that share the accuracy run.

    Returns:
        The report, without the per-layer parts, and the predictions of each precision; None in all processes but the
        first, which have done their part then.

    Raises:
        InputError: the engine cannot run FP32, or the images or outputs are unusable.
    """
    engine, options = selection.engine, config.evaluation
    task, limits = subject.purpose.task, Limits.of(options)
    measure = measure_of(subject.network, task, len(subject.info.classes))
    watch = Stopwatch()
    # Two builds of an engine can differ in their results: all processes run the first one's.
    turns = processes.first_ahead() if engine.keeps_builds else nullcontext()
    with watch.part("compile"), turns:
        compiled, skipped, stopped = compile_precisions(selection, subject, options.precisions)
    networks = list(compiled.values())
    with watch.part("accuracy"):
        found = run_shared(
            networks, subject.images, measure, options.batch_size, options.start, options.batches, processes
        )
    if found is None:
        return None
    labels, gathered = found
    with watch.part("latency"):
        latency = measure_latency(
            [*networks, *baselines],
            subject.images,
            options.latency_batch_sizes,
            options.latency_seconds,
            options.latency_runs,
            config.engine.device,
        )
    measured = Measured(labels, dict(zip(compiled, gathered, strict=True)), measure, tuple(stopped))
    rows: list[Row] = []
    for precision in TITLES:
        if precision in compiled:
            entries = latency[list(compiled).index(precision)]
            rows.append(_row(compiled[precision], entries, measured))
        else:
            rows.append(Row(precision, engine.name, "compared", skipped=skipped[precision]))
    rows += [
        dataclasses.replace(_timed(network, entries), role="baseline")
        for network, entries in zip(baselines, latency[len(networks) :], strict=True)
    ]
    report = Report(
        version=VERSION,
        run=config.run,
        created=datetime.now(timezone.utc).astimezone().isoformat(timespec="seconds"),
        seconds=watch.seconds,
        verdict=judge(rows, limits, task),
        model=_model(subject),
        data=_data(config, subject, len(labels)),
        engine=engine.name,
        engine_reason=selection.reason,
        rows=rows,
        calibration=subject.int8.description,
        macs=_macs(subject, compiled.get("int8")),
        tensors=[],
        analysis=None,
        changed=[],
        changed_total={},
        environment=environment(config.engine.device),
        seed=config.seed,
        config=plain(config),
        notes=subject.notes,
    )
    return report, measured


def explain(report: Report, measured: Measured, config: Config, subject: Subject) -> Report:
    """Add what only a written report shows: tensors, changed images and, unless switched off, the layers' analysis.

    Args:
        report: Of :func:`evaluate`.
        measured: Its predictions.
        config: Its ``evaluation`` says which images, and whether the layers are analysed.
        subject: What was evaluated.
    """
    options, network, int8 = config.evaluation, subject.network, subject.int8
    watch = Stopwatch(dict(report.seconds))
    first, total = options.start * options.batch_size, len(measured.labels)
    row = report.row("int8")
    plan = None
    if int8.table is not None and row is not None and row.judged:
        plan = plan_int8(network, int8.table, int8.quantization.keep_fp, int8.quantization.quantize_output)
    analysis = None
    with watch.part("tensors"):
        some = sample(subject.images, first, total, TENSOR_IMAGES)
        scales = _usable_scales(int8.table) if int8.table is not None else {}
        tensors = tensor_figures(network, scales, plan if options.analysis else None, some)
    if plan is not None and row is not None and options.analysis:
        limits = Limits.of(options)
        with watch.part("layers"):
            count = options.analysis_images or affordable_images(network, plan, subject.images)
            some = sample(subject.images, first, total, count)
            passed = judge([row], limits, subject.purpose.task).passed
            analysis = analyse(network, plan, some, options.batch_size, measured.measure, limits, passed)
    predictions = {name: found for name, found in measured.found.items() if is_predictions(found)}
    changed: list[ChangedImage] = []
    changed_total: dict[str, int] = {}
    if predictions:
        with watch.part("changed images"):
            changed, changed_total = changed_images(
                subject.images, first, measured.labels, predictions, subject.info.preprocessing
            )
    return dataclasses.replace(
        report,
        seconds=watch.seconds,
        tensors=tensors,
        analysis=analysis,
        changed=changed,
        changed_total=changed_total,
    )


def _macs(subject: Subject, int8: Compiled | None) -> MacCount | None:
    """What INT8 multiplies in INT8; None without INT8, and for a network that cannot be exported."""
    from engines.onnx.macs import macs_of

    table = subject.int8.table
    return macs_of(int8, subject.network, table, subject.int8.quantization) if int8 and table else None


def _usable_scales(table: CalibrationTable) -> dict[str, float]:
    unusable = table.unusable
    return {name: scale for name, scale in table.scales.items() if name not in unusable}


def compile_precisions(
    selection: SelectedEngine, subject: Subject, precisions: Sequence[PrecisionName]
) -> tuple[dict[PrecisionName, Compiled], dict[PrecisionName, str], list[PrecisionName]]:
    """Compile FP32, and of the other precisions those that were asked for.

    Returns:
        The networks; why the others did not run; which of those their engine has, and was stopped at.

    Raises:
        InputError: the engine cannot run FP32, which the others are measured against.
    """
    compiled: dict[PrecisionName, Compiled] = {}
    skipped: dict[PrecisionName, str] = {}
    stopped: list[PrecisionName] = []
    for precision in TITLES:
        if precision != "fp32" and precision not in precisions:
            skipped[precision] = "it was not asked for"
            continue
        if precision == "int8" and subject.int8.table is None:
            skipped[precision] = subject.int8.problem
        else:
            try:
                compiled[precision] = selection.compile(subject.network, precision, subject.int8.table)
                continue
            except EngineError as error:
                if precision == "fp32":
                    name = selection.engine.name
                    raise InputError(f"{name} cannot run {subject.network.name} in FP32: {error}") from error
                skipped[precision] = str(error)
                if isinstance(error, StoppedError):
                    stopped.append(precision)
        logger.warning("%s is skipped: %s", TITLES[precision], skipped[precision])
    return compiled, skipped, stopped


def _timed(network: Compiled, latency: list[Latency]) -> Row:
    return Row(
        precision=network.precision,
        engine=network.engine,
        role="reference" if network.precision == "fp32" else "compared",
        device=network.device,
        size=network.size_bytes,
        latency_note=network.latency_note,
        latency=latency,
        details=dict(network.details),
    )


def _row(network: Compiled, latency: list[Latency], measured: Measured) -> Row:
    found = measured.found
    return with_figures(
        _timed(network, latency), found[network.precision], found["fp32"], measured.labels, measured.measure
    )


def _model(subject: Subject) -> Model:
    return Model(
        name=subject.network.name,
        class_path=subject.meta.class_path,
        parameters=sum(parameter.numel() for parameter in subject.network.module.parameters()),
        epochs=subject.meta.epochs,
        seed=subject.meta.seed,
        layers=[layer.name for layer in subject.network.layers],
        unsupported=dict(subject.network.unsupported),
        task=subject.purpose.task,
        task_reason=subject.purpose.reason,
    )


def _data(config: Config, subject: Subject, images: int) -> Data:
    info, options = subject.info, config.evaluation
    return Data(
        name=info.name,
        title=info.title,
        split=options.split,
        images=images,
        batch_size=options.batch_size,
        start=options.start,
        batches=options.batches,
        classes=list(info.classes),
        shape=list(info.preprocessing.shape),
        fingerprint=info.fingerprint,
        notes=list(info.notes),
    )
