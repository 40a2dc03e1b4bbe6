"""What PyTorch itself does on the GPU, so that a reader sees what TensorRT brings: eager, and as a CUDA graph."""

from __future__ import annotations

import copy
import itertools
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from calib.network import Network
from calib.table import CalibrationTable
from common.config import EngineConfig, PrecisionName
from engines.base import Compiled, Engine, EngineError, Outputs, map_outputs
from engines.gpu import GpuError, find_gpu, precision_problem

logger = logging.getLogger(__name__)

WARM_UP_RUNS = 3
"""Before a capture: cuDNN has then chosen its kernels, and every buffer is allocated."""


class CudaEngine(Engine):
    """PyTorch on an NVIDIA GPU, with cuDNN's benchmark mode; a baseline beside the TensorRT rows.

    Args:
        config: Device index, TF32.
        graphs: Whether the whole network is replayed as one CUDA graph per input shape.
    """

    def __init__(self, config: EngineConfig, graphs: bool = False) -> None:
        self.name = "torch-cuda-graphs" if graphs else "torch-cuda"
        self._config = config
        self._graphs = graphs

    def unavailable(self) -> str | None:
        """Why there is no GPU to use, or None."""
        try:
            find_gpu(self._config.device)
        except GpuError as error:
            return str(error)
        return None

    def compile(self, network: Network, precision: PrecisionName, table: CalibrationTable | None = None) -> Compiled:
        """See :meth:`engines.base.Engine.compile`; there is no INT8."""
        try:
            gpu = find_gpu(self._config.device)
        except GpuError as error:
            raise EngineError(str(error)) from error
        problem = precision_problem(precision, gpu)
        if problem:
            raise EngineError(problem)
        device = torch.device("cuda", gpu.index)
        half = precision == "fp16"
        try:
            module = copy.deepcopy(network.module)
            module.to(device, memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        except torch.cuda.OutOfMemoryError as error:
            raise EngineError(
                f"GPU {gpu.index} has no memory left for {network.name}: end what else uses it"
            ) from error
        if half:
            module.half()
        allow_tf32(self._config.tf32)
        torch.backends.cudnn.benchmark = True

        def eager(images: Tensor) -> Tensor | Outputs:
            with torch.inference_mode():
                return map_outputs(Tensor.float, module(images.half())) if half else module(images)

        function = CudaGraphs(eager) if self._graphs else eager
        return Compiled(
            engine=self.name,
            precision=precision,
            device=gpu.name,
            run=on_cpu(function, device),
            run_on_device=function,
            captured=(lambda images: capture(eager, images)) if self._graphs else None,
            size_bytes=sum(item.numel() * item.element_size() for item in module.parameters()),
            details={
                "cuDNN": f"{torch.backends.cudnn.version()}, benchmark mode",
                "TF32": "allowed" if self._config.tf32 else "off",
                "CUDA graphs": "the whole network" if self._graphs else "none",
            },
        )


def allow_tf32(allowed: bool) -> None:
    """Set, for the whole process, whether FP32 convolutions and matrix products may use TF32."""
    with warnings.catch_warnings():
        # Newer versions have other names for the same switches and point to them.
        warnings.simplefilter("ignore", UserWarning)
        torch.backends.cudnn.allow_tf32 = allowed
        torch.backends.cuda.matmul.allow_tf32 = allowed


def on_cpu(run: Callable[[Tensor], Tensor | Outputs], device: torch.device) -> Callable[[Tensor], Tensor | Outputs]:
    """``run``, from and to the CPU.

    Raises (when called):
        EngineError: the GPU has too little memory for the batch.
    """

    def run_from_cpu(images: Tensor) -> Tensor | Outputs:
        try:
            with torch.cuda.device(device):
                return map_outputs(Tensor.cpu, run(images.to(device)))
        except torch.cuda.OutOfMemoryError as error:
            raise EngineError(
                f"{device} has too little free memory for a batch of {len(images)}: take smaller batches"
            ) from error

    return run_from_cpu


class CudaGraphs:
    """A function of one device tensor, captured once for each shape and replayed.

    The result lies in a buffer that the next call with the same shape overwrites.

    Args:
        function: Launches the same kernels whenever the shape is the same, and never waits for the GPU.
    """

    def __init__(self, function: Callable[[Tensor], Tensor | Outputs]) -> None:
        self._function = function
        self._captured: dict[tuple[Any, ...], tuple[Callable[[], Tensor | Outputs], Tensor]] = {}

    def __call__(self, images: Tensor) -> Tensor | Outputs:
        key = (images.shape, images.dtype, images.device)
        # Throughout, since the buffers of a capture in inference mode can be written in no other.
        with torch.inference_mode():
            if key not in self._captured:
                source = images.clone()
                self._captured[key] = capture(self._function, source), source
            replay, source = self._captured[key]
            source.copy_(images)
            return replay()


def capture(function: Callable[[Tensor], Tensor | Outputs], images: Tensor) -> Callable[[], Tensor | Outputs]:
    """``function`` of whatever lies in ``images``, as a CUDA graph.

    Args:
        function: Launches the same kernels each time, and never waits for the GPU.
        images: On the GPU, which must be the current device; the graph reads from where it lies.

    Returns:
        Replays the graph on the current stream, and returns the result's buffer, which the next replay overwrites.
    """
    stream = torch.cuda.Stream(images.device)
    stream.wait_stream(torch.cuda.current_stream(images.device))
    with torch.inference_mode():
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_RUNS):
                function(images)
        torch.cuda.current_stream(images.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = function(images)

    def replay() -> Tensor | Outputs:
        graph.replay()
        return result

    return replay


def baselines(network: Network, config: EngineConfig, precisions: tuple[PrecisionName, ...]) -> list[Compiled]:
    """The network in PyTorch on the GPU: eager and as CUDA graphs, in each precision that there is.

    Args:
        network: A traced float network.
        config: Device index, TF32.
        precisions: That are evaluated; INT8 has no baseline.

    Returns:
        Those that can run; nothing where there is no GPU.
    """
    engines = [CudaEngine(config, graphs) for graphs in (False, True)]
    if engines[0].unavailable():
        return []
    gpu = find_gpu(config.device)
    possible = [name for name in precisions if precision_problem(name, gpu) is None]
    found = []
    for engine, precision in itertools.product(engines, possible):
        try:
            found.append(engine.compile(network, precision))
        except EngineError as error:
            logger.warning("no baseline %s in %s: %s", engine.name, precision, error)
    return found


def baselines_if_possible(
    network: Network, config: EngineConfig, precisions: tuple[PrecisionName, ...]
) -> list[Compiled]:
    """As :func:`baselines`; nothing, and a warning, where the GPU that was asked for cannot be used."""
    try:
        return baselines(network, config, precisions)
    except EngineError as error:
        logger.warning("no baseline on the GPU: %s", error)
        return []
