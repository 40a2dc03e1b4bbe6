"""The two passes over a tensor on a GPU, as Triton kernels. Imports Triton, which comes with PyTorch for CUDA."""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

_BLOCK = 2048
_PROGRAMS = 1024
"""Enough for every GPU to be busy; each takes many blocks of a large tensor."""


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _largest(values, out, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    # The bits of a float32 without its sign are in the order of magnitudes; NaN comes last.
    most = tl.zeros((BLOCK,), tl.int32)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    while start < size:
        position = start + tl.arange(0, BLOCK)
        value = tl.load(values + position, mask=position < size, other=0.0).to(tl.float32)
        most = tl.maximum(most, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        start += tl.num_programs(0) * BLOCK
    found = tl.max(most, 0)
    tl.atomic_max(out, tl.where(found < 0x00800000, 0, found), sem="relaxed")


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _count(values, largest, before, out, size, copies, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    # The range that holds the batch, as AbsHistogram finds it; a maximum that is not finite is refused later.
    most = tl.load(largest).to(tl.float64)
    limit = tl.load(before)
    limit = tl.where(limit == 0.0, most, limit)
    while (most > limit) & (most < 1.0e39):
        limit = limit * 2.0
    # 2048 / limit must not overflow: 2048 * 2**-126 is where it could.
    scale = tl.where(limit < 2.407412430484045e-35, 18446744073709551616.0, 1.0)
    factor = tl.where(limit > 0.0, 2048.0 / (limit * scale), 0.0).to(tl.float32)
    scale = scale.to(tl.float32)
    program = tl.program_id(0).to(tl.int64)
    mine = out + (program % copies) * 2049
    start = program * BLOCK
    while start < size:
        position = start + tl.arange(0, BLOCK)
        value = tl.abs(tl.load(values + position, mask=position < size, other=0.0).to(tl.float32))
        value = tl.where(value < 1.1754943508222875e-38, 0.0, value)
        bins = tl.minimum((value * scale * factor).to(tl.int32), 2048)
        # Bin 0, where a ReLU puts half of all values, is what remains of them.
        tl.atomic_add(mine + bins, 1, mask=bins > 0, sem="relaxed")
        start += tl.num_programs(0) * BLOCK


def find_largest(values: Tensor, out: Tensor) -> None:
    """Raise ``out``, float32 [], to the absolute maximum; see ``calib.device_histogram.Passes``."""
    programs = min(_PROGRAMS, triton.cdiv(values.numel(), _BLOCK))
    with torch.cuda.device_of(values):
        _largest[(programs,)](values, out.view(torch.int32), values.numel(), BLOCK=_BLOCK, num_warps=8)


def count(values: Tensor, largest: Tensor, before: Tensor, out: Tensor) -> None:
    """Count into all bins but the first; see ``calib.device_histogram.Passes``."""
    programs = min(_PROGRAMS, triton.cdiv(values.numel(), _BLOCK))
    with torch.cuda.device_of(values):
        _count[(programs,)](values, largest, before, out, values.numel(), len(out), BLOCK=_BLOCK, num_warps=8)
