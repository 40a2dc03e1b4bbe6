"""Calibrate a trained network and prepare a precision: ``python quantize.py --precision int8``."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import Parser, config_parser, parse, run_command
from common.config import CalibrationConfig, Config, PrecisionName
from common.console import print_table, start_logging
from common.errors import ExitCode, InputError
from common.run import Run

if TYPE_CHECKING:
    from calib.cache import Provenance
    from calib.calibrator import Calibration
    from calib.graph import Network
    from calib.table import CalibrationTable
    from engines.base import Compiled
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
}


@dataclasses.dataclass(frozen=True)
class Job:
    """What the command works on."""

    config: Config
    run: Run
    meta: CheckpointMeta
    network: Network
    weights: str


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
    result.add_argument("--json", action="store_true", help="print JSON alone on stdout")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    config, flags = parse(parser(), argv)
    start_logging()
    if flags.keep_fp is not None:
        config.quantization.keep_fp = [name.strip() for name in flags.keep_fp.split(",") if name.strip()]
    run = Run(config.run, config.artifacts)

    from calib.cache import weights_fingerprint
    from calib.graph import trace
    from models.checkpoint import load_checkpoint

    with run.locked():
        checkpoint = load_checkpoint(run.checkpoint, trusted=config.model.class_path)
        meta = checkpoint.meta
        network = trace(checkpoint.network, meta.network)
        job = Job(config, run, meta, network, weights_fingerprint(checkpoint.network))
        logger.info("%s, trained on %s; seed %d", meta.network, meta.dataset.title, config.seed)
        for note in meta.dataset.notes:
            logger.warning("%s", note)
        for tensor, operation in network.unsupported.items():
            logger.warning("%s (%s) is not understood by INT8 calibration: it stays in float", tensor, operation)
        table = calibrated(job, flags.cache, flags.recalibrate) if flags.precision == "int8" else None
        compiled, why = prepared(job, flags.precision, table)
    summary = summarize(job, table, compiled, why)
    if flags.json:
        print(json.dumps(summary, indent=2))
    else:
        show(job, table, summary)
    return ExitCode.PASSED


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


def algorithm_options(config: CalibrationConfig) -> dict[str, float]:
    """The parameters that the configured algorithm takes."""
    if config.algorithm == "percentile":
        return {"percentile": config.percentile}
    if config.algorithm == "legacy":
        return {"quantile": config.quantile, "cutoff": config.cutoff}
    return {}


def calibrate(job: Job, tensorrt_version: str) -> Calibration:
    """Run the reference calibrator over the representative subset, logging as sampleINT8 does."""
    from calib.calibrator import collect, find_thresholds
    from calib.subset import draw
    from models.reopen import reopen_data

    config = job.config.calibration
    data = reopen_data(job.meta, job.config.data)
    subset = draw(data, len(data.info.classes), config, job.config.seed)
    logger.info(
        "calibration with %s: %d batches of %d images, subset '%s'",
        config.algorithm,
        config.batches,
        config.batch_size,
        config.subset,
    )

    def progress(batch: int, seconds: float) -> None:
        logger.info("  calibrated batch %d of %d in %.4f s", batch, config.batches, seconds)

    def images() -> Iterator[Any]:
        return (data.train_file.images(positions) for positions in subset.batches)

    start = time.perf_counter()
    histograms = collect(job.network, images(), progress)
    calibration = find_thresholds(
        histograms, config.algorithm, tensorrt_version=tensorrt_version, options=algorithm_options(config)
    )
    logger.info("  post-processing took %.4f s", calibration.post_seconds)
    logger.info("calibration of %d images took %.4f s", histograms.images, time.perf_counter() - start)
    return calibration


def prepared(job: Job, precision: PrecisionName, table: Table | None) -> tuple[Compiled, str]:
    """Compile the precision for the engine that runs here, and record the quantization for ``evaluate.py``.

    Raises:
        InputError: that engine cannot run this precision.
    """
    import os

    from calib.record import QuantizationRecord, write_record
    from engines import EngineError, select_engine

    selection = select_engine(job.config.engine, job.config.quantization, job.run.folder)
    logger.info("engine %s: %s", selection.engine.name, selection.reason)
    try:
        compiled = selection.engine.compile(job.network, precision, table.table if table else None)
    except EngineError as error:
        raise InputError(f"{selection.engine.name} cannot prepare {precision}: {error}") from error
    if table is not None:
        relative = Path(os.path.relpath(table.path, job.run.folder))
        write_record(job.run.folder, QuantizationRecord(relative, job.weights, job.config.quantization))
    return compiled, selection.reason


def summarize(job: Job, table: Table | None, compiled: Compiled, why: str) -> dict[str, Any]:
    """The result, for ``--json`` and for the terminal."""
    summary: dict[str, Any] = {
        "run": job.run.name,
        "network": job.network.name,
        "seed": job.config.seed,
        "dataset": job.meta.dataset.name,
        "notes": list(job.meta.dataset.notes),
        "precision": compiled.precision,
        "engine": {"name": compiled.engine, "device": compiled.device, "reason": why, **compiled.details},
    }
    if compiled.latency_note:
        summary["engine"]["note"] = compiled.latency_note
    if table is None:
        return summary
    summary["table"] = {
        "path": str(table.path),
        "header": table.table.header,
        "algorithm": table.table.algorithm,
        "calibrated": table.calibration is not None,
        "reason": table.reason,
        "scales": dict(table.table.scales),
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


def show(job: Job, table: Table | None, summary: dict[str, Any]) -> None:
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
    print(f"{job.network.name} is ready in {summary['precision']} on {engine['name']}, {engine['device']}")
    if "note" in engine:
        print(f"note: {engine['note']}")


if __name__ == "__main__":
    run_command(main)
