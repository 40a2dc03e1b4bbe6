"""The entropy search: from a histogram of absolute values to the range that INT8 represents best.

It gives TensorRT's own thresholds, to the bin, as the other algorithms do: in all 600 cases of the tests, which
TensorRT 10.6.0 was asked (tests/calib/tensorrt). NVIDIA's presentation "8-bit inference with TensorRT" (GTC 2017,
S7310) gives the outline.
What it leaves open was found from TensorRT's answers: which candidates are passed over, and that of equal divergences
the largest candidate wins, as if searched downward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from calib.algorithms import device_search
from calib.algorithms.base import MERGED_LEVELS, Threshold, to_float32
from calib.histogram.base import BINS, AbsHistogram, counting_threads

TIE = 1e-10
"""Divergences closer than this are a tie, and the largest candidate wins."""

_CANDIDATES = np.arange(MERGED_LEVELS, BINS + 1)
"""Candidate i keeps the first i bins."""

_MAX_WIDTH = BINS // MERGED_LEVELS

_AT_ONCE = 64
"""Tensors that a GPU searches together: 2 MB each."""


def search(histograms: Sequence[AbsHistogram], device: torch.device | None) -> Iterator[Threshold]:
    """The thresholds of histograms that are not all zero; a GPU searches many at once, a CPU one with each thread."""
    if device is not None and device.type == "cuda":
        yield from map(_threshold, histograms, _divergences_on(device, histograms))
    elif len(histograms) == 1:
        yield _search_one(histograms[0])
    else:
        with counting_threads() as pool:
            yield from (map if pool is None else pool.map)(_search_one, histograms)


def _search_one(histogram: AbsHistogram) -> Threshold:
    return _threshold(histogram, _divergences(_without_zeros(histogram)))


def _threshold(histogram: AbsHistogram, divergences: NDArray[np.float64]) -> Threshold:
    kept = int(_CANDIDATES[divergences <= divergences.min() + TIE][-1])
    return Threshold(to_float32((kept + 0.5) * histogram.range / BINS), kept, divergences)


def _without_zeros(histogram: AbsHistogram) -> NDArray[np.int64]:
    """The counts, where the zeros' bin, which would dominate, counts like its neighbour."""
    return np.concatenate([histogram.counts[1:2], histogram.counts[1:]])


def _divergences_on(device: torch.device, histograms: Sequence[AbsHistogram]) -> Iterator[NDArray[np.float64]]:
    for start in range(0, len(histograms), _AT_ONCE):
        counts = np.stack([_without_zeros(histogram) for histogram in histograms[start : start + _AT_ONCE]])
        yield from device_search.divergences(torch.from_numpy(counts).to(device)).cpu().numpy()


def _divergences(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Kullback-Leibler divergence of every candidate, float64 [1921]; infinite where the candidate is passed over.

    That is where it is empty, and where values lie beyond it while its last bin is empty or at most one of its bins
    is filled.

    Candidate i compares P = counts[:i], with everything above added to its last bin, with Q = counts[:i], merged
    into 128 levels and each level spread evenly over its non-empty bins. With T the total, C the sum of counts[:i],
    and S_l and n_l a level's sum and number of non-empty bins, Q is S_l / (n_l * C) on a level, and

        T * divergence = sum of P log P - T log T - sum over levels of S_l log(S_l / n_l) + C log C
                         - (what was added) * log(Q of the last bin).

    A level is a run of at most 16 bins, and many candidates share a run: the logarithms of all runs (2048 * 16) are
    fewer than those of all candidates' levels (1921 * 128).
    """
    total = float(counts.sum())
    below = np.concatenate([[0], np.cumsum(counts)])
    filled = np.concatenate([[0], np.cumsum(counts > 0)])
    log_sums = np.concatenate([[0.0], np.cumsum(_xlogx(counts))])

    runs = np.zeros((_MAX_WIDTH, BINS))
    for width in range(1, _MAX_WIDTH + 1):
        sums = below[width:] - below[:-width]
        bins = filled[width:] - filled[:-width]
        runs[width - 1, : BINS + 1 - width] = sums * np.log(np.maximum(sums, 1) / np.maximum(bins, 1))
    levels = runs.ravel().take(_level_runs()).sum(axis=1)

    kept = below[_CANDIDATES].astype(np.float64)
    added = total - kept
    last = _last_level_starts()
    with np.errstate(divide="ignore", invalid="ignore"):
        last_q = (below[_CANDIDATES] - below[last]) / ((filled[_CANDIDATES] - filled[last]) * kept)
    usable = (counts[_CANDIDATES - 1] > 0) & (filled[_CANDIDATES] > 1)
    last_q = np.where(usable, last_q, 1.0)
    reference = log_sums[_CANDIDATES - 1] + _xlogx(total - below[_CANDIDATES - 1])
    scaled = reference - _xlogx(np.asarray(total)) - levels + _xlogx(kept) - added * np.log(last_q)
    return np.where((kept > 0) & (usable | (added == 0)), scaled / max(total, 1.0), np.inf)


def _xlogx(counts: NDArray[np.int64] | NDArray[np.float64]) -> NDArray[np.float64]:
    """``x log x`` of counts, which are 0 or at least 1; 0 at 0."""
    x = counts.astype(np.float64)
    return x * np.log(np.maximum(x, 1))


@cache
def _level_runs() -> NDArray[np.intp]:
    """Each candidate's levels as positions in the flattened runs [width - 1, start]: intp [1921, 128]."""
    candidates = _CANDIDATES[:, None]
    # Bin j belongs to level floor(j * 128 / i), so that level l begins at ceil(l * i / 128).
    bounds = -(-np.arange(MERGED_LEVELS + 1) * candidates // MERGED_LEVELS)
    runs: NDArray[np.intp] = (np.diff(bounds, axis=1) - 1) * BINS + bounds[:, :-1]
    return runs


@cache
def _last_level_starts() -> NDArray[np.intp]:
    """Where each candidate's last level begins: intp [1921]."""
    starts: NDArray[np.intp] = -(-(MERGED_LEVELS - 1) * _CANDIDATES // MERGED_LEVELS)
    return starts
