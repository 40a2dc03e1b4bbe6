"""The histogram of a tensor's absolute values over calibration batches, as TensorRT's calibrators keep it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import InputError

BINS = 2048

SMALLEST = float(np.finfo(np.float32).tiny)
"""Smallest normal float32: what lies below counts as zero."""

PIECE = 32768
"""Values that PyTorch does not divide among threads, which would wait for each other longer than these take."""

ROW = 8 * PIECE
"""Values that NumPy, which has no threads of its own, takes at once: worth a call, and still in the CPU's cache."""

_LANES = 4
# Added to four bins of 16 bits at a time.
_TO_LANES = np.int64(sum(lane * (BINS + 1) << 16 * lane for lane in range(_LANES)))


class AbsHistogram:
    """Histogram of |x| in 2048 bins over [0, range), with the range rules of TensorRT's calibrators.

    The range is the absolute maximum of the first batch that is not all zero. When a later batch exceeds it, it grows
    as :func:`grown` says, and neighbouring bins merge. So the result depends on which values form the first batch, but
    not on their order within a batch. The bin is trunc(abs(x) * (2048 / range)), both operations in float32, and at
    most the last one; below a range of 6e-36 the first of them is infinite, and so all but zeros lie in the last bin.
    Values below the smallest normal float32 are zeros. Memory is constant.

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

    @property
    def early_range(self) -> float:
        """The range, with which parts of a batch can be counted before the maximum of all its parts is known.

        0, which holds zeros alone, where that is not so: the last bin of a tiny range cannot be divided again.
        """
        return 0.0 if np.isinf(bins_per_unit(self.range)) else self.range

    def add(self, batch: Tensor, pool: Executor | None = None) -> None:
        """Count one batch.

        Args:
            batch: Any shape, on the CPU; float32, or float16 and bfloat16, whose values float32 holds.
            pool: Threads that share the counting, from :func:`counting_threads`.

        Raises:
            InputError: the batch holds NaN or infinity; the histogram is as it was before.
            TypeError: another dtype.
        """
        counted = count(batch, self.range, pool)
        if not counted.fits:
            self.widen(counted.largest)
            counted = count(batch, self.range, pool)
        self.add_counted(counted)

    def add_counted(self, part: Counted) -> None:
        """Add a part of a batch that was counted with this histogram's range, or with an earlier :attr:`early_range`.

        Args:
            part: What fits the range that it was counted with.
        """
        if part.largest >= SMALLEST:
            self.maximum = max(self.maximum, part.largest)
        counts = _merged(part.counts, part.range, self.range)
        self.counts += counts[:BINS]
        self.counts[-1] += counts[BINS]

    def widen(self, largest: float) -> None:
        """Make room for values up to ``largest``, the absolute maximum of the next batch.

        Raises:
            InputError: it is NaN or infinite; the histogram is as it was before.
        """
        refuse_infinite(largest)
        if largest < SMALLEST:
            return
        self.maximum = max(self.maximum, largest)
        before, self.range = self.range, grown(self.range, largest)
        self.counts = _merged(self.counts, before, self.range)

    def share_above(self, threshold: float) -> float:
        """Share of the values beyond ``threshold``, in [0, 1].

        To the resolution of a bin: what lies in the threshold's own bin counts as inside.
        """
        if self.range == 0:
            return 0.0
        inside = min(math.floor(min(threshold * BINS / self.range, BINS)) + 1, BINS)
        return float(self.counts[inside:].sum() / self.counts.sum())


@dataclass(frozen=True)
class Counted:
    """Part of a batch, counted with a range that was known before.

    Attributes:
        counts: int64 [2049]: one counter more than bins, for values that are equal to the range. All zero where the
            values do not fit.
        range: Upper end of the last bin; 0 where only zeros were seen before.
        largest: Absolute maximum of the values; NaN if they hold one.
    """

    counts: NDArray[np.int64]
    range: float
    largest: float

    @property
    def fits(self) -> bool:
        """Whether the values lie within the range."""
        return self.largest <= self.range or self.largest < SMALLEST


@contextmanager
def counting_threads() -> Iterator[Executor | None]:
    """As many threads as PyTorch computes with, to count with; None for one."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield None
        return
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)  # for threads that are started later


def count(batch: Tensor, limit: float, pool: Executor | None = None) -> Counted:
    """Count values as :class:`AbsHistogram` does, reading them once.

    Args:
        batch: As :meth:`AbsHistogram.add` takes it.
        limit: Upper end of the last bin; 0 where only zeros were seen before.
        pool: As many threads as PyTorch computes with, which share the counting; none of them may wait for this call.

    Raises:
        TypeError: another dtype.
    """
    if batch.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"AbsHistogram counts float32 values, not {batch.dtype}")
    values = flat(batch.detach())
    if pool is None or values.numel() <= ROW:
        return _count(values, limit)
    share = max(ROW, -(-values.numel() // torch.get_num_threads()))
    parts = list(pool.map(lambda part: _count(part, limit), values.split(share)))
    largest = float(np.max([part.largest for part in parts]))  # NaN stays
    counts = np.sum([part.counts for part in parts], axis=0)
    return Counted(counts if all(part.fits for part in parts) else np.zeros_like(counts), limit, largest)


def grown(limit: float, largest: float) -> float:
    """The range that TensorRT's calibrators make of ``limit`` (0 for none yet) for a batch of this absolute maximum.

    It doubles until it holds the batch. Where that would take more than 11 doublings, which leave nothing outside the
    first bin, it becomes the smallest multiple of itself that does.
    """
    if limit == 0:
        return largest
    if largest > BINS * limit:
        return max(largest, math.ceil(largest / limit) * limit)  # the product may be rounded down
    while largest > limit:
        limit *= 2
    return limit


def bins_per_unit(limit: float) -> np.float32:
    """2048 / range as TensorRT has it, in float32: infinite for a range below 6e-36; 0 while there is no range."""
    with np.errstate(over="ignore"):
        return np.float32(BINS / limit if limit else 0.0)


def _count(values: Tensor, limit: float) -> Counted:
    """:func:`count` for flat values, in one thread.

    Where many values are zeros, each counter would wait for its last increment: values take turns between four sets of
    counters then, which takes half the time.
    """
    counts = np.zeros(_LANES * (BINS + 1), dtype=np.int64)
    factor = bins_per_unit(limit)
    bins = np.empty(min(values.numel(), ROW), np.int16)
    step = ROW if torch.get_num_threads() == 1 else PIECE
    largest = 0.0
    for start in range(0, values.numel(), ROW):
        exact = _float32(values, slice(start, start + ROW))
        low, high = float(exact.min()), float(exact.max())
        largest = max(largest, -low, high) if low == low else math.nan
        if not (largest <= limit or largest < SMALLEST):
            low, high = (extreme.item() for extreme in torch.aminmax(values))
            return Counted(np.zeros(BINS + 1, dtype=np.int64), limit, max(-low, high))
        row = bins[: len(exact)]
        if limit < BINS * SMALLEST:  # where a subnormal value, which is a zero, would have a bin
            with np.errstate(over="ignore", invalid="ignore"):
                row[:] = np.where(np.abs(exact) < SMALLEST, 0, (exact * factor).clip(-BINS, BINS))
        else:
            np.multiply(exact, factor, out=row, casting="unsafe")  # truncates, in float32 before
        if low < 0:
            np.abs(row, out=row)
        lanes = _LANES if low == 0 else 1
        if lanes > 1:
            row[: len(row) // _LANES * _LANES].view(np.int64)[:] += _TO_LANES
        size = lanes * (BINS + 1)
        for begin in range(0, len(row), step):
            counts[:size] += torch.bincount(torch.from_numpy(row[begin : begin + step]), minlength=size).numpy()
    return Counted(counts.reshape(_LANES, -1).sum(axis=0), limit, largest)


def _float32(values: Tensor, part: slice) -> NDArray[np.float32]:
    """A part of the values, which are flat, as float32; a copy if they are not."""
    found: NDArray[np.float32] = (values if values.dtype == torch.float32 else values[part].float()).numpy()
    return found[part] if values.dtype == torch.float32 else found


def _merged(counts: NDArray[np.int64], before: float, after: float) -> NDArray[np.int64]:
    """Counts by a range, as they are by one that has grown from it."""
    if not 0 < before < after:
        return counts
    merged = np.zeros_like(counts)
    np.add.at(merged, np.arange(len(counts)) >> math.ceil(math.log2(after / before)), counts)
    return merged


def refuse_infinite(largest: float, where: str = "") -> None:
    """Refuse a tensor whose absolute maximum is no finite number.

    Args:
        largest: The absolute maximum; NaN where a value is.
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
    return batch.reshape(-1).contiguous()  # one image of Fortran's order is a row with gaps
