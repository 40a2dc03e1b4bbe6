"""Histograms of absolute values: float32 bins, the range's rules, what is counted and what is refused."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from calib.histogram.base import BINS, ROW, SMALLEST, AbsHistogram, count
from common.errors import InputError
from tests.calib import oracle

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
LARGEST = float(np.finfo(np.float32).max)
MODEST = st.floats(-1e3, 1e3, width=32)
BATCHES = st.lists(st.lists(st.one_of(FLOATS, MODEST, st.just(0.0)), max_size=40), max_size=6)


def tensor(values):
    return torch.tensor(values, dtype=torch.float32)


def histogram_of(*batches):
    histogram = AbsHistogram()
    for batch in batches:
        histogram.add(batch if isinstance(batch, torch.Tensor) else tensor(batch))
    return histogram


@given(BATCHES)
@example([[SMALLEST], [LARGEST], [LARGEST / 2]])
@example([[SMALLEST / 2, 1e-45]])
@example([[2.0, -2.0, 0.0], [], [1.0]])
def test_equals_the_plain_definition(batches):
    histogram = histogram_of(*batches)
    counts, limit = oracle.histogram([np.array(batch, dtype=np.float32) for batch in batches])
    assert histogram.range == limit
    assert histogram.counts.tolist() == counts.tolist()
    magnitudes = [abs(value) for batch in batches for value in batch]
    assert histogram.maximum == max((value for value in magnitudes if value >= SMALLEST), default=0.0)
    assert histogram.total == len(magnitudes)


@pytest.mark.parametrize("seed", range(5))
def test_values_at_and_beside_every_edge(seed):
    limit = np.float32(np.random.default_rng(seed).uniform(0.1, 100))
    edges = (np.arange(1, BINS) * float(limit) / BINS).astype(np.float32)
    values = np.concatenate([[limit], edges, np.nextafter(edges, np.float32(0)), np.nextafter(edges, limit)])
    counts, _ = oracle.histogram([values])
    assert histogram_of(torch.from_numpy(values)).counts.tolist() == counts.tolist()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [ROW - 1, ROW, ROW + 1, 3 * ROW + 7])
@pytest.mark.parametrize("least", [-9, 0, 0.5])
def test_large_batches_are_counted_in_pieces(size, threads, least):
    values = torch.randn(size, generator=torch.Generator().manual_seed(size)).clamp(min=least)
    bins = (values.abs().numpy() * (np.float32(BINS) / values.abs().max().numpy())).astype(int)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = histogram_of(values)
    finally:
        torch.set_num_threads(before)
    assert found.counts.tolist() == np.bincount(np.minimum(bins, BINS - 1), minlength=BINS).tolist()


def test_a_value_just_below_an_edge_can_count_above_it():
    # As in TensorRT: 2048 / 3 and the product are rounded to float32.
    below = float(np.float32(0.007324218284338713))
    assert below < 5 * 3 / BINS
    histogram = histogram_of([3.0], [below])
    assert np.flatnonzero(histogram.counts).tolist() == [5, BINS - 1]


@pytest.mark.parametrize("limit", [SMALLEST, 1e-37, 2048 * SMALLEST, 1e-34])
def test_values_below_the_smallest_normal_one_are_zeros(limit):
    histogram = histogram_of([limit, SMALLEST, SMALLEST / 2, -SMALLEST / 2])
    counts, _ = oracle.histogram([np.array([limit, SMALLEST, 0, 0], dtype=np.float32)])
    assert histogram.counts.tolist() == counts.tolist()
    assert histogram.counts[0] >= 2


@pytest.mark.parametrize("last", [0.5, 3.0, -1e-39, float("nan"), float("inf")])
@pytest.mark.parametrize("limit", [0.0, 2.5, 1e-36])
def test_threads_count_as_one_does(limit, last):
    values = torch.randn(3 * ROW + 5, generator=torch.Generator().manual_seed(0)).clamp(-2.5, 2.5) * (limit or 1.0)
    values[-1] = last
    alone = count(values, limit)
    with ThreadPoolExecutor(3) as pool:
        shared = count(values, limit, pool)
    assert shared.counts.tolist() == alone.counts.tolist()
    np.testing.assert_equal(shared.largest, alone.largest)
    assert (shared.range, shared.fits) == (alone.range, alone.fits)


def test_range_doubles_and_bins_merge_in_pairs():
    histogram = histogram_of([0.25, 0.5, 1.0])
    assert np.flatnonzero(histogram.counts).tolist() == [512, 1024, 2047]
    histogram.add(tensor([-3.5]))
    assert histogram.range == 4.0
    assert histogram.maximum == 3.5
    assert np.flatnonzero(histogram.counts).tolist() == [128, 256, 511, 1792]


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "inf"), (-float("inf"), "inf")])
@pytest.mark.parametrize("before", [[], [[1.0, 2.0]]])
def test_values_that_are_not_finite_are_refused_and_change_nothing(value, word, before):
    histogram = histogram_of(*before)
    state = (histogram.counts.tolist(), histogram.range, histogram.maximum)
    with pytest.raises(InputError, match=word):
        histogram.add(tensor([0.5, value, 7.0]))
    assert (histogram.counts.tolist(), histogram.range, histogram.maximum) == state


def test_other_dtypes():
    with pytest.raises(TypeError, match="float64"):
        AbsHistogram().add(torch.zeros(3, dtype=torch.float64))
    values = torch.randn(1000)
    for dtype in (torch.float16, torch.bfloat16):
        halves = values.to(dtype)
        assert histogram_of(halves).counts.tolist() == histogram_of(halves.float()).counts.tolist()


def test_memory_layout_does_not_matter():
    values = torch.randn(6, 5, 8, 8)
    expected = histogram_of(values).counts.tolist()
    assert histogram_of(values.contiguous(memory_format=torch.channels_last)).counts.tolist() == expected
    assert histogram_of(values.permute(3, 0, 2, 1)).counts.tolist() == expected
    padded = torch.zeros(6, 5, 8, 16)
    padded[..., ::2] = values
    assert histogram_of(padded[..., ::2]).counts.tolist() == expected
    assert histogram_of(torch.tensor([1.0]).expand(7)).total == 7
    assert histogram_of(torch.tensor(1.0)).total == 1


def test_batch_is_left_as_it_was():
    values = -torch.rand(100)
    copy = values.clone()
    histogram_of(values)
    assert torch.equal(values, copy)


def test_works_under_inference_mode_and_with_gradients():
    with torch.inference_mode():
        inside = histogram_of(torch.ones(5))
    assert inside.total == 5
    assert histogram_of(torch.ones(5, requires_grad=True)).total == 5


@settings(max_examples=30)
@given(st.lists(MODEST, min_size=1, max_size=200), st.floats(0, 2e3))
def test_share_above_a_threshold_is_right_to_a_bin(values, threshold):
    histogram = histogram_of(values)
    width = histogram.range / BINS
    magnitudes = np.abs(np.array(values))
    magnitudes[magnitudes < SMALLEST] = 0
    share = histogram.share_above(threshold)
    assert np.mean(magnitudes > threshold + width) <= share <= np.mean(magnitudes >= threshold)


def test_share_above_of_zeros_is_zero():
    assert histogram_of([0.0, 0.0]).share_above(0.0) == 0.0
    assert AbsHistogram().share_above(1.0) == 0.0


@settings(max_examples=30)
@given(st.lists(st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=30), min_size=2, max_size=6))
def test_parts_counted_with_an_earlier_range_are_those_of_a_doubled_one(parts):
    """The range itself, 1, is a value of each part: it lies in the last bin, and in the middle of a doubled one."""
    tensors = [torch.tensor([*part, 1.0, -1.0]) for part in parts]
    small = [part for part in tensors if part.abs().max() <= 1]
    wanted = AbsHistogram()
    wanted.add(torch.ones(1))
    wanted.add(torch.cat(tensors))
    found = AbsHistogram()
    found.add(torch.ones(1))
    counted = [count(part, found.range) for part in small]
    assert all(part.fits for part in counted)
    found.widen(max(part.abs().max().item() for part in tensors))
    for one in counted:
        found.add_counted(one)
    for part in tensors:
        if part.abs().max() > 1:
            assert not count(part, 1.0).fits
            found.add_counted(count(part, found.range))
    assert found.counts.tolist() == wanted.counts.tolist()
    assert (found.range, found.maximum) == (wanted.range, wanted.maximum)
