"""The histogram of a tensor's absolute values over calibration batches, as TensorRT's calibrators keep it."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import InputError

BINS = 2048

# Values are binned in pieces that stay in the CPU's cache, and that PyTorch (from 32,768 values on) does not divide
# among threads: the threads of so short an operation would wait for each other longer than it takes, and far longer
# where other programs use the cores.
_PIECE = 32000
# Equal values in a row (zeros, a constant background) would wait for each other's increment of one counter:
# neighbours count into different copies of the histogram.
_LANES = 4
# One counter more than bins: a value equal to the range falls into it, and is moved to the last bin afterwards.
_COUNTERS = BINS + 1
# See AbsHistogram._count.
_NUDGE = 1 + 2.0**-45


class AbsHistogram:
    """Histogram of |x| in 2048 bins over [0, range), with the range rules of TensorRT's calibrators.

    The range is the absolute maximum of the first batch that is not all zero. When a later batch exceeds it, it
    doubles until the batch fits, and neighbouring bins merge. So the result depends on which values form the first
    batch, but not on their order within a batch. Bins are those of exact real arithmetic,
    floor(abs(x) * 2048 / range); a value equal to the range counts in the last bin. Memory is constant.

    Attributes:
        counts: int64 [2048]; their sum is the number of values seen. Zeros seen before the range was known are in
            bin 0, where they belong whatever the range.
        range: Upper end of the last bin; 0 while only zeros were seen.
        maximum: Largest absolute value seen, exactly.
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
            batch: Any shape, any device; float32, or float16 and bfloat16, whose values float32 holds.

        Raises:
            InputError: the batch holds NaN or infinity; the histogram is as it was before.
            TypeError: another dtype.
        """
        if batch.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise TypeError(f"AbsHistogram counts float32 values, not {batch.dtype}")
        values = _flat(batch.detach())
        if values.numel() == 0:
            return
        low, high = (extreme.item() for extreme in torch.aminmax(values))
        largest = max(-low, high)
        if not math.isfinite(largest):
            kind = "NaN" if math.isnan(largest) else "infinity"
            raise InputError(f"the values hold {kind}: the weights or the images are broken")
        self.maximum = max(self.maximum, largest)
        if self.range == 0:
            self.range = largest
        self._widen(largest)
        if self.range == 0:
            self.counts[0] += values.numel()
        else:
            self._count(values, signed=low < 0)

    def share_above(self, threshold: float) -> float:
        """Share of the values beyond ``threshold``, in [0, 1].

        To the resolution of a bin: what lies in the threshold's own bin counts as inside.
        """
        if self.range == 0:
            return 0.0
        inside = min(math.floor(threshold * BINS / self.range) + 1, BINS)
        return float(self.counts[inside:].sum() / self.counts.sum())

    def _widen(self, largest: float) -> None:
        while largest > self.range:
            merged = self.counts.reshape(BINS // 2, 2).sum(axis=1)
            self.counts = np.concatenate([merged, np.zeros(BINS // 2, dtype=np.int64)])
            self.range *= 2

    def _count(self, values: Tensor, signed: bool) -> None:
        """Add ``values`` (flat, contiguous, within the range) to the counts.

        In float64, value * (2048 / range) carries a relative error of a few 2**-53. Value and range have 24 bits
        each, so a quotient that is not an integer is at least 2**-35 (relatively) away from one. Multiplying by
        a factor that is 2**-45 too large therefore keeps every such quotient on its side, and puts the quotients
        that are integers safely above: truncation gives the exact bin.
        """
        factor = BINS / self.range * _NUDGE
        piece = min(_PIECE, values.numel())
        lanes = _lanes(values.device)
        scaled = torch.empty(piece, dtype=torch.float64, device=values.device)
        bins = torch.empty(piece, dtype=torch.int16, device=values.device)
        counts = torch.zeros(_LANES * _COUNTERS, dtype=torch.int64, device=values.device)
        for begin in range(0, values.numel(), piece):
            part = values[begin : begin + piece]
            scaled_part, bins_part = scaled[: part.numel()], bins[: part.numel()]
            scaled_part.copy_(part).mul_(factor)
            bins_part.copy_(scaled_part)
            if signed:
                bins_part.abs_()
            bins_part.add_(lanes[: part.numel()])
            counts += torch.bincount(bins_part, minlength=_LANES * _COUNTERS)
        merged = counts.view(_LANES, _COUNTERS).sum(dim=0).cpu().numpy()
        self.counts += merged[:BINS]
        self.counts[-1] += merged[BINS]


@cache
def _lanes(device: torch.device) -> Tensor:
    """int16 [_PIECE]: where the copy of the histogram that each position counts into begins."""
    return (torch.arange(_PIECE, device=device) % _LANES * _COUNTERS).to(torch.int16)


def _flat(batch: Tensor) -> Tensor:
    """The values of ``batch`` in one contiguous row, in any order, without a copy where memory has no gaps."""
    if not batch.is_contiguous():
        batch = batch.permute(sorted(range(batch.dim()), key=batch.stride, reverse=True))
    return batch.reshape(-1)
