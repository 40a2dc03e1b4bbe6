"""Counting a value and what a ReLU makes of it at once: the counts of each alone."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from calib.histogram import native
from calib.histogram.base import BINS, SMALLEST, count
from calib.histogram.native import native_counter
from calib.histogram.rectified import count_rectified

C = pytest.param(native_counter(), marks=pytest.mark.skipif(native_counter() is None, reason="no C compiler"), id="C")
NUMPY = pytest.param(None, id="NumPy")
EACH = pytest.mark.parametrize("counter", [NUMPY, C])


def assert_as_alone(values, limit, rectified, counter):
    both = count_rectified(values, limit, rectified, counter)
    assert both is not None
    for one, alone in zip(both, (count(values, limit), count(values.clamp(min=0), rectified)), strict=True):
        np.testing.assert_array_equal(one.counts, alone.counts)
        assert (one.range, one.largest) == (alone.range, alone.largest)


@EACH
@given(
    values=arrays.arrays(np.float32, st.integers(0, 50), elements=st.floats(-8, 8, width=32)),
    limit=st.sampled_from([8.0, 8.1, 1000.0, 12345.678]),
)
def test_any_values_within_the_range(counter, values, limit):
    assert_as_alone(torch.from_numpy(values), limit, limit, counter)


@pytest.mark.parametrize("counter", [C])
@pytest.mark.parametrize("rectified", [2.5, 0.5, 70.0])
def test_a_range_of_its_own_for_the_relu(counter, rectified):
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(1)).clamp(-9, 0.5)
    assert_as_alone(values, 9.0, rectified, counter)


@EACH
def test_more_values_than_a_row_and_the_edges_of_bins(counter):
    values = torch.randn(300_000, generator=torch.Generator().manual_seed(0)).reshape(3, 100, 1000)
    limit = float(values.abs().max())
    edges = torch.arange(-BINS, BINS + 1) * (limit / BINS)
    below = torch.nextafter(edges, torch.tensor(0.0))
    for given_values in (values, values.permute(2, 0, 1), values[..., :1], edges, below):
        assert_as_alone(given_values, limit, limit, counter)


@EACH
@pytest.mark.parametrize(
    ("values", "limit"),
    [
        (torch.tensor([1.0, -2.0]), 1.5),
        (torch.tensor([1.0, 2.0]), 1.5),
        (torch.tensor([1.0, torch.nan]), 1.5),
        (torch.tensor([1.0, -torch.nan]), 1.5),
        (torch.tensor([1.0, torch.inf]), 1.5),
        (torch.tensor([1.0]).half(), 1.5),
        (torch.tensor([0.0]), 0.0),
        (torch.tensor([SMALLEST]), 10 * SMALLEST),
    ],
)
def test_what_must_be_counted_alone(counter, values, limit):
    assert count_rectified(values, limit, limit, counter) is None


def test_a_relu_beyond_its_range_is_counted_alone():
    assert count_rectified(torch.tensor([1.0, 2.0]), 3.0, 1.5, native_counter()) is None


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", "true"])
def test_without_a_compiler_there_is_no_counter(compiler, monkeypatch):
    monkeypatch.setenv("CC", compiler)
    assert native_counter.__wrapped__() is None


@pytest.mark.skipif(native_counter() is None, reason="no C compiler")
def test_a_counter_that_counts_wrongly_is_not_taken(monkeypatch, caplog):
    monkeypatch.setattr(native, "SOURCE", native.SOURCE.replace("++lanes[0][bins[i]]", "++lanes[0][BINS]"))
    assert native_counter.__wrapped__() is None
    assert "counts wrongly" in caplog.text
