"""Histograms of an ONNX network's values over calibration batches."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from calib.histogram.base import AbsHistogram, Counted, count, refuse_infinite
from calib.histogram.native import native_counter
from calib.histogram.rectified import count_rectified
from calib.onnx.observe import Observed
from calib.onnx.source import Batch, Batches
from common.errors import InputError
from common.threads import available_cores

_KEPT = 2
"""Waves of the first batch whose values are kept until their range is known; where there are more, they run twice."""

_Found = dict[str, tuple[Counted, Tensor | None]]


@dataclass(frozen=True)
class _Part:
    """Some images of a batch.

    Attributes:
        batch: What the network is given.
        begin: Images of the batch before them.
        images: Images of the whole batch.
    """

    batch: Batch
    begin: int
    images: int


def collect(
    observed: Observed,
    batches: Batches,
    progress: Callable[[int, float], None] | None = None,
    heads: Mapping[str, Sequence[str]] | None = None,
) -> tuple[dict[str, AbsHistogram], tuple[str, ...]]:
    """Histogram of each value, and the names of those that were infinite.

    A thread runs a part of a batch and at once counts its values, with the range that is known before. What exceeds it
    is counted again when the maximum over all parts is known; that is everything of the first batch, which is run twice
    where its values are too many to be kept.

    Args:
        observed: Runs the network, and says which values have a histogram.
        batches: The calibration batches. The first one sets the histograms' range.
        progress: Called after each batch with (batches done, seconds it took).
        heads: Value -> those of which, channels behind each other, as many values are counted in its place, from the
            batch's beginning.

    Raises:
        InputError: ONNX Runtime does not run the network, or values are NaN.
    """
    histograms, cores = _Histograms(observed, heads or {}), available_cores()
    running: deque[tuple[int, Iterator[_Found]]] = deque()
    with _one_thread_each(), ThreadPoolExecutor(cores) as pool:
        for number, batch in enumerate(batches, start=1):
            start = time.perf_counter()
            for name, array in batch.items():
                if array.dtype.kind == "f" and not np.isfinite(array).all():
                    raise InputError(f"calibration batch {number}, input {name}: the values hold NaN or infinity")
            waves = list(_placed(observed.waves(batch)))
            if number == 1 and len(waves) <= _KEPT:
                waves = [list(chain.from_iterable(waves))]
            elif number == 1:
                found = chain.from_iterable(pool.map(histograms.maxima, wave) for wave in waves)
                histograms.widen(number, found)
            for wave in waves:
                running.append((number, pool.map(histograms.count, wave)))
                # Where all cores have a part, the next ones wait in line while these are added: none is idle.
                while len(running) > (1 if number > 1 and len(wave) == cores else 0):
                    histograms.settle(*running.popleft(), pool)
            if progress is not None:
                progress(number, time.perf_counter() - start)
        while running:
            histograms.settle(*running.popleft(), pool)
    return histograms.finite(), tuple(histograms.infinite)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """PyTorch's operations take one thread, also in threads that are started now: each core has a part of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Histograms:
    """The histograms, and what threads and the main thread do with them in turns."""

    def __init__(self, observed: Observed, heads: Mapping[str, Sequence[str]]) -> None:
        self._observed = observed
        self._heads = heads
        self._rectified = {name: relu for name, relu in observed.rectified.items() if not {name, relu} & heads.keys()}
        self._of = {name: AbsHistogram() for name in observed.values}
        self._native = native_counter()
        self.infinite: dict[str, None] = {}

    def _values(self, part: _Part) -> dict[str, Tensor]:
        values = self._observed.run(part.batch)
        count = _images(part.batch)
        heads = {}
        for name, parts in self._heads.items():
            if values.keys() >= {name, *parts}:
                whole = torch.cat([values[one] for one in parts], dim=1) if len(parts) > 1 else values[parts[0]]
                wanted = part.images * values[name].numel() // count
                before = part.begin * whole.numel() // count
                heads[name] = whole.reshape(-1)[: max(wanted - before, 0)]
        return {**values, **heads}

    def maxima(self, part: _Part) -> dict[str, float]:
        """Absolute maximum of each value of a part."""
        return {name: _largest(value) for name, value in self._values(part).items()}

    def count(self, part: _Part) -> _Found:
        """What was counted of each value of a part, and the value itself where it exceeds the range."""
        found: _Found = {}
        for name, value in self._values(part).items():
            if name in self.infinite or name in found:
                continue
            limit, relu = self._of[name].early_range, self._rectified.get(name)
            if relu is not None and (both := count_rectified(value, limit, self._of[relu].early_range, self._native)):
                found[name], found[relu] = (both[0], None), (both[1], None)
                continue
            counted = self._count(value, limit)
            found[name] = counted, None if counted.fits else value
        return found

    def settle(self, number: int, parts: Iterable[_Found], pool: Executor) -> None:
        """Add what :meth:`count` found of parts of batch ``number``; in the order of the batches.

        Raises:
            InputError: values are NaN.
        """
        parts = list(parts)
        self.widen(number, ({name: one.largest for name, (one, _) in part.items()} for part in parts))
        over = [(name, value) for part in parts for name, (_, value) in part.items() if value is not None]
        over.sort(key=lambda item: -item[1].numel())  # so that no thread is left with a large one
        self.add(
            [(name, one) for part in parts for name, (one, value) in part.items() if value is None]
            + list(pool.map(self.again, over))
        )

    def again(self, item: tuple[str, Tensor]) -> tuple[str, Counted]:
        """Count a value that exceeded the range."""
        return item[0], self._count(item[1], self._of[item[0]].range)

    def _count(self, value: Tensor, limit: float) -> Counted:
        both = count_rectified(value, limit, limit, self._native) if self._native is not None else None
        return count(value, limit) if both is None else both[0]

    def widen(self, number: int, maxima: Iterable[Mapping[str, float]]) -> None:
        """Make room for the values of batch ``number``, whose parts have these absolute maxima.

        Raises:
            InputError: values are NaN.
        """
        largest: dict[str, float] = {}
        for part in maxima:
            for name, value in part.items():
                largest[name] = float(np.maximum(largest.get(name, 0.0), value))  # NaN stays
        for name, value in largest.items():
            if math.isnan(value):
                refuse_infinite(value, f"calibration batch {number}, tensor {name}: ")
            if math.isinf(value):
                self.infinite.setdefault(name)
            else:
                self._of[name].widen(value)

    def add(self, counted: Sequence[tuple[str, Counted]]) -> None:
        """Add what was counted; values that were infinite are left out."""
        for name, one in counted:
            if name not in self.infinite:
                self._of[name].add_counted(one)

    def finite(self) -> dict[str, AbsHistogram]:
        """The histograms of the values that were never infinite."""
        return {name: histogram for name, histogram in self._of.items() if name not in self.infinite}


def _placed(waves: Iterable[Iterable[Batch]]) -> Iterator[list[_Part]]:
    """The parts of one batch with their places in it."""
    lists = [list(wave) for wave in waves]
    images = sum(_images(part) for wave in lists for part in wave)
    begin = 0
    for wave in lists:
        parts = []
        for part in wave:
            parts.append(_Part(part, begin, images))
            begin += _images(part)
        yield parts


def _images(part: Batch) -> int:
    return len(next(iter(part.values())))


def _largest(value: Tensor) -> float:
    """Absolute maximum; NaN if the tensor holds one, 0 if it is empty."""
    if not value.numel():
        return 0.0
    # NumPy starts no threads, which would wait for the cores that others count on.
    array = value.numpy()
    return max(-float(array.min()), float(array.max()))
