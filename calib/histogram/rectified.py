"""Histograms of a value and of what a ReLU makes of it, counted at once."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from calib.histogram.base import BINS, SMALLEST, Counted, flat

_ROW = 2**17
"""Values at a time, whose bins stay in the CPU's cache."""


def count_rectified(values: Tensor, limit: float) -> tuple[Counted, Counted] | None:
    """Count ``values`` and ``max(values, 0)``, both with one range, as :func:`calib.histogram.base.count` counts each.

    Bins have a sign here: the ReLU's histogram are the positive ones, and all else is zero. Values take no turns
    between sets of counters as in :func:`count`: in front of a ReLU few are equal, and it took longer.

    Args:
        values: Any shape, on the CPU.
        limit: The range: upper end of the last bin.

    Returns:
        The two counts; None where the values exceed the range or are NaN, where they are no float32, and where the
        range is too small for its bins to be normal numbers: each is counted alone then.
    """
    if values.dtype != torch.float32 or limit < BINS * SMALLEST:
        return None
    exact = flat(values.detach()).numpy()
    factor = np.float32(BINS / limit)
    bins = np.empty(min(exact.size, _ROW), np.int16)
    signed = np.zeros(2 * BINS + 1, np.int64)
    low = high = 0.0
    for start in range(0, exact.size, _ROW):
        part = exact[start : start + _ROW]
        least, largest = float(part.min()), float(part.max())
        if not (-limit <= least and largest <= limit):
            return None
        low, high = min(low, least), max(high, largest)
        row = bins[: part.size]
        np.multiply(part, factor, out=row, casting="unsafe")  # truncates, in float32 before
        row += BINS
        signed += torch.bincount(torch.from_numpy(row), minlength=signed.size).numpy()
    negative, rectified = signed[:BINS][::-1], signed[BINS:]
    counts = rectified.copy()
    counts[1:] += negative
    rectified[0] += negative.sum()
    return Counted(counts, limit, max(-low, high)), Counted(rectified, limit, high)
