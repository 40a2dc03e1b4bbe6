"""Building a TensorRT engine through Torch-TensorRT's TorchScript front end, the same way for every precision.

The module ``torch_tensorrt`` is an argument here: only ``support.load`` imports it.
"""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn

from calib.network import Network
from common.config import EngineConfig, PrecisionName
from common.console import stderr_to
from common.errors import first_line
from engines.tensorrt.support import Installed, TensorRTError, require_builder, strongly_typed

MIB = 1024 * 1024
LEAST_MEMORY = 64 * MIB
"""Of a GPU, free: far less than any build takes, for which TensorRT would try most of a minute."""


@dataclass(frozen=True)
class Build:
    """What a TensorRT engine is built with.

    Attributes:
        precisions: What TensorRT may compute in.
        device: Index of the GPU.
        tf32: Whether FP32 may be TF32.
        timing_iterations: That are averaged when a kernel is chosen.
        workspace: MiB; 0 leaves it to TensorRT.
        full_compilation: Whether all of the network must go to TensorRT.
        dla_core: DLA core, with the GPU for what it cannot do; the GPU alone if None.
    """

    precisions: frozenset[PrecisionName]
    device: int = 0
    tf32: bool = False
    timing_iterations: int = 8
    workspace: int = 0
    full_compilation: bool = False
    dla_core: int | None = None

    @classmethod
    def of(cls, config: EngineConfig, precision: PrecisionName) -> Build:
        """The options of ``config`` for one precision.

        FP32 is allowed beside each precision, but not on a DLA core, which does not compute in it; FP32 itself
        therefore always goes to the GPU.
        """
        dla_core = config.dla_core if precision != "fp32" else None
        precisions: set[PrecisionName] = {precision, "fp32"} if dla_core is None else {precision}
        if precision == "int8" and (config.int8_fp16 or dla_core is not None):
            precisions.add("fp16")  # on a DLA core, for what it cannot do in INT8
        return cls(
            frozenset(precisions),
            config.device,
            config.tf32,
            config.timing_iterations,
            config.workspace,
            config.full_compilation,
            dla_core,
        )


_DTYPES: dict[PrecisionName, torch.dtype] = {"fp32": torch.float, "fp16": torch.half, "int8": torch.int8}


class BuilderLog:
    """What Torch-TensorRT and TensorRT log while an engine is built.

    Attributes:
        text: The log, once the engine is built.
    """

    text = ""

    @contextmanager
    def taking(self) -> Iterator[None]:
        """Take what goes to the process's stderr, where C++ code logs; give back the lines that are errors."""
        with tempfile.TemporaryFile() as file:
            try:
                with stderr_to(file):
                    yield
            finally:
                file.seek(0)
                self.text = file.read().decode("utf-8", "replace")
                for line in self.text.splitlines():
                    if line.startswith("ERROR:"):
                        os.write(2, f"{line}\n".encode())


def compile_arguments(
    torch_tensorrt: ModuleType, shape: Sequence[int], build: Build, dtype: torch.dtype = torch.float
) -> dict[str, Any]:
    """Keyword arguments of ``torch_tensorrt.compile``, without the calibrator.

    Args:
        torch_tensorrt: The module.
        shape: [B, C, H, W] of the one input; the engine takes no other.
        build: Precision, workspace and what else decides the engine.
        dtype: The input's: float32, or float16.
    """
    on_dla = build.dla_core is not None
    return {
        "ir": "ts",
        "inputs": [torch_tensorrt.Input(tuple(shape), dtype=dtype)],
        "enabled_precisions": {_DTYPES[name] for name in build.precisions},
        "device": {
            "device_type": torch_tensorrt.DeviceType.DLA if on_dla else torch_tensorrt.DeviceType.GPU,
            "gpu_id": build.device,
            "dla_core": build.dla_core or 0,
            "allow_gpu_fallback": on_dla,
        },
        "disable_tf32": not build.tf32,
        "num_avg_timing_iters": build.timing_iterations,
        "workspace_size": build.workspace * MIB,
        "require_full_compilation": build.full_compilation,
        "truncate_long_and_double": True,
    }


def gpu_device(index: int) -> torch.device:
    """The GPU with this index, as a device."""
    return torch.device("cuda", index)


def to_torchscript(module: nn.Module, shape: Sequence[int], device: torch.device, half: bool = False) -> Any:
    """Trace a copy of ``module`` on ``device`` for inputs of ``shape``.

    Tracing (not scripting) leaves a graph without branches, which the front end needs where it does not freeze the
    module: it does not freeze a quantized one, whose weights would be folded with their quantization.
    """
    moved = copy.deepcopy(module).to(device).eval()
    example = torch.zeros(tuple(shape), device=device)
    if half:
        moved, example = moved.half(), example.half()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        return torch.jit.trace(moved, example, check_trace=False)


def build_engine(
    torch_tensorrt: ModuleType,
    installed: Installed,
    module: nn.Module,
    shape: Sequence[int],
    build: Build,
    calibrator: object | None = None,
    device: torch.device | None = None,
    log: BuilderLog | None = None,
) -> Any:
    """Compile ``module`` for inputs of ``shape`` through the TorchScript front end.

    Args:
        torch_tensorrt: The module.
        installed: The versions.
        module: float32 [B, C, H, W] -> float32 [B, classes].
        shape: [B, C, H, W].
        build: The options.
        calibrator: For implicit INT8.
        device: Where the module lies while it is compiled; the GPU of ``build`` if None.
        log: Takes the builder's verbose log, which lists the engine's layers.

    Returns:
        A ScriptModule. It takes and gives float16 where the network is strongly typed and ``build`` is FP16.

    Raises:
        TensorRTError: one line with the reason; TensorRT's own messages have gone to stderr before.
    """
    half = takes_half(installed, build)
    device = device or gpu_device(build.device)
    arguments = compile_arguments(torch_tensorrt, shape, build, torch.half if half else torch.float)
    if calibrator is not None:
        arguments["calibrator"] = calibrator
    try:
        torch.cuda.empty_cache()  # what a calibration on the GPU has left to PyTorch
        if is_full(device):
            raise TensorRTError(f"GPU {build.device} has no memory left to build an engine: end what else uses it")
        # Before a builder is asked for: made on a full GPU, that takes most of a minute, and finds no kernels later.
        traced = to_torchscript(module, shape, device, half)
        if device.type == "cuda":
            require_builder(installed, torch.cuda.mem_get_info(device)[0])
        level = torch_tensorrt.logging.errors if log is None else torch_tensorrt.logging.debug
        with warnings.catch_warnings(), level(), nullcontext() if log is None else log.taking():
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch_tensorrt.compile(traced, **arguments)
    except torch.cuda.OutOfMemoryError as error:
        raise TensorRTError(
            f"GPU {build.device} has too little free memory for batches of {shape[0]}: "
            "end what else uses it, or take smaller batches"
        ) from error
    except TensorRTError:
        raise
    except Exception as error:  # C++ and Python errors of every kind mean the same here
        full = f"; GPU {build.device} has no memory left, end what else uses it" if _seems_full(device) else ""
        raise TensorRTError(f"TensorRT could not build the engine: {build_error(error)}{full}") from error


def is_full(device: torch.device) -> bool:
    """Whether a GPU has so little free memory that nothing can be built on it."""
    return device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < LEAST_MEMORY


def _seems_full(device: torch.device) -> bool:
    """As :func:`is_full`, behind a failed build, which may have left a GPU that answers nothing."""
    try:
        return is_full(device)
    except RuntimeError:
        return False


def takes_half(installed: Installed, build: Build) -> bool:
    """Whether the network itself must be float16: strongly typed networks have no FP16 flag."""
    return strongly_typed(installed) and "fp16" in build.precisions and "int8" not in build.precisions


def build_error(error: BaseException) -> str:
    """The line of a compile error that says what is wrong, without the place in Torch-TensorRT's source."""
    line = first_line(error)
    if line.startswith("[Error thrown at"):
        line = line.partition("] ")[2] or line
    if line.startswith("Expected ") and line.endswith("to be true but got false"):
        line = next((item.strip() for item in str(error).splitlines()[1:] if item.strip()), line)
    return line[:300]


def refuse_partial(torch_tensorrt: ModuleType, network: Network, shape: Sequence[int]) -> None:
    """Refuse a network that would be split.

    With several TensorRT engines in one module, the calibrator would feed the images to the first and nothing, or
    again images, to the next.

    Raises:
        TensorRTError: the TorchScript front end does not convert every operation.
    """
    script = to_torchscript(network.module, shape, torch.device("cpu"))
    with torch_tensorrt.logging.errors():
        supported = torch_tensorrt.ts.check_method_op_support(script, "forward")
    if not supported:
        raise TensorRTError(
            f"Torch-TensorRT does not convert every operation of {network.name}, and a calibrator serves one engine: "
            "take --quantization explicit"
        )
