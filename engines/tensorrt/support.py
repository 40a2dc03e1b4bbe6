"""What this installation and this GPU can do with TensorRT, and which way INT8 goes there.

:func:`load` and :func:`usable` look at the machine, and ``load`` alone imports Torch-TensorRT and TensorRT: importing
them fails without an NVIDIA driver. All else is plain functions of plain values. The versions named were read from the
sources of Torch-TensorRT 2.8.0 to 2.13.0 and of its development branch (2.14); see docs/torch-tensorrt.md.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final, Literal

import torch

from calib.algorithms import ALGORITHMS
from calib.table import CalibrationTable, version_number, version_string
from common.config import AlgorithmName
from common.console import silenced
from common.errors import InputError, first_line
from common.versions import installed_versions
from engines.base import StoppedError
from engines.gpu import Capability, Gpu, GpuError, dotted, find_gpu

logger = logging.getLogger(__name__)

Mode = Literal["implicit", "explicit"]

LAST_WITH_CALIBRATOR: Final = (2, 8)
"""Last Torch-TensorRT with ``torch_tensorrt.ts.ptq.DataLoaderCalibrator``."""
FIRST_STRONGLY_TYPED: Final = (2, 13)
"""First Torch-TensorRT whose TorchScript front end builds strongly typed networks (TensorRT 11)."""
FIRST_WITHOUT_INT8_FLAG: Final = (2, 9)
"""From here to FIRST_STRONGLY_TYPED the front end no longer sets the builder's INT8 flag."""
LEAST_CAPABILITY: Final[Capability] = (7, 5)
"""Least compute capability that TensorRT supports from 10.5 on (Turing); what it supports has INT8 and fast FP16."""

TENSORRT_ALGORITHMS: Final[Mapping[AlgorithmName, str]] = {
    name: algorithm.tensorrt for name, algorithm in ALGORITHMS.items() if algorithm.tensorrt
}
"""Members of ``torch_tensorrt.ts.ptq.CalibrationAlgo``."""


class TensorRTError(StoppedError, InputError):
    """TensorRT cannot do this here: one line that says why and what to do."""


@dataclass(frozen=True)
class Installed:
    """What is installed, such as ``2.8.0+cu128``, ``2.8.0``, ``10.12.0``.

    Attributes:
        torch: Version as the package writes it.
        torch_tensorrt: Version as the package writes it.
        tensorrt: Of TensorRT's library, not of its Python bindings.
    """

    torch: str
    torch_tensorrt: str
    tensorrt: str


def release(version: str) -> tuple[int, int]:
    """(major, minor) of a version: (2, 8) for ``2.8.0+cu128`` and for ``2.8.0a0``."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def three_numbers(version: str) -> str:
    """The version as a calibration table knows it: ``10.12.0`` for ``10.12.0.36``."""
    return ".".join(version.split(".")[:3])


def installation_problem(torch: str, torch_tensorrt: str | None) -> str | None:
    """Why Torch-TensorRT cannot work with this torch, or None. ``torch_tensorrt`` is None where it is missing."""
    if torch_tensorrt is None:
        return "Torch-TensorRT is not installed: install the 'tensorrt' extra (pip install -e \".[tensorrt]\")"
    if release(torch) != release(torch_tensorrt):
        needed = ".".join(str(part) for part in release(torch_tensorrt))
        return f"torch_tensorrt {torch_tensorrt} needs torch {needed}, and {torch} is installed: install the pair"
    if release(torch_tensorrt) < LAST_WITH_CALIBRATOR:
        return f"torch_tensorrt {torch_tensorrt} is older than 2.8.0, the oldest that this program works with"
    return None


def has_calibrator(torch_tensorrt: str) -> bool:
    """Whether this Torch-TensorRT has ``torch_tensorrt.ts.ptq.DataLoaderCalibrator``."""
    return release(torch_tensorrt) <= LAST_WITH_CALIBRATOR


def gpu_problem(gpu: Gpu) -> str | None:
    """Why TensorRT cannot use ``gpu``, or None."""
    if gpu.capability < LEAST_CAPABILITY:
        return (
            f"{gpu.name} has compute capability {dotted(gpu.capability)}, and TensorRT needs at least "
            f"{dotted(LEAST_CAPABILITY)}: use another engine"
        )
    return None


def strongly_typed(installed: Installed) -> bool:
    """Whether the tensors' own types decide the precision of each layer, as TensorRT 11 has it, and not a flag."""
    return release(installed.torch_tensorrt) >= FIRST_STRONGLY_TYPED


def mode_for_named_table(wanted: Literal["auto", "implicit", "explicit"]) -> Mode:
    """How INT8 goes from a table that the user named with ``--cache``: its scales reach TensorRT explicitly alone.

    Args:
        wanted: What was asked for.

    Raises:
        InputError: implicit quantization, which runs from the table that TensorRT makes for itself.
    """
    if wanted == "implicit":
        raise InputError(
            "--cache names a table, and implicit quantization runs from TensorRT's own alone: "
            "take --quantization explicit, or leave --cache out"
        )
    return "explicit"


def quantization_mode(
    wanted: Literal["auto", "implicit", "explicit"],
    installed: Installed,
    needs_explicit: str | None = None,
    dla: bool = False,
) -> tuple[Mode, str]:
    """Which way INT8 goes, and why.

    Args:
        wanted: What was asked for.
        installed: Decides under ``auto``.
        needs_explicit: What only explicit quantization can do, if it is asked for: TensorRT's implicit quantization
            chooses its layers itself, and has its own calibration algorithms alone.
        dla: Whether a DLA core is asked for: it takes implicit quantization alone.

    Raises:
        TensorRTError: what was asked for is not possible with this version.
    """
    version = installed.torch_tensorrt
    calibrator = has_calibrator(version)
    if wanted == "implicit" and not calibrator:
        raise TensorRTError(
            f"Torch-TensorRT {version} has no DataLoaderCalibrator (2.8.0 was the last): "
            "take --quantization explicit, or install torch_tensorrt 2.8.0"
        )
    if wanted == "implicit" and needs_explicit:
        raise TensorRTError(f"implicit quantization cannot do this: {needs_explicit}; take --quantization explicit")
    if dla and (wanted == "explicit" or needs_explicit or not calibrator):
        asked = "explicit quantization was asked for (--quantization explicit, or a table named by --cache)"
        cause = needs_explicit or (asked if wanted == "explicit" else f"{version} is installed")
        raise TensorRTError(
            "INT8 on a DLA core needs implicit quantization by DataLoaderCalibrator (Torch-TensorRT 2.8.0 at most), "
            f"and {cause}: use the GPU, or change that"
        )
    if wanted == "implicit" or (wanted == "auto" and calibrator and not needs_explicit):
        return "implicit", "as asked" if wanted == "implicit" else f"Torch-TensorRT {version} has DataLoaderCalibrator"
    if wanted == "explicit":
        reason = "as asked"
    elif needs_explicit:
        reason = f"implicit quantization cannot do this: {needs_explicit}"
    else:
        reason = f"Torch-TensorRT {version} has no DataLoaderCalibrator"
    if FIRST_WITHOUT_INT8_FLAG <= release(version) < FIRST_STRONGLY_TYPED:
        reason += "; versions 2.9 to 2.12 no longer set TensorRT's INT8 flag, and TensorRT may refuse the network"
    return "explicit", reason


def table_problem(table: CalibrationTable, algorithm: AlgorithmName, tensorrt: str) -> str | None:
    """Why TensorRT would not read ``table`` back, or None: it compares version and algorithm in line 1, nothing else.

    With ``use_cache=True`` there is no data to fall back on, so this is asked before TensorRT is called.

    Args:
        table: That TensorRT wrote.
        algorithm: That is wanted now.
        tensorrt: Installed version, such as ``10.12.0.36``.
    """
    if table.has_version and version_number(table.tensorrt_version) != version_number(three_numbers(tensorrt)):
        return f"its table is of TensorRT {table.tensorrt_version}, and {three_numbers(tensorrt)} is installed"
    if table.algorithm != algorithm:
        return f"its table is of algorithm {table.algorithm}, and {algorithm} is wanted"
    return None


def algorithm_problem(algorithm: AlgorithmName) -> str | None:
    """Why TensorRT cannot calibrate with ``algorithm``, or None."""
    if algorithm not in TENSORRT_ALGORITHMS:
        return (
            f"TensorRT has no {algorithm} calibration: choose from {', '.join(TENSORRT_ALGORITHMS)}, "
            "or take --quantization explicit, which uses this program's own table"
        )
    return None


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
        _say_once(f"TensorRT's library is {library}, its Python bindings are {tensorrt.__version__}")
    return torch_tensorrt, Installed(torch.__version__, torch_tensorrt.__version__, library)


@functools.cache
def _say_once(line: str) -> None:
    logger.info("%s", line)


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


def require_builder(installed: Installed, free: int) -> None:
    """Make sure that TensorRT can give a builder, as it cannot on a full GPU or without its builder resource.

    Torch-TensorRT does not look whether it got one, and would end the process with a segmentation fault. TensorRT's
    bindings do.

    Args:
        installed: The versions.
        free: Bytes of the GPU's memory that are free, for the message.

    Raises:
        TensorRTError: there is no builder; TensorRT's own message has gone to stderr before.
    """
    import tensorrt

    try:
        _first_builder()
        tensorrt.Builder(_native_logger())
    except TypeError as error:  # of pybind11: the factory function returned nullptr
        raise TensorRTError(
            f"TensorRT {installed.tensorrt} gives no builder, for the reason above: {free / 2**30:.1f} GiB of the "
            "GPU's memory are free (end what else uses it), and libnvinfer_builder_resource must lie beside libnvinfer"
        ) from error


@functools.cache
def _first_builder() -> Any:
    """A builder that stays: TensorRT loads its builder resource, in seconds, for the first, and drops it with the last.

    Measured on an H100 with TensorRT 10.6.0: 3.3 to 6.4 s for a builder where there was no other.
    """
    import tensorrt

    return tensorrt.Builder(_native_logger())


@functools.cache
def _native_logger() -> Any:
    """TensorRT's own logger, which needs no lock of Python's; TensorRT keeps its address, so that it must live on."""
    import tensorrt

    return tensorrt.Logger(tensorrt.Logger.ERROR)


def usable(index: int) -> tuple[ModuleType, Installed, Gpu]:
    """Torch-TensorRT and a GPU that it can use.

    Raises:
        TensorRTError: one line that says what is missing.
    """
    try:
        gpu = find_gpu(index)
    except GpuError as error:
        raise TensorRTError(str(error)) from error
    module, installed = load()
    problem = gpu_problem(gpu)
    if problem:
        raise TensorRTError(problem)
    return module, installed, gpu


def _distribution_version(name: str) -> str | None:
    return None if importlib.util.find_spec(name) is None else installed_versions(name).get(name)


@contextmanager
def _quiet_import() -> Iterator[None]:
    """Hide what Torch-TensorRT logs and warns at import about optional packages; undo what it sets globally."""
    show = warnings.showwarning
    try:
        with silenced(logging.WARNING):
            yield
    finally:
        if warnings.showwarning is not show:  # it calls logging.captureWarnings(True)
            logging.captureWarnings(False)
