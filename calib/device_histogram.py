"""All histograms of a network on its own device, counted there without waiting for the device, and shared by processes.

The counts are those of :class:`calib.histogram.AbsHistogram`, to the last one. What makes that possible between
processes: a bin at a doubled range is the bin at the old one, halved, since a power of two leaves float32's digits as
they are. Only a value that equals the range is special: it counts in the last bin of the range at its time, and that
range depends on all batches before. Such values are therefore kept apart, by batch, and placed at the end.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import ProcessGroup

from calib.histogram import BINS, PIECE, SMALLEST, AbsHistogram, flat, refuse_infinite
from common.errors import InputError

logger = logging.getLogger(__name__)

_COPIES = 16
"""Copies of each histogram on a GPU, so that its programs seldom wait for each other's increments."""
_GPU_PIECE = 2**24
"""Values at once where PyTorch's operations count on a GPU: they need several times as much memory."""
_TINY_SCALE = 2.0**64


@dataclass(frozen=True)
class Passes:
    """The two passes over flat values, on their device.

    Attributes:
        find_largest: Raises a float32 [] to their absolute maximum; one below the smallest normal number is 0.
        count: Adds them to int32 [copies, 2049], bin 0 left out or not, given their maximum and the range before,
            float64 [] (0 for none). The last counter is for values equal to the range that holds them.
    """

    find_largest: Callable[[Tensor, Tensor], None]
    count: Callable[[Tensor, Tensor, Tensor, Tensor], None]


class DeviceHistograms:
    """Histograms of several tensors over batches.

    Args:
        names: Of the tensors.
        device: Where their values are; a GPU with its index.
        base: The range that each begins with; without it, the maximum of its first batch that is not all zero.
        rank: Of this process among those that share the batches: batch b is process b modulo ``processes``'s.
        processes: Their number.
    """

    def __init__(
        self,
        names: Sequence[str],
        device: torch.device,
        base: Sequence[float] | None = None,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.names = tuple(names)
        self._rank, self._processes = rank, processes
        self._index = {name: index for index, name in enumerate(self.names)}
        count = len(self.names)
        self._passes = _passes(device)
        copies = _COPIES if device.type == "cuda" else 1
        self._largest = torch.zeros(count, dtype=torch.float32, device=device)
        self._base = torch.zeros(count, dtype=torch.float64, device=device)
        if base is not None:
            self._base.copy_(torch.tensor(base, dtype=torch.float64))
        self._range = self._base.clone()
        self._batch = torch.zeros(count, copies, BINS + 1, dtype=torch.int32, device=device)
        # Bin 0 is what remains of all values.
        self._counts = torch.zeros(count, BINS, dtype=torch.int64, device=device)
        self._seen = np.zeros(count, dtype=np.int64)
        self._log: list[Tensor] = []
        self._pending: list[tuple[Tensor, torch.cuda.Event | None]] = []
        self._checked = 0
        self._late: frozenset[int] = frozenset()

    def add(self, name: str, batch: Tensor) -> None:
        """Count a tensor's values in this batch; once in each batch.

        Raises:
            InputError: the tensor has too many values.
            TypeError: its dtype is none of float32, float16 and bfloat16.
        """
        index = self._index.get(name)
        if index is None:
            return
        if batch.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise TypeError(f"histograms count float32 values, not {batch.dtype}")
        values = flat(batch.detach())
        if values.numel() == 0:
            return
        if values.numel() >= 2**31:
            raise InputError(f"{values.numel()} values in one tensor of a batch are too many: take smaller batches")
        self._seen[index] += values.numel()
        self._passes.find_largest(values, self._largest[index])
        if index not in self._late:
            self._passes.count(values, self._largest[index], self._range[index], self._batch[index])

    def end_batch(self) -> None:
        """Enter the batch's counts.

        Raises:
            InputError: an earlier batch holds NaN or infinity (this one's values are judged later, without a wait).
        """
        largest = self._largest.double()
        widened, doublings = widen(self._range, largest)
        late = sorted(self._late)
        if late:
            widened[late], doublings[late] = 0.0, 0
        self._base = torch.where(self._range == 0, widened, self._base)
        self._range = widened
        batch = self._batch.sum(dim=1)
        self._counts = shifted(self._counts, doublings)
        self._counts += batch[:, :BINS]
        self._log.append(torch.stack([largest, batch[:, BINS].double()]))
        self._batch.zero_()
        self._largest.zero_()
        self.check(keep=1)
        self._pending.append(self._on_its_way(largest))

    @staticmethod
    def _on_its_way(largest: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        if largest.device.type != "cuda":
            return largest, None
        copy = torch.empty(largest.shape, dtype=largest.dtype, pin_memory=True)
        copy.copy_(largest, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return copy, event

    def check(self, keep: int = 0) -> None:
        """Wait for the counts, but for those of the last ``keep`` batches.

        Raises:
            InputError: values were not finite.
        """
        while len(self._pending) > keep:
            largest, event = self._pending.pop(0)
            if event is not None:
                event.synchronize()
            number = self._rank + self._checked * self._processes + 1
            self._checked += 1
            for name, value in zip(self.names, largest.tolist(), strict=True):
                refuse_infinite(value, f"calibration batch {number}, tensor {name}: ")

    def bases(self) -> list[float]:
        """The range that each tensor began with; 0 while it was all zeros."""
        self.check()
        return self._base.tolist()

    def leave_late(self) -> None:
        """Record only the maxima of tensors that were all zeros so far: their range is agreed on later."""
        self._late = frozenset(index for index, base in enumerate(self.bases()) if base == 0)

    @property
    def late(self) -> tuple[str, ...]:
        """Names of the tensors that :meth:`leave_late` left."""
        return tuple(self.names[index] for index in sorted(self._late))

    def finish(self, group: ProcessGroup | None = None) -> tuple[dict[str, AbsHistogram], dict[str, float]]:
        """The histograms over the batches of all processes.

        Args:
            group: The processes; None if this is the only one.

        Returns:
            Tensor -> histogram; and late tensor -> the range that it begins with (0 if it is all zeros).

        Raises:
            InputError: values are not finite.
        """
        self.check()
        device = self._counts.device
        total = torch.tensor(self._rank + (len(self._log) - 1) * self._processes + 1 if self._log else 0, device=device)
        if group is not None:
            torch.distributed.all_reduce(total, torch.distributed.ReduceOp.MAX, group=group)
        log = torch.zeros(int(total), 2, len(self.names), dtype=torch.float64, device=device)
        if self._log:
            log[self._rank :: self._processes] = torch.stack(self._log)
        seen = torch.from_numpy(self._seen).to(device)
        if group is not None:
            for part in (log, seen):
                torch.distributed.all_reduce(part, group=group)
        maxima, at_range = log.cpu().unbind(dim=1)
        base = self._base.cpu()
        # The range after each batch, as one process has it, and as the process that counted the batch had it.
        known = widen(base, maxima.cummax(dim=0).values)[0]
        own = torch.empty_like(known)
        for rank in range(min(self._processes, len(maxima))):
            share = slice(rank, None, self._processes)
            own[share] = widen(base, maxima[share].cummax(dim=0).values)[0]
        end = known[-1]
        self._counts = shifted(self._counts, _doublings(self._range.cpu(), end).to(device))
        if group is not None:
            torch.distributed.all_reduce(self._counts, group=group)
        counts = self._counts.cpu().numpy()
        bins = torch.where(own == known, BINS - 1, BINS >> _doublings(own, known)) >> _doublings(known, end)
        for batch, index in at_range.nonzero().tolist():
            counts[index, bins[batch, index]] += int(at_range[batch, index])
        totals = seen.cpu().numpy()
        counts[:, 0] = totals - counts[:, 1:].sum(axis=1)
        found = {
            name: _histogram(counts[index], float(end[index]), float(maxima[:, index].max()))
            for name, index in self._index.items()
        }
        first = {
            self.names[index]: next((value for value in maxima[:, index].tolist() if value > 0), 0.0)
            for index in sorted(self._late)
        }
        return found, first


def widen(before: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """The ranges (float64) that hold ``largest`` as well, and how often they double (int64); 0 is no range yet."""
    start = torch.where(before == 0, largest, before)
    doublings = torch.where(largest.isfinite(), _doublings(start, largest).clamp(min=0), 0)
    return torch.ldexp(start, doublings.double()), doublings


def _doublings(small: Tensor, large: Tensor) -> Tensor:
    """The least whole number of doublings of ``small`` that reach ``large``, int64; 0 where one of them is 0."""
    mantissa, exponent = torch.frexp(small)
    other, reached = torch.frexp(large)
    doublings = reached.long() - exponent.long() + (other > mantissa)
    return torch.where((small > 0) & (large > 0), doublings, 0)


def shifted(counts: Tensor, doublings: Tensor) -> Tensor:
    """``counts``, int64 [tensors, 2048], at ranges doubled so often, int64 [tensors]."""
    bins = torch.arange(BINS, device=counts.device) >> doublings.clamp(max=12)[:, None]
    return torch.zeros_like(counts).scatter_add_(1, bins, counts)


def _histogram(counts: NDArray[np.int64], end: float, maximum: float) -> AbsHistogram:
    histogram = AbsHistogram()
    histogram.counts, histogram.range, histogram.maximum = counts.copy(), end, maximum
    return histogram


def _passes(device: torch.device) -> Passes:
    if device.type != "cuda":
        return BY_TORCH
    return _gpu_passes(device.index)


@cache
def _gpu_passes(index: int) -> Passes:
    """Triton's kernels if they work here (they need a C compiler for their launcher), else PyTorch's operations."""
    device = torch.device("cuda", index)
    values = torch.linspace(-3, 2, 5000, device=device)
    before = torch.tensor(1.1, dtype=torch.float64, device=device)
    try:
        from calib import triton_histogram

        found = []
        for passes in (Passes(triton_histogram.find_largest, triton_histogram.count), BY_TORCH):
            largest = torch.zeros((), device=device)
            counts = torch.zeros(_COPIES, BINS + 1, dtype=torch.int32, device=device)
            passes.find_largest(values, largest)
            passes.count(values, largest, before, counts)
            found.append([*counts.sum(dim=0)[1:].tolist(), largest.item()])
        if found[0] == found[1]:
            return Passes(triton_histogram.find_largest, triton_histogram.count)
        problem = "they count wrongly"
    except Exception as error:  # noqa: BLE001 - whatever a compiler for a GPU can raise
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
    logger.warning("Triton's kernels do not work here, and calibration is slower: %s", problem)
    return BY_TORCH


def _find_largest(values: Tensor, out: Tensor) -> None:
    low, high = torch.aminmax(values)
    largest = torch.maximum(-low, high).float()
    out.copy_(torch.where(largest < SMALLEST, 0.0, torch.maximum(out, largest)))


def _count(values: Tensor, largest: Tensor, before: Tensor, out: Tensor) -> None:
    """Without a wait for the GPU, and in several steps through memory."""
    widened, _ = widen(before, largest.double())
    scale = torch.where(widened < BINS * SMALLEST, _TINY_SCALE, 1.0).to(widened)
    factor = torch.where(widened > 0, BINS / (widened * scale), 0.0).float()
    scale = scale.float()
    on_gpu = values.device.type == "cuda"
    for piece in values.split(_GPU_PIECE if on_gpu else PIECE):
        magnitudes = piece.float().abs()
        magnitudes.mul_(magnitudes >= SMALLEST).mul_(scale).mul_(factor)
        bins = magnitudes.to(torch.int32).clamp_(0, BINS)
        # bincount waits for the GPU, and histc takes no integers on the CPU.
        found = torch.histc(bins, BINS + 1, 0, BINS + 1) if on_gpu else torch.bincount(bins, minlength=BINS + 1)
        out[0] += found


BY_TORCH = Passes(_find_largest, _count)
"""PyTorch's operations, for every device."""
