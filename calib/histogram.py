"""The histogram of a tensor's absolute values over calibration batches, as TensorRT's calibrators keep it."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import InputError

BINS = 2048

SMALLEST = float(np.finfo(np.float32).tiny)
"""Smallest normal float32: what lies below counts as zero."""

# Values are binned in pieces that stay in the CPU's cache, and that PyTorch (above 32,768 values) does not divide among
# threads: the threads of so short an operation would wait for each other longer than it takes, and far longer where
# other programs use the cores.
PIECE = 32768


class AbsHistogram:
    """Histogram of |x| in 2048 bins over [0, range), with the range rules of TensorRT's calibrators.

    The range is the absolute maximum of the first batch that is not all zero. When a later batch exceeds it, it
    doubles until the batch fits, and neighbouring bins merge. So the result depends on which values form the first
    batch, but not on their order within a batch. The bin is trunc(abs(x) * (2048 / range)), both operations in
    float32, and at most the last one. Values below the smallest normal float32 are zeros. Memory is constant.

    Attributes:
        counts: int64 [2048]; their sum is the number of values seen. Zeros seen before the range was known are in
            bin 0, where they belong whatever the range.
        range: Upper end of the last bin; 0 while only zeros were seen.
        maximum: Largest absolute value seen, exactly; 0 if that is below the smallest normal float32.
    """

    def __init__(self) -> None:
        self.counts: NDArray[np.int64] = np.zeros(BINS, dtype=np.int64)
        self.range = 0.0
        self.maximum = 0.0

    @property
    def total(self) -> int:
        """Number of values seen."""
        return int(self.counts.sum())

    def add(self, batch: Tensor) -> None:
        """Count one batch.

        Args:
            batch: Any shape, on the CPU; float32, or float16 and bfloat16, whose values float32 holds.

        Raises:
            InputError: the batch holds NaN or infinity; the histogram is as it was before.
            TypeError: another dtype.
        """
        if batch.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise TypeError(f"AbsHistogram counts float32 values, not {batch.dtype}")
        values = flat(batch.detach())
        if values.numel() == 0:
            return
        low, high = (extreme.item() for extreme in torch.aminmax(values))
        self.widen(max(-low, high))
        self._count(values, signed=low < 0)

    def widen(self, largest: float) -> None:
        """Make room for values up to ``largest``, the absolute maximum of the next batch.

        Raises:
            InputError: it is NaN or infinite; the histogram is as it was before.
        """
        refuse_infinite(largest)
        if largest < SMALLEST:
            return
        self.maximum = max(self.maximum, largest)
        if self.range == 0:
            self.range = largest
        while largest > self.range:
            merged = self.counts.reshape(BINS // 2, 2).sum(axis=1)
            self.counts = np.concatenate([merged, np.zeros(BINS // 2, dtype=np.int64)])
            self.range *= 2

    def share_above(self, threshold: float) -> float:
        """Share of the values beyond ``threshold``, in [0, 1].

        To the resolution of a bin: what lies in the threshold's own bin counts as inside.
        """
        if self.range == 0:
            return 0.0
        inside = min(math.floor(threshold * BINS / self.range) + 1, BINS)
        return float(self.counts[inside:].sum() / self.counts.sum())

    def _count(self, values: Tensor, signed: bool) -> None:
        """Add ``values`` (flat, contiguous, within the range) to the counts."""
        if self.range == 0:
            self.counts[0] += values.numel()
            return
        scale = 1.0
        if self.range < BINS * SMALLEST:
            # 2048 / range would overflow, or give a bin to values that are zeros.
            values = torch.where(values.abs() < SMALLEST, 0.0, values)
            scale = 2.0**64
        factor = float(np.float32(BINS / (self.range * scale)))
        # One counter more than bins: a value equal to the range may fall into it.
        counts = torch.zeros(BINS + 1, dtype=torch.int64)
        for piece in values.split(PIECE):
            scaled = piece.to(torch.float32) if scale == 1 else piece.to(torch.float32) * scale
            bins = torch.mul(scaled, factor).to(torch.int16)
            counts += torch.bincount(bins.abs_() if signed else bins, minlength=BINS + 1)
        found = counts.numpy()
        self.counts += found[:BINS]
        self.counts[-1] += found[BINS]


def refuse_infinite(largest: float, where: str = "") -> None:
    """Refuse a tensor whose absolute maximum is no finite number.

    Args:
        largest: The maximum.
        where: What the message begins with.

    Raises:
        InputError: it is NaN or infinite.
    """
    if not math.isfinite(largest):
        kind = "NaN" if math.isnan(largest) else "infinity"
        raise InputError(f"{where}the values hold {kind}: the weights or the images are broken")


def flat(batch: Tensor) -> Tensor:
    """The values of ``batch`` in one contiguous row, in any order, without a copy where memory has no gaps."""
    if not batch.is_contiguous():
        batch = batch.permute(sorted(range(batch.dim()), key=batch.stride, reverse=True))
    return batch.reshape(-1)
