"""Histogram and entropy calibration by their plain definitions: slow, and free of the tricks of the code under test."""

import math

import numpy as np

BINS = 2048
LEVELS = 128


def histogram(batches):
    """(counts, range) of the absolute values, one after the other in float32."""
    counts, limit = [0] * BINS, 0.0
    for batch in batches:
        values = [abs(np.float32(value)) for value in np.asarray(batch).ravel()]
        values = [value if value >= np.finfo(np.float32).tiny else np.float32(0) for value in values]
        largest = float(max(values, default=0))
        limit = limit or largest
        if largest > BINS * limit:
            counts, limit = [sum(counts)] + [0] * (BINS - 1), max(largest, math.ceil(largest / limit) * limit)
        while largest > limit:
            counts = [counts[2 * i] + counts[2 * i + 1] for i in range(BINS // 2)] + [0] * (BINS // 2)
            limit *= 2
        for value in values:
            counts[min(position(value, limit), BINS - 1)] += 1
    return np.array(counts), limit


def position(value, limit):
    """trunc(value * (2048 / limit)), each operation rounded to float32, which may overflow."""
    with np.errstate(over="ignore"):
        product = value * np.float32(BINS / limit) if value else 0.0
    return int(min(product, BINS))


def divergences(counts):
    """Of every candidate 128 .. 2048; infinite where it is passed over."""
    result = []
    for kept in range(LEVELS, BINS + 1):
        source = np.asarray(counts[:kept], dtype=np.float64)
        above = np.asarray(counts[kept:], dtype=np.float64).sum()
        if source.sum() == 0 or (above and (source[-1] == 0 or np.count_nonzero(source) == 1)):
            result.append(math.inf)
            continue
        reference = source.copy()
        reference[-1] += above
        level = np.array([math.floor(j * LEVELS / kept) for j in range(kept)])
        assert level[-1] == LEVELS - 1
        filled = source > 0
        sums = np.bincount(level, weights=source, minlength=LEVELS)
        numbers = np.bincount(level, weights=filled, minlength=LEVELS)
        candidate = np.zeros(kept)
        candidate[filled] = sums[level[filled]] / numbers[level[filled]]
        p, q = reference / reference.sum(), candidate / candidate.sum()
        seen = p > 0
        result.append(float(np.sum(p[seen] * np.log(p[seen] / q[seen]))))
    return np.array(result)


def entropy(counts):
    """(bins of the winning candidate, all divergences)."""
    counts = np.array(counts)
    counts[0] = counts[1]
    values = divergences(counts)
    return LEVELS + max(index for index, value in enumerate(values) if value <= min(values) + 1e-10), values
