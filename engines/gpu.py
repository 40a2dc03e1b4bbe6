"""NVIDIA GPUs: which there are, and what they compute in."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from common.config import PrecisionName
from common.errors import InputError, first_line

Capability = tuple[int, int]


class GpuError(InputError):
    """There is no such GPU here: one line that says why."""


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU.

    Attributes:
        index: As PyTorch counts.
        name: Such as ``NVIDIA H200``.
        capability: Compute capability, such as (9, 0).
    """

    index: int
    name: str
    capability: Capability


def find_gpu(index: int) -> Gpu:
    """The GPU with this index.

    Raises:
        GpuError: PyTorch is a CPU build, there is no driver or no GPU, or not as many, or the GPU has no memory left.
    """
    if torch.version.cuda is None:
        raise GpuError("this PyTorch is a CPU build: install one with CUDA to use an NVIDIA GPU")
    try:
        torch.cuda.init()
        count = torch.cuda.device_count()
    except (RuntimeError, AssertionError) as error:
        # The rest of PyTorch's message is where to download a driver.
        raise GpuError(f"no NVIDIA GPU can be used: {first_line(error).partition('. ')[0]}") from error
    if not index < count:
        raise GpuError(f"there is no GPU {index}: this machine has {count} (--engine.device counts from 0)")
    try:
        torch.cuda.mem_get_info(index)  # the first call that needs memory there, for CUDA itself
    except RuntimeError as error:
        raise GpuError(f"GPU {index} cannot be used ({first_line(error)}): end what else uses it") from error
    return Gpu(index, torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index))


def has_fast_fp16(capability: Capability) -> bool:
    """Whether a GPU computes faster in FP16 than in FP32: 5.3, 6.0, 6.2 and everything from 7.0 on, not 6.1."""
    return capability in {(5, 3), (6, 0), (6, 2)} or capability >= (7, 0)


def precision_problem(precision: PrecisionName, gpu: Gpu) -> str | None:
    """Why PyTorch does not run ``precision`` on ``gpu``, or None."""
    if precision == "int8":
        return "PyTorch has no INT8 kernels for convolutions on a GPU"
    if precision == "fp16" and not has_fast_fp16(gpu.capability):
        return f"{gpu.name} (compute capability {dotted(gpu.capability)}) has no fast FP16"
    return None


def dotted(capability: Capability) -> str:
    """``(9, 0)`` as ``9.0``."""
    return f"{capability[0]}.{capability[1]}"
