"""How a batch is counted on a device: its counters in the device's memory, and PyTorch's operations that fill them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from calib.histogram.base import BINS, PIECE, SMALLEST, count

_GPU_PIECE = 2**24
"""Values at once where PyTorch's operations count on a GPU: they need several times as much memory."""


class Tallies:
    """The counters of T tensors, on their device.

    Attributes:
        base: The range that each began with; 0 while it was all zeros: float64 [T].
        ranges: The ranges before this batch, 0 for none: float64 [T].
        counts: The counts before this batch, by these ranges; bin 0 may be left out: int64 [T, 2048].
        largest: Absolute maxima of this batch; one below the smallest normal number is 0: float32 [T].
        batch: Counts of this batch, int32 [T, 2, 2049]: by the range before where that holds the maximum, else, as
            the second, by the range that holds it. The last counter is for values equal to that range.
        late: Which tensors have no range yet, and only their maxima are wanted: bool [T].
    """

    def __init__(self, tensors: int, device: torch.device, base: Iterable[float] | None = None) -> None:
        self.base = torch.zeros(tensors, dtype=torch.float64, device=device)
        if base is not None:
            self.base.copy_(torch.tensor(list(base), dtype=torch.float64))
        self.ranges = self.base.clone()
        self.counts = torch.zeros(tensors, BINS, dtype=torch.int64, device=device)
        self.largest = torch.zeros(tensors, dtype=torch.float32, device=device)
        self.batch = torch.zeros(tensors, 2, BINS + 1, dtype=torch.int32, device=device)
        self.late = torch.zeros(tensors, dtype=torch.bool, device=device)

    def take(self, ranges: Tensor) -> None:
        """Widen the ranges between two batches, to these: float64 [T]."""
        self.counts.copy_(shifted(self.counts, doublings_of(self.ranges, ranges)))
        self.ranges.copy_(ranges)


class Counter(Protocol):
    """Counts into :class:`Tallies`, without waiting for their device, on the stream that was current when it was made.

    Its device is the current one.
    """

    def __init__(self, tallies: Tallies) -> None: ...

    def count(self, tensor: int, values: Tensor, *, maximum_alone: bool = False) -> None:
        """Count ``values``, flat, of a float dtype, of one tensor.

        Raises ``largest`` to their absolute maximum. Unless ``maximum_alone``, adds them to ``batch``.
        """
        ...

    def enter(self, record: Tensor) -> None:
        """End a batch: widen the ranges, enter the batch's counts, and clear them for the next one.

        Args:
            record: float64 [2, T], which gets the batch's maxima, and how many values are equal to the range.
        """
        ...


class TorchCounter:
    """PyTorch's operations, for every device: in several steps through memory."""

    def __init__(self, tallies: Tallies) -> None:
        self._tallies = tallies

    def count(self, tensor: int, values: Tensor, *, maximum_alone: bool = False) -> None:
        """See :class:`Counter`."""
        largest = self._tallies.largest[tensor]
        low, high = torch.aminmax(values)
        found = torch.maximum(-low, high).float()
        largest.copy_(torch.where(found < SMALLEST, 0.0, torch.maximum(largest, found)))
        if maximum_alone:
            return
        widened, _ = widen(self._tallies.ranges[tensor], largest.double())
        factor = bins_per_unit(widened)
        on_gpu = values.device.type == "cuda"
        for piece in values.split(_GPU_PIECE if on_gpu else PIECE):
            magnitudes = piece.float().abs()
            bins = torch.where(magnitudes < SMALLEST, 0.0, magnitudes * factor).clamp_(max=BINS).to(torch.int32)
            # bincount waits for the GPU, and histc takes no integers on the CPU.
            of_piece = torch.histc(bins, BINS + 1, 0, BINS + 1) if on_gpu else torch.bincount(bins, minlength=BINS + 1)
            # By one of the two ranges, which are equal otherwise: the other's counts are not read.
            self._tallies.batch[tensor] += of_piece.int()

    def enter(self, record: Tensor) -> None:
        """See :class:`Counter`."""
        to = self._tallies
        largest = to.largest.double()
        widened, doublings = widen(to.ranges, largest)
        widened, doublings = torch.where(to.late, 0.0, widened), torch.where(to.late, 0, doublings)
        batch = torch.where((widened == to.ranges)[:, None], to.batch[:, 0], to.batch[:, 1])
        to.base.copy_(torch.where(to.ranges == 0, widened, to.base))
        to.ranges.copy_(widened)
        to.counts.copy_(shifted(to.counts, doublings))
        to.counts += batch[:, :BINS]
        record.copy_(torch.stack([largest, batch[:, BINS].double()]))
        to.batch.zero_()
        to.largest.zero_()


class CpuCounter(TorchCounter):
    """Counts on the CPU as ``calib.histogram.base`` does, in its cache."""

    def count(self, tensor: int, values: Tensor, *, maximum_alone: bool = False) -> None:
        """See :class:`Counter`."""
        if maximum_alone:
            super().count(tensor, values, maximum_alone=True)
            return
        limit = float(self._tallies.ranges[tensor])
        found, again = count(values, limit), 0
        if not found.fits:
            again = 1
            widened, _ = widen(self._tallies.ranges[tensor], torch.tensor(found.largest, dtype=torch.float64))
            found = count(values, float(widened))
        self._tallies.largest[tensor] = 0.0 if found.largest < SMALLEST else found.largest
        self._tallies.batch[tensor, again] += torch.from_numpy(found.counts).int()


def widen(before: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """The ranges (float64) that hold ``largest`` as well, and how often they double (int64); 0 is no range yet.

    As :func:`calib.histogram.base.grown` has it.
    """
    start = torch.where(before == 0, largest, before)
    doublings = torch.where(largest.isfinite(), doublings_of(start, largest), 0)
    multiple = ((largest / start).ceil() * start).maximum(largest)
    leaps = (largest > BINS * start) & largest.isfinite()
    return torch.where(leaps, multiple, doubled(start, doublings)), doublings


def doubled(ranges: Tensor, doublings: Tensor) -> Tensor:
    """Ranges, float64, doubled so often, int64: exactly, which ``ldexp`` is not on a GPU."""
    return ranges * _powers_of_two(ranges.device)[doublings]


def bins_per_unit(ranges: Tensor) -> Tensor:
    """:func:`calib.histogram.base.bins_per_unit` of ranges, float64: float32."""
    return torch.where(ranges > 0, BINS / ranges, 0.0).float()


@cache
def _powers_of_two(device: torch.device) -> Tensor:
    """2**0, 2**1, ...: float64 [256], as many as there are between float32's normal numbers."""
    return torch.tensor([2.0**power for power in range(256)], dtype=torch.float64).to(device)


def doublings_of(small: Tensor, large: Tensor) -> Tensor:
    """The least number of doublings of ``small``, from 0, that reach ``large``, int64; 0 where one of them is 0."""
    mantissa, exponent = torch.frexp(small)
    other, reached = torch.frexp(large)
    doublings = reached.long() - exponent.long() + (other > mantissa)
    return torch.where((small > 0) & (large > 0), doublings, 0).clamp(min=0)


def shifted(counts: Tensor, doublings: Tensor) -> Tensor:
    """``counts``, int64 [tensors, 2048], at ranges doubled so often, int64 [tensors]: 12 where they leap."""
    bins = torch.arange(BINS, device=counts.device) >> doublings.clamp(max=12)[:, None]
    return torch.zeros_like(counts).scatter_add_(1, bins, counts)
