"""The calibration table of a run: the cached one where it still serves, else a new one."""

from __future__ import annotations

import copy
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from calib import cache
from calib.cache import Provenance, SubsetRecord
from calib.calibrator import CalibrationResult, algorithm_options, find_thresholds, warn_of_clipping
from calib.collect import Histograms, collect
from calib.kept import plan_without_scales
from calib.network import OUTPUT, Network
from calib.table import TESTED_TENSORRT, CalibrationTable
from common.config import CalibrationConfig, Config, EngineConfig, QuantizationConfig
from common.processes import Processes
from common.versions import installed_versions
from data.base import DatasetInfo

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunTable:
    """The calibration table that a run uses, and where it came from.

    Attributes:
        table: Under its true algorithm, which line 1 cannot always say.
        path: Its file, the run's own or the one that was named.
        reason: Why it was reused, or made.
        calibration: How it came about; None where it was reused.
    """

    table: CalibrationTable
    path: Path
    reason: str
    calibration: CalibrationResult | None


def wanted_provenance(
    network: Network, weights: str, dataset: DatasetInfo, config: CalibrationConfig, seed: int
) -> Provenance:
    """What a calibration now would record.

    Args:
        network: The traced network.
        weights: Fingerprint of its checkpoint's weights.
        dataset: What it was trained on.
        config: The algorithm and the subset.
        seed: Chooses the subset.
    """
    installed = installed_versions("tensorrt").get("tensorrt", TESTED_TENSORRT)
    version = config.tensorrt_version or installed
    return Provenance(
        maker="reference",
        network=network.name,
        algorithm=config.algorithm,
        options=algorithm_options(config),
        # As the table will say it, so that 10.12 and 10.12.0 are one.
        tensorrt_version=CalibrationTable({"data": 1.0}, tensorrt_version=version).tensorrt_version,
        subset=SubsetRecord(config.subset, config.batches, config.batch_size, config.skip, seed),
        dataset=dataset.name,
        data=dataset.fingerprint,
        # An own transform that there is not has no place there: tables from before that option still serve.
        preprocessing={
            name: value
            for name, value in dataclasses.asdict(dataset.preprocessing).items()
            if value is not None or not name.startswith("transform")
        },
        weights=weights,
    )


def run_table(
    own: Path,
    named: Path | None,
    wanted: Provenance,
    calibrate: Callable[[], CalibrationResult],
    recalibrate: bool = False,
) -> RunTable:
    """The cached table where it serves, else a new one, written in its place.

    Args:
        own: The file of the run's own table, there or not.
        named: The file that the user named instead, see :func:`calib.cache.decide`.
        wanted: What a calibration now would record.
        calibrate: Makes a new table.
        recalibrate: Whether to make one in any case.

    Raises:
        InputError: as :func:`calib.cache.decide` does.
    """
    path = named or own
    decision = cache.decide(path, wanted, named=named is not None, recalibrate=recalibrate)
    if decision.table is not None:
        (logger.warning if decision.foreign else logger.info)("using the cached table: %s", decision.reason)
        return RunTable(decision.table, path, decision.reason, None)
    logger.info("calibrating: %s", decision.reason)
    calibration = calibrate()
    cache.write(path, calibration.table, wanted)
    logger.info("wrote the calibration table to %s", path)
    return RunTable(calibration.table, path, decision.reason, calibration)


def calibrate_subset(
    network: Network,
    subset: Callable[[], Sequence[Tensor]],
    wanted: Provenance,
    config: Config,
    processes: Processes,
    call: Callable[[], None],
) -> CalibrationResult:
    """Run the reference calibrator over the representative subset, logging as sampleINT8 does.

    Args:
        network: The traced network.
        subset: Opens the data and gives the batches of images, float32 [N, C, H, W].
        wanted: What to record: the algorithm, its options, the version for the table's first line.
        config: Its ``engine`` says where values are counted, its ``quantization`` which clipping is warned of.
        processes: Those that share the batches.
        call: Calls the others of them to :func:`collector`'s work.

    Raises:
        InputError: as :func:`collector` and :func:`calib.collect.collect` do.
    """
    logger.info(
        "calibration with %s: %d batches of %d images, subset '%s'",
        wanted.algorithm,
        wanted.subset.batches,
        wanted.subset.batch_size,
        wanted.subset.strategy,
    )
    collect_all = collector(network, subset(), processes, config.engine)
    call()
    start = time.perf_counter()
    histograms = collect_all()
    calibration = find_thresholds(
        histograms, wanted.algorithm, tensorrt_version=wanted.tensorrt_version, options=wanted.options
    )
    seconds = time.perf_counter() - start
    logger.info("  post-processing took %.4f s", calibration.post_seconds)
    logger.info(
        "calibration of %d images took %.4f s (%.0f images/s)", histograms.images, seconds, histograms.images / seconds
    )
    remedy = "--compare-algorithms shows whether another algorithm loses less"
    warn_of_clipping(calibration, _read_in_int8(network, config.quantization), remedy)
    return calibration


def collector(
    network: Network, images: Sequence[Tensor], processes: Processes, engine: EngineConfig
) -> Callable[[], Histograms]:
    """What makes the histograms over the representative subset, together with the other processes.

    On the GPU, if there is one. Everything that can be found missing is found before.

    Args:
        network: The traced network.
        images: The batches, float32 [N, C, H, W]; each process reads its own alone.
        processes: Those that share the batches.
        engine: Says which GPU, and how many threads.

    Raises:
        InputError: there is no GPU for this process.
    """
    device = processes.device(engine)
    if device.type == "cuda":
        logger.info("calibrating on %s", torch.cuda.get_device_name(device))
        network = dataclasses.replace(network, module=copy.deepcopy(network.module).to(device))
    if processes.count > 1 and engine.threads is not None:
        torch.set_num_threads(engine.threads)
    mine = -(-len(images) // processes.count)
    shared = f" of the first of {processes.count} processes" if processes.count > 1 else ""

    def progress(batch: int, seconds: float) -> None:
        logger.info("  calibrated batch %d of %d%s in %.4f s", batch, mine, shared, seconds)

    def run() -> Histograms:
        with processes.group(device) as group:
            return collect(network, images, progress, process_group=group)

    return run


def _read_in_int8(network: Network, quantization: QuantizationConfig) -> set[str]:
    """The tensors that INT8 reads."""
    read = {network.tensor_of[node] for node in plan_without_scales(network, quantization).scales}
    return read | ({OUTPUT} if quantization.quantize_output else set())
