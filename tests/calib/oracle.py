"""Histogram and entropy calibration by their plain definitions: slow, and free of the tricks of the code under test."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

BINS = 2048
LEVELS = 128


def histogram(batches):
    """(counts, range) of the absolute values, in exact arithmetic."""
    counts, limit = [0] * BINS, Fraction(0)
    for batch in batches:
        values = [abs(Fraction(float(value))) for value in np.asarray(batch).ravel()]
        largest = max(values, default=Fraction(0))
        if limit == 0:
            limit = largest
        while largest > limit:
            counts = [counts[2 * i] + counts[2 * i + 1] for i in range(BINS // 2)] + [0] * (BINS // 2)
            limit *= 2
        for value in values:
            position = math.floor(value * BINS / limit) if limit else 0
            counts[min(position, BINS - 1)] += 1
    return np.array(counts), float(limit)


def divergences(counts):
    """Of every candidate 128 .. 2048; infinite where it is empty."""
    result = []
    for kept in range(LEVELS, BINS + 1):
        source = np.asarray(counts[:kept], dtype=np.float64)
        if source.sum() == 0:
            result.append(math.inf)
            continue
        reference = source.copy()
        reference[-1] += np.asarray(counts[kept:], dtype=np.float64).sum()
        level = np.array([math.floor(j * LEVELS / kept) for j in range(kept)])
        assert level[-1] == LEVELS - 1
        filled = source > 0
        sums = np.bincount(level, weights=source, minlength=LEVELS)
        numbers = np.bincount(level, weights=filled, minlength=LEVELS)
        candidate = np.zeros(kept)
        candidate[filled] = sums[level[filled]] / numbers[level[filled]]
        p, q = reference / reference.sum(), candidate / candidate.sum()
        q[(p > 0) & (q == 0)] = 1e-9
        seen = p > 0
        result.append(float(np.sum(p[seen] * np.log(p[seen] / q[seen]))))
    return np.array(result)


def chosen(values):
    """Bins of the winning candidate, or None if all are empty."""
    smallest = min(values)
    if math.isinf(smallest):
        return None
    return LEVELS + next(index for index, value in enumerate(values) if value <= smallest + 1e-10)


def entropy2(counts):
    """(bins of the winning candidate or None, all divergences)."""
    counts = np.array(counts)
    counts[0] = counts[1]
    values = divergences(counts)
    return chosen(values), values
