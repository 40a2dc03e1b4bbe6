"""The entropy search of many tensors at once, for a GPU: a millisecond for all tensors of a network.

On the CPU, ``calib.algorithms.search`` is faster with one tensor at a time. Both take the same candidates: their
divergences differ by 1e-14, which is less than a tie.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from calib.algorithms.base import MERGED_LEVELS
from calib.histogram.base import BINS

_MAX_WIDTH = BINS // MERGED_LEVELS


def divergences(counts: Tensor) -> Tensor:
    """Kullback-Leibler divergence of every candidate, float64 [T, 1921]: ``calib.algorithms.search`` has the formula.

    Args:
        counts: int64 [T, 2048], on the device that computes; bin 0 counts like its neighbour.
    """
    level_runs, starts, ends, last = _positions(counts.device)
    below = _cumulated(counts)
    filled = _cumulated((counts > 0).long())
    log_sums = _cumulated(_xlogx(counts))

    # All runs at once, [16 * 2048, T]: many small operations would take longer to start than to compute.
    of_runs = below.T.double()
    sums = of_runs.index_select(0, ends).sub_(of_runs.index_select(0, starts))
    of_runs = filled.T.double()
    bins = of_runs.index_select(0, ends).sub_(of_runs.index_select(0, starts))
    runs = sums.clamp(min=1).div_(bins.clamp_(min=1)).log_().mul_(sums)
    # Sums of rows, without a copy of them in memory.
    levels = torch.nn.functional.embedding_bag(level_runs, runs, mode="sum").T

    kept, total = below[:, MERGED_LEVELS:].double(), below[:, -1:].double()
    added = total - kept
    last_q = (below[:, MERGED_LEVELS:] - below[:, last]) / ((filled[:, MERGED_LEVELS:] - filled[:, last]) * kept)
    usable = (counts[:, MERGED_LEVELS - 1 :] > 0) & (filled[:, MERGED_LEVELS:] > 1)
    last_q = torch.where(usable, last_q, 1.0)
    reference = log_sums[:, MERGED_LEVELS - 1 : -1] + _xlogx(total - below[:, MERGED_LEVELS - 1 : -1])
    scaled = reference - _xlogx(total) - levels + _xlogx(kept) - added * torch.log(last_q)
    return torch.where((kept > 0) & (usable | (added == 0)), scaled / total.clamp(min=1), torch.inf)


def _cumulated(values: Tensor) -> Tensor:
    """Sums of the first 0, 1, ... values of each row: [T, N] -> [T, N + 1]."""
    return torch.nn.functional.pad(values.cumsum(dim=1), (1, 0))


def _xlogx(counts: Tensor) -> Tensor:
    """``x log x`` of counts, which are 0 or at least 1; 0 at 0."""
    x = counts.double()
    return x * torch.log(x.clamp(min=1))


@cache
def _positions(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where runs of bins lie, and where each candidate finds its levels, int64 on ``device``.

    Returns:
        Each candidate's levels as positions in the runs [width - 1, start], flattened: [1921, 128]. The bins at which
        these runs start and end, [16 * 2048] (runs beyond the last bin, which nothing needs, end there). And where
        each candidate's last level begins, [1921].
    """
    candidates = torch.arange(MERGED_LEVELS, BINS + 1)[:, None]
    # Bin j belongs to level floor(j * 128 / i), so that level l begins at ceil(l * i / 128).
    bounds = -(-torch.arange(MERGED_LEVELS + 1) * candidates // MERGED_LEVELS)
    levels = (bounds.diff(dim=1) - 1) * BINS + bounds[:, :-1]
    starts = torch.arange(BINS).repeat(_MAX_WIDTH)
    ends = (starts + torch.arange(1, _MAX_WIDTH + 1).repeat_interleave(BINS)).clamp(max=BINS)
    return levels.to(device), starts.to(device), ends.to(device), bounds[:, -2].to(device)
