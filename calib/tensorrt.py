"""Calibration by TensorRT itself: what is installed, whether its table still fits, and running its calibrator.

Torch-TensorRT and TensorRT are imported inside functions alone: importing them fails without an NVIDIA driver.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import torch

from calib import cache, tensorrt_build
from calib.graph import Network
from calib.subset import Subset
from calib.table import CalibrationTable, version_string
from calib.tensorrt_build import Build, build_engine, first_line, refuse_partial
from calib.tensorrt_calibrator import Images, data_calibrator
from calib.tensorrt_rules import (
    Gpu,
    Installed,
    TensorRTError,
    algorithm_problem,
    gpu_problem,
    has_calibrator,
    installation_problem,
    precision_problem,
    quantization_mode,
    table_problem,
    three_numbers,
)
from common.config import AlgorithmName, EngineConfig
from common.decode import encode
from common.errors import InputError
from common.files import write_bytes, write_json

logger = logging.getLogger(__name__)


def find_gpu(index: int) -> Gpu:
    """The GPU with this index.

    Raises:
        TensorRTError: PyTorch is a CPU build, there is no driver or no GPU, or not as many.
    """
    if torch.version.cuda is None:
        raise TensorRTError("this PyTorch is a CPU build: install one with CUDA to use an NVIDIA GPU")
    try:
        torch.cuda.init()
        count = torch.cuda.device_count()
    except (RuntimeError, AssertionError) as error:
        # The rest of PyTorch's message is where to download a driver.
        raise TensorRTError(f"no NVIDIA GPU can be used: {first_line(error).partition('. ')[0]}") from error
    if not index < count:
        raise TensorRTError(f"there is no GPU {index}: this machine has {count} (--engine.device counts from 0)")
    return Gpu(index, torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index))


def load() -> tuple[ModuleType, Installed]:
    """Import Torch-TensorRT.

    Returns:
        The module ``torch_tensorrt``, and the versions.

    Raises:
        TensorRTError: it is missing, does not fit the installed torch, or cannot be imported.
    """
    problem = installation_problem(torch.__version__, _distribution_version("torch_tensorrt"))
    if problem:
        raise TensorRTError(problem)
    try:
        with _quiet_import():
            import tensorrt
            import torch_tensorrt

            if has_calibrator(torch_tensorrt.__version__):
                import torch_tensorrt.ts.ptq  # its package does not import it
    except Exception as error:  # its import runs CUDA and loads several libraries
        raise TensorRTError(
            f"Torch-TensorRT cannot be imported ({type(error).__name__}: {first_line(error)}): "
            'check the NVIDIA driver and TensorRT\'s libraries (pip install -e ".[tensorrt]")'
        ) from error
    if not torch_tensorrt.ENABLED_FEATURES.torchscript_frontend:
        raise TensorRTError(f"torch_tensorrt {torch_tensorrt.__version__} comes without its TorchScript front end")
    library = library_version(tensorrt.__version__)
    if library != three_numbers(tensorrt.__version__):
        logger.info("TensorRT's library is %s, its Python bindings are %s", library, tensorrt.__version__)
    return torch_tensorrt, Installed(torch.__version__, torch_tensorrt.__version__, library)


def library_version(bindings: str) -> str:
    """Version of TensorRT's library, such as ``10.6.0``, which builds engines and writes and reads tables.

    It can differ from that of the Python bindings, which work over other libraries of the same major version.

    Args:
        bindings: Version of the bindings, which have loaded the library.

    Raises:
        TensorRTError: the library does not tell.
    """
    major = bindings.split(".", maxsplit=1)[0]
    name = f"nvinfer_{major}.dll" if sys.platform == "win32" else f"libnvinfer.so.{major}"
    try:
        number = ctypes.CDLL(name).getInferLibVersion()
        return version_string(number)
    except (OSError, AttributeError, InputError) as error:
        raise TensorRTError(f"the version of TensorRT's library {name} cannot be found: {first_line(error)}") from error


def usable(index: int) -> tuple[ModuleType, Installed, Gpu]:
    """Torch-TensorRT and a GPU that it can use.

    Raises:
        TensorRTError: one line that says what is missing.
    """
    gpu = find_gpu(index)
    module, installed = load()
    problem = gpu_problem(gpu)
    if problem:
        raise TensorRTError(problem)
    return module, installed, gpu


def _distribution_version(name: str) -> str | None:
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@contextmanager
def _quiet_import() -> Iterator[None]:
    """Hide what Torch-TensorRT logs and warns at import about optional packages; undo what it sets globally."""
    disabled = logging.root.manager.disable
    show = warnings.showwarning
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        if warnings.showwarning is not show:  # it calls logging.captureWarnings(True)
            logging.captureWarnings(False)


@dataclass(frozen=True)
class TensorRTCalibration:
    """TensorRT's own table of a network, by its own tensor names.

    Attributes:
        table: The table.
        path: Its file.
        calibrated: Whether TensorRT calibrated now; otherwise the file was reused and no data was touched.
        reason: Why.
        seconds: That the calibration took.
    """

    table: CalibrationTable
    path: Path
    calibrated: bool
    reason: str
    seconds: float = 0.0


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
    images: Callable[[], tuple[Images, Subset]],
    path: Path,
    provenance: cache.Provenance,
    config: EngineConfig,
    recalibrate: bool = False,
) -> TensorRTCalibration:
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
    torch_tensorrt, installed, gpu = usable(config.device)
    problem = precision_problem("int8", gpu) or algorithm_problem(provenance.algorithm)
    if problem:
        raise TensorRTError(problem)
    quantization_mode("implicit", installed)
    provenance = own_provenance(provenance, network, installed)
    decision = decide(path, provenance, recalibrate)
    if decision.table is not None:
        return TensorRTCalibration(decision.table, path, calibrated=False, reason=decision.reason)
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
    return TensorRTCalibration(table, path, True, decision.reason, time.perf_counter() - start)


def run_calibration(
    torch_tensorrt: ModuleType,
    installed: Installed,
    network: Network,
    source: Images,
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
    device = tensorrt_build.gpu_device(build.device)
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
    """Write TensorRT's table byte for byte, then its side file.

    If this is cut off in between, the digest in the old side file does not fit, and the table is made again.
    """
    record = replace(provenance, table=hashlib.sha256(content).hexdigest())
    write_bytes(path, content)
    write_json(cache.side_file(path), json.loads(encode(record)))
