"""Calibrate a trained network and prepare a precision: ``python quantize.py --precision int8``."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from common.cli import Parser, config_parser, parse, run_command
from common.config import AlgorithmName, Config, PrecisionName
from common.console import print_table, start_logging
from common.errors import ExitCode, InputError
from common.run import Run

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from calib.cache import Provenance
    from calib.calibrator import Calibration, Histograms
    from calib.network import Network
    from calib.plan import Int8Plan
    from calib.subset import Subset
    from calib.table import CalibrationTable
    from common.macs import MacCount
    from data import ImageSet
    from engines import Selection
    from engines.base import Compiled, Engine, OwnCalibration
    from engines.tensorrt.match import Pair
    from evaluation.processes import Processes
    from models.checkpoint import CheckpointMeta

logger = logging.getLogger("quantize")

ALIASES = {
    "--data-dir": "data.dir",
    "--algorithm": "calibration.algorithm",
    "--subset": "calibration.subset",
    "--batches": "calibration.batches",
    "--batch-size": "calibration.batch_size",
    "--skip": "calibration.skip",
    "--engine": "engine.name",
    "--quantization": "quantization.mode",
    "--quantize-output": "quantization.quantize_output",
    "--use-dla-core": "engine.dla_core",
    "--tolerance": "evaluation.tolerance",
    "--agreement": "evaluation.agreement",
}


@dataclasses.dataclass(frozen=True)
class Job:
    """What the command works on."""

    config: Config
    run: Run
    meta: CheckpointMeta
    network: Network
    weights: str
    processes: Processes
    call: Callable[[], None]
    """Calls the other processes to calibrate with this one."""


@dataclasses.dataclass(frozen=True)
class ByTensorRT:
    """TensorRT's own calibration, side by side with ours."""

    calibration: OwnCalibration
    pairs: tuple[Pair, ...]


@dataclasses.dataclass(frozen=True)
class Table:
    """The calibration table that the run uses, and where it came from."""

    table: CalibrationTable
    path: Path
    reason: str
    calibration: Calibration | None


def parser() -> Parser:
    """The command's options."""
    result = config_parser("quantize.py", "Calibrate a trained network and prepare a precision.", ALIASES)
    result.add_argument(
        "--precision", type=PrecisionName, default="int8", help="precision to prepare for the engine that runs here"
    )
    result.add_argument("--cache", type=Path | None, help="calibration table to use or make, instead of the run's own")
    result.add_argument("--recalibrate", action="store_true", help="calibrate even if the cached table serves")
    result.add_argument("--keep-fp", type=str | None, help="layers to keep in float, as in conv1,ip2")
    result.add_argument(
        "--auto-mixed",
        action="store_true",
        help="keep the fewest layers in float that bring INT8 within --tolerance and --agreement (validation images)",
    )
    result.add_argument(
        "--export", type=Literal["onnx"] | None, help="write the FP32 and the Q/DQ INT8 network as ONNX"
    )
    result.add_argument(
        "--compare-algorithms",
        nargs="?",
        const=",".join(get_args(AlgorithmName)),
        type=str | None,
        help="study: accuracy and scales of each algorithm, as in entropy2,minmax (default: all); the run is unchanged",
    )
    result.add_argument(
        "--sweep-images",
        type=str | None,
        help="study: accuracy and spread of the scales with so many images, as in 50,100,500; the run is unchanged",
    )
    result.add_argument("--sweep-seeds", type=int, default=3, help="calibrations for each number of images")
    result.add_argument("--json", action="store_true", help="print JSON alone on stdout")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    from evaluation.processes import joined

    config, flags = parse(parser(), argv)
    with joined() as processes:
        start_logging(logging.INFO if processes.first else logging.ERROR)
        config.engine.warn_of_threads()
        processes.divide(config.engine)
        if not processes.first:
            return helped(config, processes)
        with processes.leading() as call:
            return led(config, flags, processes, call)


def opened(config: Config, processes: Processes, call: Callable[[], None]) -> Job:
    """The trained network, ready to be calibrated."""
    from calib.cache import weights_fingerprint
    from calib.tracing import trace
    from models.checkpoint import load_checkpoint

    run = Run(config.run, config.artifacts)
    checkpoint = load_checkpoint(run.checkpoint, trusted=config.model.class_path)
    meta = checkpoint.meta
    network = trace(checkpoint.network, meta.network, meta.dataset.preprocessing.shape)
    return Job(config, run, meta, network, weights_fingerprint(checkpoint.network), processes, call)


def helped(config: Config, processes: Processes) -> int:
    """In all processes but the first, which alone reads and writes the run: calibrate with it, if it does."""
    failure: Exception | None = None
    try:
        collect = collector(opened(config, processes, lambda: None))
    except Exception as error:  # noqa: BLE001 - raised again, when the others know
        failure = error
    if processes.called(failure):
        collect()
    return ExitCode.PASSED


def led(config: Config, flags: Namespace, processes: Processes, call: Callable[[], None]) -> int:
    """The command, in the first process."""
    if flags.keep_fp is not None:
        config.quantization.keep_fp = [name.strip() for name in flags.keep_fp.split(",") if name.strip()]
    run = Run(config.run, config.artifacts)

    from engines import select_engine
    from engines.tensorrt.support import mode_for_named_table

    with run.locked(create=False):
        job = opened(config, processes, call)
        meta, network = job.meta, job.network
        logger.info("%s, trained on %s; seed %d", meta.network, meta.dataset.title, config.seed)
        for note in meta.dataset.notes:
            logger.warning("%s", note)
        logger.info("traced by %s", network.traced_by)
        for tensor, operation in network.unsupported.items():
            logger.warning("%s (%s) is not understood by INT8 calibration: it stays in float", tensor, operation)
        if flags.compare_algorithms or flags.sweep_images:
            summary = studied(job, flags.compare_algorithms, flags.sweep_images, flags.sweep_seeds)
            print(json.dumps(summary, indent=2)) if flags.json else show_studies(summary)
            return ExitCode.PASSED
        if flags.cache is not None and flags.precision == "int8":
            config.quantization.mode = mode_for_named_table(config.quantization.mode)
            logger.info("--cache names the table: through TensorRT it goes as explicit quantization")
        # Before calibration, which may replace a table.
        selection = select_engine(config.engine, config.quantization, run.folder)
        logger.info("engine %s: %s", selection.engine.name, selection.reason)
        if flags.precision == "int8":
            check_layers(job)
        table = calibrated(job, flags.cache, flags.recalibrate) if flags.precision == "int8" else None
        if flags.auto_mixed:
            mix(job, table)
        by_tensorrt = calibrated_by_tensorrt(job, selection.engine, table, flags.recalibrate) if table else None
        compiled = prepared(job, selection, flags.precision, table)
        if table is not None:
            warn_of_no_int8(job)
        macs = counted(job, table, compiled) if table is not None else None
        files = exported(job, table) if flags.export else []
    summary = summarize(job, table, by_tensorrt, compiled, selection.reason, files, macs)
    if flags.json:
        print(json.dumps(summary, indent=2))
    else:
        show(table, summary)
    return ExitCode.PASSED


def check_layers(job: Job) -> None:
    """Check the names of the layers to keep in float.

    Raises:
        InputError: one of them is no layer of the network.
    """
    any_plan(job)


def any_plan(job: Job) -> Int8Plan:
    """What runs in INT8, for questions whose answer does not depend on the scales: all are 1."""
    from calib.plan import plan_int8
    from calib.table import CalibrationTable

    quantization = job.config.quantization
    scales = CalibrationTable(dict.fromkeys(job.network.tensors, 1.0))
    return plan_int8(job.network, scales, quantization.keep_fp, quantization.quantize_output)


def calibrated(job: Job, cache: Path | None, recalibrate: bool) -> Table:
    """The calibration table: the cached one where it still serves, else a new one, written to the cache."""
    from calib.cache import decide, write

    path = cache or job.run.table(job.network.name)
    wanted = wanted_provenance(job)
    decision = decide(path, wanted, named=cache is not None, recalibrate=recalibrate)
    if decision.table is not None:
        (logger.warning if decision.foreign else logger.info)("using the cached table: %s", decision.reason)
        return Table(decision.table, path, decision.reason, None)
    logger.info("calibrating: %s", decision.reason)
    calibration = calibrate(job, wanted.tensorrt_version)
    write(path, calibration.table, wanted)
    logger.info("wrote the calibration table to %s", path)
    return Table(calibration.table, path, decision.reason, calibration)


def wanted_provenance(job: Job) -> Provenance:
    """What a calibration now would record."""
    from calib.cache import Provenance, SubsetRecord
    from calib.calibrator import algorithm_options
    from calib.table import TESTED_TENSORRT, CalibrationTable
    from models.checkpoint import installed_versions

    config = job.config.calibration
    installed = installed_versions("tensorrt").get("tensorrt", TESTED_TENSORRT)
    version = config.tensorrt_version or installed
    return Provenance(
        maker="reference",
        network=job.network.name,
        algorithm=config.algorithm,
        options=algorithm_options(config),
        # As the table will say it, so that 10.12 and 10.12.0 are one.
        tensorrt_version=CalibrationTable({"data": 1.0}, tensorrt_version=version).tensorrt_version,
        subset=SubsetRecord(config.subset, config.batches, config.batch_size, config.skip, job.config.seed),
        dataset=job.meta.dataset.name,
        data=job.meta.dataset.fingerprint,
        preprocessing=dataclasses.asdict(job.meta.dataset.preprocessing),
        weights=job.weights,
    )


def calibrate(job: Job, tensorrt_version: str) -> Calibration:
    """Run the reference calibrator over the representative subset, logging as sampleINT8 does."""
    from calib.calibrator import algorithm_options, find_thresholds

    config = job.config.calibration
    logger.info(
        "calibration with %s: %d batches of %d images, subset '%s'",
        config.algorithm,
        config.batches,
        config.batch_size,
        config.subset,
    )
    collect = collector(job)
    job.call()
    start = time.perf_counter()
    histograms = collect()
    calibration = find_thresholds(
        histograms, config.algorithm, tensorrt_version=tensorrt_version, options=algorithm_options(config)
    )
    seconds = time.perf_counter() - start
    logger.info("  post-processing took %.4f s", calibration.post_seconds)
    logger.info(
        "calibration of %d images took %.4f s (%.0f images/s)", histograms.images, seconds, histograms.images / seconds
    )
    warn_of_clipping(calibration, job)
    return calibration


def collector(job: Job) -> Callable[[], Histograms]:
    """What makes the histograms over the representative subset, together with the other processes.

    On the GPU, if there is one. Everything that can be found missing is found before.

    Raises:
        InputError: the data cannot be opened, the subset cannot be drawn, or there is no GPU for this process.
    """
    import torch

    from calib.calibrator import collect
    from calib.subset import SubsetImages, draw
    from models.reopen import reopen_data

    processes, config = job.processes, job.config.calibration
    data = reopen_data(job.meta, job.config.data)
    images = SubsetImages(data.train_file, draw(data, len(data.info.classes), config, job.config.seed))
    device = processes.device(job.config.engine)
    network = job.network
    if device.type == "cuda":
        logger.info("calibrating on %s", torch.cuda.get_device_name(device))
        network = dataclasses.replace(network, module=copy.deepcopy(network.module).to(device))
    if processes.count > 1 and job.config.engine.threads is not None:
        torch.set_num_threads(job.config.engine.threads)
    mine = -(-len(images) // processes.count)
    shared = f" of the first of {processes.count} processes" if processes.count > 1 else ""

    def progress(batch: int, seconds: float) -> None:
        logger.info("  calibrated batch %d of %d%s in %.4f s", batch, mine, shared, seconds)

    def run() -> Histograms:
        with processes.group(device) as group:
            return collect(network, images, progress, process_group=group)

    return run


def warn_of_clipping(calibration: Calibration, job: Job) -> None:
    """Name what INT8 reads and a threshold cuts much off."""
    from calib import calibrator
    from calib.network import OUTPUT

    read = {job.network.tensor_of[node] for node in any_plan(job).scales}
    read |= {OUTPUT} if job.config.quantization.quantize_output else set()
    remedy = "--compare-algorithms shows whether another algorithm loses less"
    calibrator.warn_of_clipping(calibration, read, remedy)


def calibrated_by_tensorrt(job: Job, engine: Engine, table: Table, recalibrate: bool) -> ByTensorRT | None:
    """Have TensorRT calibrate as well, where it is to run INT8 from its own table; None elsewhere.

    Raises:
        InputError: TensorRT cannot.
    """
    from calib.subset import draw
    from engines import EngineError
    from engines.tensorrt.match import compare, made_by
    from models.reopen import reopen_data

    def images() -> tuple[ImageSet, Subset]:
        data = reopen_data(job.meta, job.config.data)
        return data.train_file, draw(data, len(data.info.classes), job.config.calibration, job.config.seed)

    try:
        own = engine.own_calibration(job.network, table.table, images, wanted_provenance(job), recalibrate)
    except EngineError as error:
        raise InputError(str(error)) from error
    return ByTensorRT(own, compare(table.table, own.table, made_by(job.network))) if own else None


def prepared(job: Job, selection: Selection, precision: PrecisionName, table: Table | None) -> Compiled:
    """Compile the precision for the engine that runs here, and record the quantization for ``evaluate.py``.

    Raises:
        InputError: that engine cannot run this precision.
    """
    from calib.record import QuantizationRecord, write_record
    from engines import EngineError

    try:
        compiled = selection.compile(job.network, precision, table.table if table else None)
    except EngineError as error:
        raise InputError(f"{selection.engine.name} cannot prepare {precision}: {error}") from error
    if table is not None:
        relative = Path(os.path.relpath(table.path, job.run.folder))
        write_record(job.run.folder, QuantizationRecord(relative, job.weights, job.config.quantization))
    return compiled


def warn_of_no_int8(job: Job) -> None:
    """Say so where every layer that could run in INT8 is kept in float."""
    quantization = job.config.quantization
    able = {layer.name for layer in job.network.layers if layer.kind != "softmax" or quantization.quantize_output}
    if able <= set(quantization.keep_fp):
        logger.warning("no layer of %s is left in INT8: what is prepared as INT8 computes in float", job.network.name)


def counted(job: Job, table: Table, compiled: Compiled) -> MacCount | None:
    """What INT8 multiplies in INT8: as its engine executes it, else as its ONNX form says.

    None where the network cannot be exported; a small share is a warning.
    """
    from calib.plan import plan_int8
    from engines.onnx_macs import exported_macs

    quantization = job.config.quantization
    macs = compiled.macs
    if macs is None:
        try:
            macs = exported_macs(
                plan_int8(job.network, table.table, quantization.keep_fp, quantization.quantize_output)
            )
        except InputError as error:
            logger.warning("multiply-accumulates are not counted: %s", error)
            return None
    warning = macs.warning()
    if warning is not None:
        logger.warning("%s", warning)
    return macs


def mix(job: Job, table: Table | None) -> None:
    """Extend the layers kept in float until INT8 is within the tolerance.

    Raises:
        InputError: INT8 is not being prepared, or no choice of layers suffices.
    """
    from evaluation.studies import mixed_precision
    from models.reopen import reopen_data

    if table is None:
        raise InputError("--auto-mixed goes with --precision int8")
    quantization, options = job.config.quantization, job.config.evaluation
    tolerance, agreement = options.tolerance, options.agreement
    data = reopen_data(job.meta, job.config.data)
    found = mixed_precision(job.network, data, table.table, quantization, tolerance, agreement)
    if found is None:
        raise InputError(
            f"no choice of layers kept in float brings INT8 within {tolerance:g} points of FP32 and to the same class "
            f"for {agreement:g} % of the images: "
            "calibrate with more images or another algorithm"
        )
    layers, points = found
    quantization.keep_fp = [*quantization.keep_fp, *layers]
    logger.info(
        "mixed precision: %s stay in float; INT8 is then %+.2f points from FP32 on the validation images",
        ", ".join(quantization.keep_fp) or "no layers",
        points,
    )


def exported(job: Job, table: Table | None) -> list[str]:
    """Write the ONNX files; returns their paths."""
    from calib.plan import plan_int8
    from engines.onnx_export import export

    quantization = job.config.quantization
    plan = None
    if table is not None:
        plan = plan_int8(job.network, table.table, quantization.keep_fp, quantization.quantize_output)
    provenance = {
        "network": job.network.name,
        "dataset": job.meta.dataset.name,
        "weights": job.weights,
        "seed": str(job.config.seed),
    }
    if table is not None:
        provenance |= {"calibration": table.table.header, "algorithm": table.table.algorithm}
    calibrated = complete(job, table.table.algorithm) if table is not None else None
    written = export(job.network, plan, table.table if table else None, job.run, provenance, calibrated)
    stale = [] if table else stale_exports(job)
    if stale:
        logger.warning(
            "%s stale, exported from other weights: run quantize.py --export onnx for INT8 again, or remove %s",
            f"{stale[0]} is" if len(stale) == 1 else f"{' and '.join(stale)} are",
            "it" if len(stale) == 1 else "them",
        )
    return [str(path) for path in written.files]


def complete(job: Job, algorithm: str) -> Callable[[Path], CalibrationTable] | None:
    """What calibrates an exported file over the representative subset, so that its table has all of TensorRT's entries.

    None where the images are not there, although a table is.

    Args:
        job: The job.
        algorithm: Of the table that it completes, which may be another run's.
    """
    from calib.calibrator import algorithm_options
    from calib.network import INPUT
    from calib.onnx_calibrate import complete_table
    from calib.onnx_source import Batches
    from calib.subset import draw
    from models.reopen import reopen_data

    config = job.config.calibration
    try:
        data = reopen_data(job.meta, job.config.data)
        subset = draw(data, len(data.info.classes), config, job.config.seed)
    except InputError as error:
        logger.warning("what only the ONNX file names takes another tensor's scale in its table: %s", error)
        return None
    sizes = tuple(len(positions) for positions in subset.batches)

    def load(begin: int, end: int) -> dict[str, Any]:
        return {INPUT: data.train_file.images(subset.positions[begin:end]).numpy()}

    options = algorithm_options(config) if config.algorithm == algorithm else None
    batches = Batches(sum(sizes), sizes, load)
    return lambda path: complete_table(path, batches, algorithm, options)


def stale_exports(job: Job) -> list[str]:
    """The INT8 ONNX files of the run that do not say that they hold the weights of ``job``."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    stale = []
    for precision in ("int8", "int8_cpu"):
        path = job.run.onnx(job.network.name, precision)
        try:
            model = onnx.load(path, load_external_data=False)
        except FileNotFoundError:
            continue
        except (OSError, DecodeError):  # no file of this export either
            stale.append(str(path))
            continue
        if {entry.key: entry.value for entry in model.metadata_props}.get("weights") != job.weights:
            stale.append(str(path))
    return stale


def studied(job: Job, algorithms: str | None, counts: str | None, seeds: int) -> dict[str, Any]:
    """Run the studies that were asked for; nothing of the run changes.

    Raises:
        InputError: an unknown algorithm, or a number of images that is not one.
    """
    from evaluation.studies import compare_algorithms, sweep_images
    from models.reopen import reopen_data

    data = reopen_data(job.meta, job.config.data)
    config, quantization, seed = job.config.calibration, job.config.quantization, job.config.seed
    summary: dict[str, Any] = {"run": job.run.name, "network": job.network.name, "seed": seed, "split": "validation"}
    if algorithms:
        names = [name.strip() for name in algorithms.split(",")]
        for name in names:
            if name not in get_args(AlgorithmName):
                raise InputError(f"unknown algorithm {name!r}: take some of {', '.join(get_args(AlgorithmName))}")
        found = compare_algorithms(job.network, data, config, quantization, seed, names)  # type: ignore[arg-type]
        summary["algorithms"] = {name: dataclasses.asdict(outcome) for name, outcome in found.items()}
    if counts:
        if not all(part.strip().isdecimal() and int(part) > 0 for part in counts.split(",")) or seeds < 1:
            raise InputError(f"--sweep-images takes numbers of images such as 50,100,500, not {counts!r}")
        numbers = [int(part) for part in counts.split(",")]
        points = sweep_images(job.network, data, config, quantization, numbers, range(seed, seed + seeds))
        summary["sweep"] = [
            {
                "images": point.images,
                "spread": point.spread,
                "outcomes": [dataclasses.asdict(outcome) for outcome in point.outcomes],
            }
            for point in points
        ]
    return summary


def show_studies(summary: dict[str, Any]) -> None:
    """Print the studies; differences are to FP32, on the validation images."""
    if "algorithms" in summary:
        rows = [
            (
                name,
                f"{one['top1']:.2f} %",
                f"{one['points']:+.2f}",
                f"{one['changed']:.2f} %",
                _decibels(one["sqnr_db"]),
            )
            for name, one in summary["algorithms"].items()
        ]
        print_table(
            "algorithms, INT8 on the validation images", ("algorithm", "top-1", "points", "changed", "SQNR"), rows
        )
        first = next(iter(summary["algorithms"].values()))
        rows = [
            (tensor, *(f"{one['scales'][tensor]:.6g}" for one in summary["algorithms"].values()))
            for tensor in first["scales"]
        ]
        print_table("scales", ("tensor", *summary["algorithms"]), rows)
    if "sweep" in summary:
        rows = []
        for point in summary["sweep"]:
            top1 = [one["top1"] for one in point["outcomes"]]
            worst = max(point["spread"], key=point["spread"].__getitem__)
            rows.append(
                (
                    f"{point['images']}",
                    f"{sum(top1) / len(top1):.2f} %",
                    f"{min(top1):.2f} to {max(top1):.2f} %",
                    f"{max(one['changed'] for one in point['outcomes']):.2f} %",
                    f"{100 * point['spread'][worst]:.2f} % ({worst})",
                )
            )
        columns = ("images", "top-1, mean", "over the seeds", "changed, most", "largest spread of a scale")
        print_table("numbers of calibration images, INT8 on the validation images", columns, rows)


def _decibels(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} dB"


def summarize(
    job: Job,
    table: Table | None,
    by_tensorrt: ByTensorRT | None,
    compiled: Compiled,
    why: str,
    files: list[str],
    macs: MacCount | None,
) -> dict[str, Any]:
    """The result, for ``--json`` and for the terminal."""
    summary: dict[str, Any] = {
        "run": job.run.name,
        "network": job.network.name,
        "traced_by": job.network.traced_by,
        "seed": job.config.seed,
        "dataset": job.meta.dataset.name,
        "notes": list(job.meta.dataset.notes),
        "precision": compiled.precision,
        "engine": {"name": compiled.engine, "device": compiled.device, "reason": why, **compiled.details},
        "keep_fp": list(job.config.quantization.keep_fp),
        "files": files,
    }
    if compiled.latency_note:
        summary["engine"]["note"] = compiled.latency_note
    if macs is not None:
        summary["macs"] = {
            "summary": macs.summary(),
            "total": macs.total,
            "int8": macs.int8,
            "share": macs.share,
            **dataclasses.asdict(macs),
        }
    if table is None:
        return summary
    summary["table"] = {
        "path": str(table.path),
        "header": table.table.header,
        "algorithm": table.table.algorithm,
        "calibrated": table.calibration is not None,
        "reason": table.reason,
        "scales": table.table.finite,
    }
    if by_tensorrt is not None:
        summary["tensorrt"] = {
            "path": str(by_tensorrt.calibration.path),
            "header": by_tensorrt.calibration.table.header,
            "calibrated": by_tensorrt.calibration.calibrated,
            "reason": by_tensorrt.calibration.reason,
            "seconds": by_tensorrt.calibration.seconds,
            "tensors": [{**dataclasses.asdict(pair), "ratio": pair.ratio} for pair in by_tensorrt.pairs],
        }
    if table.calibration is not None:
        histograms = table.calibration.histograms
        summary["calibration"] = {
            "images": histograms.images,
            "batch_seconds": list(histograms.batch_seconds),
            "post_seconds": table.calibration.post_seconds,
            "tensors": {
                name: {
                    "range": histograms.of[job.network.scale_source[name]].range,
                    "threshold": threshold.value,
                    "clipped": table.calibration.clipped(name),
                }
                for name, threshold in table.calibration.thresholds.items()
            },
        }
    return summary


def show(table: Table | None, summary: dict[str, Any]) -> None:
    """Print the result."""
    engine = summary["engine"]
    if table is not None:
        tensors = summary.get("calibration", {}).get("tensors", {})
        rows = []
        for name, scale in table.table.scales.items():
            found = tensors.get(name)
            rows.append(
                (
                    name,
                    f"{found['range']:.6g}" if found else "-",
                    f"{found['threshold'] if found else scale * 127:.6g}",
                    f"{scale:.8g}",
                    f"{100 * found['clipped']:.4f} %" if found else "-",
                )
            )
        print_table(f"{table.table.header}: {table.path}", ("tensor", "range R", "threshold", "scale", "clipped"), rows)
    if "tensorrt" in summary:
        show_side_by_side(summary["tensorrt"])
    print(f"{summary['network']} is ready in {summary['precision']} on {engine['name']}, {engine['device']}")
    if "macs" in summary:
        print(f"{summary['macs']['summary']} ({summary['macs']['source']})")
    if summary["keep_fp"]:
        print(f"kept in float: {', '.join(summary['keep_fp'])}")
    for file in summary["files"]:
        print(f"wrote {file}")
    if "note" in engine:
        print(f"note: {engine['note']}")


def show_side_by_side(tensorrt: dict[str, Any]) -> None:
    """Print TensorRT's own table beside ours."""
    from engines.tensorrt.match import short_name

    def cell(value: str | float | None) -> str:
        return "-" if value is None else f"{value:.8g}" if isinstance(value, float) else short_name(value)

    columns = {
        "reference": "ours",
        "tensorrt": "TensorRT's",
        "reference_scale": "our scale",
        "tensorrt_scale": "TensorRT's scale",
        "ratio": "ratio",
        "note": "",
    }
    rows = [tuple(cell(pair[key]) for key in columns) for pair in tensorrt["tensors"]]
    print_table(f"{tensorrt['header']}: {tensorrt['path']}", tuple(columns.values()), rows)


if __name__ == "__main__":
    run_command(main)
