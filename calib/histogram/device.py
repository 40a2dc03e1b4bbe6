"""All histograms of a network on its own device, counted there without waiting for the device, and shared by processes.

The counts are those of :class:`calib.histogram.base.AbsHistogram`, to the last one. What makes that possible between
processes: a bin at a doubled range is the bin at the old one, halved, since a power of two leaves float32's digits as
they are. Only a value that equals the range is special: it counts in the last bin of the range at its time, and that
range depends on all batches before. Such values are therefore kept apart, by batch, and placed at the end. A tensor
whose range does not only double is counted once more, when its range at each batch is known.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import ProcessGroup

from calib.histogram.base import BINS, AbsHistogram, flat, grown, refuse_infinite
from calib.histogram.counters import (
    Counter,
    CpuCounter,
    Tallies,
    TorchCounter,
    bins_per_unit,
    doubled,
    doublings_of,
    shifted,
)
from calib.histogram.cuda import CudaCounter
from common.errors import InputError

logger = logging.getLogger(__name__)

_RECORDS = 64
"""Batches whose maxima are kept in one piece of memory."""


class DeviceHistograms:
    """Histograms of several tensors over batches.

    Args:
        names: Of the tensors.
        device: Where their values are; a GPU with its index.
        base: The range that each begins with; without it, the maximum of its first batch that is not all zero.
        rank: Of this process among those that share the batches: batch b is process b modulo ``processes``'s.
        processes: Their number.
        ranges: The range of each after each batch of all processes, where they are known: float64 [batches, T].
    """

    def __init__(
        self,
        names: Sequence[str],
        device: torch.device,
        base: Sequence[float] | None = None,
        rank: int = 0,
        processes: int = 1,
        ranges: Tensor | None = None,
    ) -> None:
        self.names = tuple(names)
        self._rank, self._processes = rank, processes
        self._index = {name: index for index, name in enumerate(self.names)}
        count = len(self.names)
        self._ranges = ranges
        self._tallies = Tallies(count, device, base if ranges is None else ranges[min(rank, len(ranges) - 1)].tolist())
        self._counter = _counter_class(device)(self._tallies)
        self._seen = np.zeros(count, dtype=np.int64)
        self._records: list[Tensor] = []
        self._batches = 0
        self._waiting = _Waiting(count, device)
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
        if self._batches % _RECORDS == 0:
            shape = (_RECORDS, 2, len(self.names))
            self._records.append(torch.empty(shape, dtype=torch.float64, device=self._tallies.base.device))
        record = self._records[-1][self._batches % _RECORDS]
        self._batches += 1
        self._counter.enter(record)
        following = self._rank + self._batches * self._processes
        if self._ranges is not None and following < len(self._ranges):
            self._tallies.take(self._ranges[following].to(record.device))
        self._waiting.put(record[0])
        self.check(keep=1)

    def check(self, keep: int = 0) -> None:
        """Wait for the counts, but for those of the last ``keep`` batches.

        Raises:
            InputError: values were not finite.
        """
        while self._batches - self._checked > keep:
            largest = self._waiting.get()
            number = self._rank + self._checked * self._processes + 1
            self._checked += 1
            if np.isfinite(largest).all():
                continue
            for name, value in zip(self.names, largest.tolist(), strict=True):
                refuse_infinite(value, f"calibration batch {number}, tensor {name}: ")

    def bases(self) -> list[float]:
        """The range that each tensor began with; 0 while it was all zeros."""
        self.check()
        return self._tallies.base.tolist()

    def leave_late(self) -> None:
        """Record only the maxima of tensors that were all zeros so far: their range is agreed on later."""
        self._late = frozenset(index for index, base in enumerate(self.bases()) if base == 0)
        self._tallies.late[sorted(self._late)] = True

    def finish(self, group: ProcessGroup | None = None) -> tuple[dict[str, AbsHistogram], dict[str, Tensor]]:
        """The histograms over the batches of all processes.

        Args:
            group: The processes; None if this is the only one.

        Returns:
            Tensor -> histogram; and the tensors that must be counted again -> their range after each batch, for
            ``ranges`` then: those that :meth:`leave_late` left, but for zeros alone, and those whose bins at the range
            that the process knew are none at the range that one process would have had.

        Raises:
            InputError: values are not finite.
        """
        self.check()
        counted, device = self._tallies.counts, self._tallies.counts.device
        last = self._rank + (self._batches - 1) * self._processes
        total = torch.tensor(last + 1 if self._batches else 0, device=device)
        if group is not None:
            torch.distributed.all_reduce(total, torch.distributed.ReduceOp.MAX, group=group)
        log = torch.zeros(int(total), 2, len(self.names), dtype=torch.float64, device=device)
        if self._batches:
            log[self._rank : last + 1 : self._processes] = torch.cat(self._records)[: self._batches]
        seen = torch.from_numpy(self._seen).to(device)
        if group is not None:
            for part in (log, seen):
                torch.distributed.all_reduce(part, group=group)
        maxima, at_range = log.cpu().unbind(dim=1)
        # The range after each batch, as one process has it, and as the process that counted the batch had it.
        known = self._history(maxima) if self._ranges is None else self._ranges
        own = known
        if self._ranges is None and self._processes > 1:
            own = torch.empty_like(known)
            for rank in range(min(self._processes, len(maxima))):
                share = slice(rank, None, self._processes)
                own[share] = self._history(maxima[share])
        end = known[-1]
        counted = shifted(counted, doublings_of(self._tallies.ranges.cpu(), end).to(device))
        if group is not None:
            torch.distributed.all_reduce(counted, group=group)
        counts = counted.cpu().numpy()
        in_last_bin = (own == known) | bins_per_unit(known).isinf()
        bins = torch.where(in_last_bin, BINS - 1, BINS >> doublings_of(own, known)) >> doublings_of(known, end)
        for batch, index in at_range.nonzero().tolist():
            counts[index, bins[batch, index]] += int(at_range[batch, index])
        totals = seen.cpu().numpy()
        counts[:, 0] = totals - counts[:, 1:].sum(axis=1)
        found = {
            name: _histogram(counts[index], float(end[index]), float(maxima[:, index].max()))
            for name, index in self._index.items()
        }
        only_doubled = (doubled(own, doublings_of(own, known)) == known) & ~bins_per_unit(own).isinf()
        nested = ((own == known) | only_doubled).all(dim=0)
        again = (~nested).nonzero().flatten().tolist()
        again += [index for index in self._late if end[index] > 0]
        return found, {self.names[index]: known[:, index] for index in sorted({*again})}

    def _history(self, maxima: Tensor) -> Tensor:
        """The range after each of some batches of these maxima: float64 [batches, T]."""
        limits, ranges = self._tallies.base.tolist(), []
        for largest in maxima.tolist():
            limits = list(map(grown, limits, largest))
            ranges.append(limits)
        return torch.tensor(ranges, dtype=torch.float64)


def _histogram(counts: NDArray[np.int64], end: float, maximum: float) -> AbsHistogram:
    histogram = AbsHistogram()
    histogram.counts, histogram.range, histogram.maximum = counts.copy(), end, maximum
    return histogram


class _Waiting:
    """Maxima of batches on their way from the device; not more than two at a time.

    Args:
        tensors: Number of the maxima.
        device: Where they come from.
    """

    def __init__(self, tensors: int, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._places = torch.empty(2, tensors, dtype=torch.float64, pin_memory=self._on_gpu)
        self._values = self._places.numpy()
        self._events = [torch.cuda.Event() for _ in self._places] if self._on_gpu else []
        self._put = self._got = 0

    def put(self, largest: Tensor) -> None:
        """Send maxima, float64 [T]."""
        place = self._put % 2
        self._places[place].copy_(largest, non_blocking=True)
        if self._on_gpu:
            self._events[place].record()
        self._put += 1

    def get(self) -> NDArray[np.float64]:
        """Wait for the first ones that were not waited for."""
        place = self._got % 2
        if self._on_gpu:
            self._events[place].synchronize()
        self._got += 1
        found: NDArray[np.float64] = self._values[place]
        return found


def _counter_class(device: torch.device) -> type[Counter]:
    """What counts on the device."""
    if device.type == "cuda":
        return _gpu_counter(device.index)
    return CpuCounter if device.type == "cpu" else TorchCounter


@cache
def _gpu_counter(index: int) -> type[Counter]:
    """The own kernel, if it can be compiled here and counts as PyTorch's operations do; else those."""
    device = torch.device("cuda", index)
    values = torch.linspace(-3, 2, 100_000, device=device)
    found = []
    try:
        for kind in (CudaCounter, TorchCounter):
            tallies = Tallies(3, device, [1.1, 3.0, 0.0])
            counter, records = kind(tallies), torch.empty(2, 2, 3, dtype=torch.float64, device=device)
            for record, factor in zip(records, (1.0, 5.0), strict=True):
                for tensor in range(3):
                    counter.count(tensor, factor * values)
                counter.enter(record)
            state = (tallies.base, tallies.ranges, tallies.counts[:, 1:], tallies.largest, tallies.batch, records)
            found.append([part.tolist() for part in state])
        if found[0] == found[1]:
            return CudaCounter
        problem = "it counts wrongly"
    except Exception as error:  # noqa: BLE001 - whatever a compiler for a GPU can raise
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
    logger.warning("the kernel for calibration does not work here, which makes it slower: %s", problem)
    return TorchCounter
