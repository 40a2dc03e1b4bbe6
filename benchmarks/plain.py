"""Entropy calibration by its plain definition in NumPy, candidate by candidate, as one would first write it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BINS = 2048
LEVELS = 128


class PlainHistogram:
    """2048 bins of |x|; the range is the first batch's maximum and doubles when a later batch exceeds it."""

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, dtype=np.int64)
        self.range = 0.0

    def add(self, batch: NDArray[np.float32]) -> None:
        """Count the values of one batch."""
        values = np.abs(batch.ravel())
        largest = float(values.max())
        self.range = self.range or largest
        while largest > self.range:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(axis=1), np.zeros(BINS // 2, dtype=np.int64)])
            self.range *= 2
        bins = (values * np.float32(BINS / self.range)).astype(np.int64)
        self.counts += np.bincount(np.minimum(bins, BINS - 1), minlength=BINS)


def threshold(histogram: PlainHistogram) -> float:
    """The threshold with the smallest divergence; the largest of those within 1e-10."""
    counts = histogram.counts.astype(np.float64)
    counts[0] = counts[1]
    divergences = np.array([divergence(counts, kept) for kept in range(LEVELS, BINS + 1)])
    kept = LEVELS + int(np.flatnonzero(divergences <= divergences.min() + 1e-10)[-1])
    return (kept + 0.5) * histogram.range / BINS


def divergence(counts: NDArray[np.float64], kept: int) -> float:
    """Of the candidate that keeps the first ``kept`` bins from the whole; infinite where it is passed over."""
    source, above = counts[:kept], counts[kept:].sum()
    if source.sum() == 0 or (above > 0 and (source[-1] == 0 or np.count_nonzero(source) < 2)):
        return float("inf")
    reference = source.copy()
    reference[-1] += above
    level = np.arange(kept) * LEVELS // kept
    filled = source > 0
    sums = np.bincount(level, weights=source, minlength=LEVELS)
    numbers = np.bincount(level, weights=filled, minlength=LEVELS)
    candidate = np.where(filled, sums[level] / np.maximum(numbers[level], 1), 0)
    p, q = reference / reference.sum(), candidate / candidate.sum()
    seen = p > 0
    return float(np.sum(p[seen] * np.log(p[seen] / q[seen])))
