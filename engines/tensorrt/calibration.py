"""TensorRT's own calibration: whether its table still fits, and running its calibrator where it does not."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from calib import cache
from calib.network import Network
from calib.subset import Subset
from calib.table import CalibrationTable
from common.config import AlgorithmName, EngineConfig
from common.errors import InputError
from common.files import write_bytes
from common.side_file import write_side_file
from data.base import ImageSet
from engines.base import OwnCalibration
from engines.tensorrt import build as building
from engines.tensorrt.build import Build, build_engine, refuse_partial
from engines.tensorrt.calibrator import data_calibrator
from engines.tensorrt.support import (
    Installed,
    TensorRTError,
    algorithm_problem,
    quantization_mode,
    table_problem,
    three_numbers,
    usable,
)

logger = logging.getLogger(__name__)


def decide(path: Path, wanted: cache.Provenance, recalibrate: bool = False) -> cache.Decision:
    """Whether TensorRT has to calibrate, before it is called.

    Args:
        path: TensorRT's table, there or not.
        wanted: What a calibration now would record; its ``tensorrt_version`` is the installed one.
        recalibrate: Whether the user asked for it.
    """
    if not recalibrate and path.exists():
        try:
            problem = table_problem(CalibrationTable.read(path), wanted.algorithm, wanted.tensorrt_version)
        except InputError as error:
            problem = str(error)
        if problem:
            return cache.Decision(None, problem)
    return cache.decide(path, wanted, named=False, recalibrate=recalibrate)


def own_provenance(provenance: cache.Provenance, network: Network, installed: Installed) -> cache.Provenance:
    """What TensorRT's own table is made from, as against the reference's ``provenance``.

    Its ``weights`` are those of the traced network, which is what TensorRT is given.
    """
    return replace(
        provenance,
        maker="tensorrt",
        tensorrt_version=three_numbers(installed.tensorrt),
        weights=cache.weights_fingerprint(network.module),
        table="",
    )


def calibrate(
    network: Network,
    images: Callable[[], tuple[ImageSet, Subset]],
    path: Path,
    provenance: cache.Provenance,
    config: EngineConfig,
    recalibrate: bool = False,
) -> OwnCalibration:
    """Have TensorRT calibrate ``network``, unless the table that it wrote before still fits.

    TensorRT calibrates while it builds an engine; the engine of the calibration batch is thrown away, and each engine
    is built for its own batch size from the table.

    Args:
        network: The float network.
        images: Opens the images, and the batches of them as the reference calibrator takes them; called only if
            TensorRT has to calibrate.
        path: ``<run>/tensorrt/CalibrationTable<Network>``: never the file of our own table, whose names differ.
        provenance: What the reference's table records; TensorRT's is :func:`own_provenance`.
        config: Options of the build.
        recalibrate: Whether to calibrate in any case.

    Returns:
        The table, and whether it was made now.

    Raises:
        TensorRTError: not possible here, or TensorRT failed; the old table is as it was.
    """
    torch_tensorrt, installed, _ = usable(config.device)
    problem = algorithm_problem(provenance.algorithm)
    if problem:
        raise TensorRTError(problem)
    quantization_mode("implicit", installed)
    provenance = own_provenance(provenance, network, installed)
    decision = decide(path, provenance, recalibrate)
    if decision.table is not None:
        return OwnCalibration(decision.table, path, calibrated=False, reason=decision.reason)
    logger.info("TensorRT %s calibrates %s: %s", installed.tensorrt, network.name, decision.reason)
    source, subset = images()
    start = time.perf_counter()
    content = run_calibration(
        torch_tensorrt,
        installed,
        network,
        source,
        subset,
        provenance.algorithm,
        Build.of(config, "int8"),
        options=provenance.options,
    )
    table = CalibrationTable.loads(content.decode("utf-8"), "the table that TensorRT wrote")
    store(path, content, provenance)
    return OwnCalibration(table, path, True, decision.reason, time.perf_counter() - start)


def run_calibration(
    torch_tensorrt: ModuleType,
    installed: Installed,
    network: Network,
    source: ImageSet,
    subset: Subset,
    algorithm: AlgorithmName,
    build: Build,
    options: dict[str, float] | None = None,
) -> bytes:
    """Calibrate and return the table's bytes, as TensorRT wrote them.

    Raises:
        TensorRTError: the network is not all TensorRT's, the build failed, TensorRT took another number of batches
            than there are, or wrote no table.
    """
    device = building.gpu_device(build.device)
    first = source.images(subset.positions[: subset.batch_size])
    refuse_partial(torch_tensorrt, network, first.shape)
    known = {name: value for name, value in (options or {}).items() if name == "quantile"}
    with tempfile.TemporaryDirectory(prefix="calibration-") as folder:
        path = Path(folder) / "table"
        run = data_calibrator(torch_tensorrt, source, subset, path, algorithm, device, **known)
        try:
            build_engine(torch_tensorrt, installed, network.module, first.shape, build, run.calibrator, device)
        except TensorRTError:
            run.check()  # what a callback raised is the cause
            raise
        finally:
            run.batches.clear()
        run.check()
        if run.given != run.expected:
            raise TensorRTError(f"TensorRT took {run.given} of {run.expected} calibration batches: the table is void")
        if not run.written:
            raise TensorRTError("TensorRT built the engine without writing a calibration table")
        return path.read_bytes()


def store(path: Path, content: bytes, provenance: cache.Provenance) -> None:
    """Write TensorRT's table byte for byte, then its side file."""
    write_bytes(path, content)
    write_side_file(path, provenance, "table")
