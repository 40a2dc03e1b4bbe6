"""All histograms of a network on its own device, counted there without waiting for the device, and shared by processes.

The counts are those of :class:`calib.histogram.AbsHistogram`, to the last one. What makes that possible between
processes: a bin at a doubled range is the bin at the old one, halved, since a power of two leaves float32's digits as
they are. Only a value that equals the range is special: it counts in the last bin of the range at its time, and that
range depends on all batches before. Such values are therefore kept apart, by batch, and placed at the end.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import ProcessGroup

from calib.cuda_histogram import CudaCounter
from calib.histogram import BINS, PIECE, SMALLEST, AbsHistogram, flat, refuse_infinite
from common.errors import InputError

logger = logging.getLogger(__name__)

_GPU_PIECE = 2**24
"""Values at once where PyTorch's operations count on a GPU: they need several times as much memory."""
_TINY_SCALE = 2.0**64


class Counter(Protocol):
    """Counts tensors of a batch on their device, without waiting for it.

    It is made with ``ranges``, float64 [T], the histograms' ranges before the batch (0 for none); ``largest``, float32
    [T]; and ``counts``, int32 [T, 2, 2049].
    """

    def count(self, tensor: int, values: Tensor, *, maximum_alone: bool = False) -> None:
        """Count ``values``, flat, of a float dtype, of one tensor.

        Raises ``largest`` to their absolute maximum; one below the smallest normal number is 0. Unless
        ``maximum_alone``, adds them to ``counts`` [tensor, 0] by the range before where that holds the maximum, to
        [tensor, 1] by the range that holds it where not. Bin 0 may be left out. The last counter is for values equal
        to the range that holds them.
        """
        ...


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
        self._largest = torch.zeros(count, dtype=torch.float32, device=device)
        self._base = torch.zeros(count, dtype=torch.float64, device=device)
        if base is not None:
            self._base.copy_(torch.tensor(base, dtype=torch.float64))
        self._range = self._base.clone()
        self._batch = torch.zeros(count, 2, BINS + 1, dtype=torch.int32, device=device)
        self._counter = _counter(self._range, self._largest, self._batch)
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
        self._counter.count(index, values, maximum_alone=index in self._late)

    def end_batch(self) -> None:
        """Enter the batch's counts.

        Raises:
            InputError: an earlier batch holds NaN or infinity (this one's values are judged later, without a wait).
        """
        largest = self._largest.double()
        widened, doublings = widen(self._range, largest)
        if self._late:
            late = sorted(self._late)
            widened[late], doublings[late] = 0.0, 0
        self._base = torch.where(self._range == 0, widened, self._base)
        batch = torch.where((widened == self._range)[:, None], self._batch[:, 0], self._batch[:, 1])
        self._range.copy_(widened)
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
            if bool(largest.isfinite().all()):
                continue
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
    # ldexp multiplies by a power that a GPU need not compute exactly.
    return start * _powers_of_two(before.device)[doublings], doublings


@cache
def _powers_of_two(device: torch.device) -> Tensor:
    """2**0, 2**1, ...: float64 [256], as many as there are between float32's normal numbers."""
    return torch.tensor([2.0**power for power in range(256)], dtype=torch.float64).to(device)


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


class TorchCounter:
    """PyTorch's operations, for every device: in several steps through memory."""

    def __init__(self, ranges: Tensor, largest: Tensor, counts: Tensor) -> None:
        self._ranges, self._largest, self._counts = ranges, largest, counts

    def count(self, tensor: int, values: Tensor, *, maximum_alone: bool = False) -> None:
        """Count one tensor's values; see :class:`Counter`."""
        largest = self._largest[tensor]
        low, high = torch.aminmax(values)
        found = torch.maximum(-low, high).float()
        largest.copy_(torch.where(found < SMALLEST, 0.0, torch.maximum(largest, found)))
        if maximum_alone:
            return
        widened, _ = widen(self._ranges[tensor], largest.double())
        scale = torch.where(widened < BINS * SMALLEST, _TINY_SCALE, 1.0).to(widened)
        factor = torch.where(widened > 0, BINS / (widened * scale), 0.0).float()
        scale = scale.float()
        on_gpu = values.device.type == "cuda"
        for piece in values.split(_GPU_PIECE if on_gpu else PIECE):
            magnitudes = piece.float().abs()
            magnitudes.mul_(magnitudes >= SMALLEST).mul_(scale).mul_(factor)
            bins = magnitudes.to(torch.int32).clamp_(0, BINS)
            # bincount waits for the GPU, and histc takes no integers on the CPU.
            of_piece = torch.histc(bins, BINS + 1, 0, BINS + 1) if on_gpu else torch.bincount(bins, minlength=BINS + 1)
            # By one of the two ranges, which are equal otherwise: the other's counts are not read.
            self._counts[tensor] += of_piece.int()


def _counter(ranges: Tensor, largest: Tensor, counts: Tensor) -> Counter:
    """The counter for the tensors' device."""
    kind = TorchCounter if ranges.device.type != "cuda" else _gpu_counter(ranges.device.index)
    return kind(ranges, largest, counts)


@cache
def _gpu_counter(index: int) -> type[TorchCounter | CudaCounter]:
    """The own kernel, if it can be compiled here and counts as PyTorch's operations do; else those."""
    device = torch.device("cuda", index)
    values = torch.linspace(-3, 2, 100_000, device=device)
    ranges = torch.tensor([1.1, 3.0, 0.0], dtype=torch.float64, device=device)
    found = []
    try:
        for kind in (CudaCounter, TorchCounter):
            largest = torch.zeros(3, device=device)
            counts = torch.zeros(3, 2, BINS + 1, dtype=torch.int32, device=device)
            counter = kind(ranges, largest, counts)
            for tensor in range(3):
                counter.count(tensor, values)
            found.append([largest.tolist(), counts[[0, 1, 2], [1, 0, 1], 1:].tolist()])
        if found[0] == found[1]:
            return CudaCounter
        problem = "it counts wrongly"
    except Exception as error:  # noqa: BLE001 - whatever a compiler for a GPU can raise
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
    logger.warning("the kernel for calibration does not work here, which makes it slower: %s", problem)
    return TorchCounter
