"""Histograms of a value and of what a ReLU makes of it, counted at once."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calib.histogram.base import BINS, SMALLEST, Counted, flat
from calib.histogram.native import Counter

_ROW = 2**17
"""Values at a time, which stay in the CPU's cache."""


def count_rectified(
    values: Tensor, limit: float, rectified_limit: float, native: Counter | None = None
) -> tuple[Counted, Counted] | None:
    """Count ``values`` and ``max(values, 0)``, as :func:`calib.histogram.base.count` counts each.

    In NumPy, values take no turns between sets of counters as in :func:`count`: in front of a ReLU few are equal, and
    it took longer.

    Args:
        values: Any shape, on the CPU.
        limit: The range: upper end of the last bin.
        rectified_limit: The ReLU's range.
        native: Counts in NumPy's place.

    Returns:
        The two counts; None where the values exceed a range or are NaN, where they are no float32, where a range is too
        small for its bins to be normal numbers, and without ``native`` where the ranges differ: each is counted alone
        then.
    """
    limits = {limit, rectified_limit}
    if values.dtype != torch.float32 or min(limits) < BINS * SMALLEST or (native is None and len(limits) > 1):
        return None
    # Each of PyTorch's operations lets go of Python's lock, for which many cores then wait in line.
    plain = values.is_contiguous() and not values.requires_grad
    exact = values.numpy().reshape(-1) if plain else flat(values.detach()).numpy()
    found = {one: np.zeros((2, BINS + 1), np.int64) for one in limits}
    largest = most = 0.0
    for start in range(0, exact.size, _ROW):
        part = exact[start : start + _ROW]
        for one, counts in found.items():
            magnitude, positive = (native or _count)(part, np.float32(BINS / one), counts)
        if not (magnitude <= limit and positive <= rectified_limit):
            return None
        largest, most = max(largest, magnitude), max(most, positive)
    return Counted(found[limit][0], limit, largest), Counted(found[rectified_limit][1], rectified_limit, most)


def _count(values: NDArray[np.float32], factor: np.float32, counts: NDArray[np.int64]) -> tuple[float, float]:
    """See :data:`calib.histogram.native.Counter`."""
    magnitudes, rectified = counts
    least, most = float(values.min()), float(values.max())
    if max(-least, most) * factor <= BINS + 1:
        bins = np.empty(values.size, np.int16)
        np.multiply(values, factor, out=bins, casting="unsafe")  # truncates, in float32 before
        bins += BINS  # they have a sign: the ReLU's are the positive ones, and all else is zero
        signed = torch.bincount(torch.from_numpy(bins), minlength=2 * BINS + 1).numpy()
        magnitudes += signed[BINS:]
        magnitudes[1:] += signed[:BINS][::-1]
        rectified += signed[BINS:]
        rectified[0] += signed[:BINS].sum()
    return (max(-least, most) if least == least else least), max(most, 0.0)
