"""Tests and intervals against SciPy, torchmetrics and their own definitions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest  # type: ignore[import-untyped]
from torchmetrics.functional.classification import binary_calibration_error, multiclass_confusion_matrix

from evaluation.statistics import (
    calibration_error,
    confusion_matrix,
    mcnemar,
    paired_interval,
    wilson_interval,
)


@given(st.integers(1, 20_000), st.data())
def test_wilson_is_scipys(trials: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, trials))

    expected = binomtest(successes, trials).proportion_ci(method="wilson")

    assert wilson_interval(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-12)


@given(st.integers(0, 3000), st.integers(0, 3000))
def test_mcnemar_is_the_binomial_test_of_the_discordant_pairs(lost: int, gained: int) -> None:
    exact, mid = mcnemar(lost, gained)

    pairs = lost + gained
    assert exact == pytest.approx(binomtest(lost, pairs).pvalue if pairs else 1.0, rel=1e-9)
    tail = 2 * binom.cdf(min(lost, gained), pairs, 0.5) - binom.pmf(min(lost, gained), pairs, 0.5)
    assert mid == pytest.approx(min(1.0, tail), rel=1e-9)
    assert mid <= exact
    assert mcnemar(gained, lost) == (exact, mid)


def test_paired_interval_worked_by_hand() -> None:
    # 7 lost and 1 gained of 21: p = 8/23 and 2/23, difference -6/23, variance (10/23 - 36/529) / 23.
    low, high = paired_interval(7, 1, 21)

    half = 1.959964 * math.sqrt((10 / 23 - 36 / 529) / 23)
    assert (low, high) == pytest.approx((-6 / 23 - half, -6 / 23 + half), abs=1e-6)


@given(st.integers(0, 500), st.integers(0, 500), st.integers(1, 10_000))
def test_paired_interval_is_symmetric_and_holds_the_shrunken_difference(lost: int, gained: int, rest: int) -> None:
    trials = lost + gained + rest

    low, high = paired_interval(lost, gained, trials)

    assert -1 <= low <= (gained - lost) / (trials + 2) <= high <= 1
    assert low < high
    assert paired_interval(gained, lost, trials) == pytest.approx((-high, -low), abs=1e-12)


@pytest.mark.parametrize("arguments", [(3, 2), (-1, 2), (0, 0)])
def test_impossible_counts_are_refused(arguments: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="successes"):
        wilson_interval(*arguments)
    with pytest.raises(ValueError, match="lost"):
        paired_interval(arguments[0], 1, 1 if arguments[0] else 0)
    with pytest.raises(ValueError, match="gained"):
        mcnemar(-1, 1)


def test_calibration_error_is_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(1)
    confidence = torch.rand(5000, generator=generator) * 0.998 + 0.001
    correct = torch.rand(5000, generator=generator) < confidence**2

    # torchmetrics' binary error takes the probability as confidence when its label says whether it was right.
    expected = binary_calibration_error(confidence.double(), correct.long(), n_bins=15)

    assert calibration_error(confidence, correct) == pytest.approx(float(expected), abs=1e-6)


def test_calibration_error_at_the_ends() -> None:
    assert calibration_error(torch.ones(4), torch.ones(4, dtype=torch.bool)) == 0
    assert calibration_error(torch.ones(4), torch.zeros(4, dtype=torch.bool)) == 1
    assert calibration_error(torch.zeros(2), torch.zeros(2, dtype=torch.bool)) == 0
    with pytest.raises(ValueError, match="no predictions"):
        calibration_error(torch.empty(0), torch.empty(0, dtype=torch.bool))


def test_confusion_matrix_is_torchmetrics_without_the_outputs_that_are_not_finite() -> None:
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, 7, (400,), generator=generator)
    predicted = torch.randint(0, 7, (400,), generator=generator)

    expected = multiclass_confusion_matrix(predicted[:300], labels[:300], 7)

    predicted[300:] = -1
    assert torch.equal(confusion_matrix(predicted, labels, 7), expected)
    assert math.isclose(int(confusion_matrix(predicted, labels, 7).sum()), 300)
