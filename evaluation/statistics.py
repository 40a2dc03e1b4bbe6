"""The few statistics that give "within one point" a meaning: paired tests, intervals, calibration error."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Z95 = 1.959963984540054
"""97.5 % quantile of the standard normal distribution: the half width of a two-sided 95 % interval."""


def wilson_interval(successes: int, trials: int, z: float = Z95) -> tuple[float, float]:
    """Interval of a proportion (Wilson, JASA 22, 1927): (low, high) in [0, 1].

    Raises:
        ValueError: no trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes in {trials} trials")
    share = successes / trials
    shrink = 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / shrink
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / shrink
    # At 0 and at 1 the bound is exact; rounding must not push it past.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == trials else min(1.0, centre + half)
    return low, high


def paired_interval(lost: int, gained: int, trials: int, z: float = Z95) -> tuple[float, float]:
    """Interval of the difference of two paired proportions, second minus first: (low, high) in [-1, 1].

    The adjusted Wald interval of Bonett and Price (J. Educ. Behav. Stat. 37, 2012), one of those that Fagerland,
    Lydersen and Laake recommend (Stat. Med. 33, 2014). It has a width even where nothing differs.

    Args:
        lost: Images that only the first gets right.
        gained: Images that only the second gets right.
        trials: All images.
        z: Normal quantile.

    Raises:
        ValueError: more differences than images, or no images.
    """
    if trials < 1 or lost < 0 or gained < 0 or lost + gained > trials:
        raise ValueError(f"{lost} lost and {gained} gained of {trials}")
    p_lost = (lost + 1) / (trials + 2)
    p_gained = (gained + 1) / (trials + 2)
    difference = p_gained - p_lost
    half = z * math.sqrt((p_gained + p_lost - difference**2) / (trials + 2))
    return max(-1.0, difference - half), min(1.0, difference + half)


def mcnemar(lost: int, gained: int) -> tuple[float, float]:
    """McNemar's test of paired proportions, conditional on the discordant pairs: (exact p, mid-p), two-sided.

    exact = 2 * P(X <= min), mid-p = exact - P(X = min), X ~ Binomial(lost + gained, 1/2). The mid-p test is the one
    to read: the exact one is needlessly conservative (Fagerland, Lydersen, Laake, BMC Med. Res. Methodol. 13, 2013).

    Args:
        lost: Images that only the first gets right.
        gained: Images that only the second gets right.
    """
    if lost < 0 or gained < 0:
        raise ValueError(f"{lost} lost and {gained} gained")
    pairs, least = lost + gained, min(lost, gained)

    def mass(k: int) -> float:
        log = math.lgamma(pairs + 1) - math.lgamma(k + 1) - math.lgamma(pairs - k + 1) - pairs * math.log(2)
        return math.exp(log)

    tail = math.fsum(mass(k) for k in range(least + 1))
    return min(1.0, 2 * tail), min(1.0, 2 * tail - mass(least))


def calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    """Expected calibration error in [0, 1]: the mean gap between confidence and accuracy over equal-width bins.

    Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", ICML 2017 (15 bins, as there).

    Args:
        confidence: Probability of the predicted class, float [N], in [0, 1].
        correct: Whether the prediction is right, bool [N].
        bins: Number of bins; each is open below and closed above.
    """
    if confidence.numel() == 0:
        raise ValueError("no predictions")
    index = (confidence.double() * bins).ceil().long().sub(1).clamp(0, bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64)
    gap.index_add_(0, index, correct.double() - confidence.double())
    return float(gap.abs().sum() / confidence.numel())


def confusion_matrix(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Counts int64 [classes, classes]: row = true class, column = predicted; predictions below 0 are left out."""
    valid = predicted >= 0
    cells = labels[valid].long() * classes + predicted[valid].long()
    return torch.bincount(cells, minlength=classes * classes).reshape(classes, classes)
