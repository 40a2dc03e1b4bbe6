"""Counting a value and what a ReLU makes of it at once: the counts of each alone."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from calib.histogram.base import BINS, SMALLEST, count
from calib.histogram.rectified import count_rectified


def assert_as_alone(values, limit):
    both = count_rectified(values, limit)
    assert both is not None
    for one, alone in zip(both, (count(values, limit), count(values.clamp(min=0), limit)), strict=True):
        np.testing.assert_array_equal(one.counts, alone.counts)
        assert (one.range, one.largest) == (alone.range, alone.largest)


@given(
    arrays.arrays(np.float32, st.integers(0, 50), elements=st.floats(-8, 8, width=32)),
    st.sampled_from([8.0, 8.1, 1000.0, 12345.678]),
)
def test_any_values_within_the_range(values, limit):
    assert_as_alone(torch.from_numpy(values), limit)


def test_more_values_than_a_row_and_the_edges_of_bins():
    values = torch.randn(300_000, generator=torch.Generator().manual_seed(0)).reshape(3, 100, 1000)
    limit = float(values.abs().max())
    edges = torch.arange(-BINS, BINS + 1) * (limit / BINS)
    for given_values in (values, values.permute(2, 0, 1), edges, torch.nextafter(edges, torch.tensor(0.0))):
        assert_as_alone(given_values, limit)


@pytest.mark.parametrize(
    ("values", "limit"),
    [
        (torch.tensor([1.0, -2.0]), 1.5),
        (torch.tensor([1.0, 2.0]), 1.5),
        (torch.tensor([1.0, torch.nan]), 1.5),
        (torch.tensor([1.0, torch.inf]), 1.5),
        (torch.tensor([1.0]).half(), 1.5),
        (torch.tensor([0.0]), 0.0),
        (torch.tensor([SMALLEST]), 10 * SMALLEST),
    ],
)
def test_what_must_be_counted_alone(values, limit):
    assert count_rectified(values, limit) is None
