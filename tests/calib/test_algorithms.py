"""Thresholds against the plain definition, on random and on adversarial histograms."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.algorithms import ALGORITHMS, threshold
from calib.histogram.base import BINS, AbsHistogram
from calib.table import CalibrationTable, scale_to_hex
from common.config import CalibrationConfig
from common.errors import InputError
from tests.calib import oracle
from tests.networks import mnist


def with_counts(counts, limit=1.0):
    histogram = AbsHistogram()
    histogram.counts = np.array(counts, dtype=np.int64)
    histogram.range = histogram.maximum = limit
    return histogram


def spike(*positions, count=1000):
    counts = np.zeros(BINS, dtype=np.int64)
    counts[list(positions)] = count
    return counts


def assert_equals_plain_definition(counts, limit=1.0):
    bins, divergences = oracle.entropy(counts)
    found = threshold(with_counts(counts, limit), "entropy2")
    assert found.bin == bins
    assert found.divergences is not None
    passed_over = np.isinf(divergences)
    assert (np.isinf(found.divergences) == passed_over).all()
    np.testing.assert_allclose(found.divergences[~passed_over], divergences[~passed_over], rtol=0, atol=1e-11)
    assert found.value == float(np.float32((bins + 0.5) * limit / BINS))


def test_how_much_worse_another_threshold_is():
    counts = np.random.default_rng(0).integers(1, 1000, BINS) // np.arange(1, BINS + 1)
    found = threshold(with_counts(counts, 3.0), "entropy2")
    smallest = found.divergences.min()
    for candidate in (found.bin, found.bin - 9, 128):
        excess = found.excess((candidate + 0.5) * 3.0 / BINS * (1 + 1e-6))
        assert excess == pytest.approx(found.divergences[candidate - 128] / smallest - 1)
    for value in (127.5 * 3.0 / BINS, 3.1, (found.bin + 0.7) * 3.0 / BINS, 0.0):
        assert found.excess(value) is None
    assert threshold(with_counts(counts, 3.0), "minmax").excess(3.0) is None


def random_histogram(seed):
    rng = np.random.default_rng(seed)
    shape = rng.choice(["normal", "relu", "exponential", "grid", "uniform", "two", "heavy"])
    size = int(rng.integers(10, 50_000))
    values = {
        "normal": lambda: rng.normal(size=size),
        "relu": lambda: np.maximum(rng.normal(size=size), 0),
        "exponential": lambda: rng.exponential(size=size),
        "grid": lambda: rng.integers(0, 256, size) / 255,
        "uniform": lambda: rng.uniform(size=size),
        "two": lambda: np.concatenate([rng.normal(size=size), rng.normal(50, 0.1, size=3)]),
        "heavy": lambda: rng.standard_t(2, size=size),
    }[shape]()
    histogram = AbsHistogram()
    for part in np.array_split(values.astype(np.float32), 3):
        histogram.add(torch.from_numpy(part))
    return histogram


@pytest.mark.parametrize("seed", range(24))
def test_random_histograms(seed):
    histogram = random_histogram(seed)
    assert_equals_plain_definition(histogram.counts, histogram.range)


_rng = np.random.default_rng(7)
_ramp = np.arange(BINS)
ADVERSARIAL = {
    "uniform": np.full(BINS, 5),
    "ones": np.ones(BINS, dtype=int),
    "periodic": np.tile([3, 0, 0, 1], BINS // 4),
    "periodic in 16": np.tile([1] + [0] * 15, BINS // 16),
    "first bin": spike(0),
    "second bin": spike(1),
    **{f"bin {position}": spike(position) for position in (126, 127, 128, 1000)},
    "last bin": spike(2047),
    "one value in the last bin": spike(2047, count=1),
    "first and last": spike(0, 2047),
    "second and last": spike(1, 2047, count=7),
    "spikes": spike(3, 127, 128, 129, 700, 2046),
    "empty upper half": np.where(_ramp < 1024, 10, 0),
    "empty lower half": np.where(_ramp < 1024, 0, 10),
    "only the first 128": np.where(_ramp < 128, 10, 0),
    "empty first 128": np.where(_ramp < 128, 0, 10),
    "outlier after a gap": np.where(_ramp < 300, 1000, 0) + spike(2047, count=1),
    "all in the tail": np.where(_ramp < 2000, 1, 10**6),
    "all in the zeros": np.where(_ramp < 1, 10**12, 1),
    "huge": np.full(BINS, 10**15),
    "huge and sparse": spike(1, 500, 1999, count=10**17),
    "huge beside one": np.where(_ramp % 2 == 0, 10**14, 1),
    "one in ten": (_rng.random(BINS) < 0.1).astype(int),
    "one in a hundred": (_rng.random(BINS) < 0.01).astype(int) * 100,
    "geometric": (10**9 * 0.99**_ramp).astype(np.int64),
    "rising": _ramp + 1,
    "saw": _ramp % 129,
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_histograms(name):
    assert_equals_plain_definition(ADVERSARIAL[name])


@settings(max_examples=6)
@given(
    st.dictionaries(st.integers(0, BINS - 1), st.integers(1, 10**6), min_size=1, max_size=30),
    st.floats(1e-6, 1e6),
)
def test_sparse_histograms(entries, limit):
    counts = np.zeros(BINS, dtype=np.int64)
    counts[list(entries)] = list(entries.values())
    assert_equals_plain_definition(counts, limit)


def test_largest_of_equal_divergences_wins():
    # A uniform histogram quantizes without loss wherever 128 levels divide the bins evenly.
    found = threshold(with_counts(np.full(BINS, 5)))
    assert found.divergences is not None
    assert found.bin == BINS
    assert found.divergences[-1] == pytest.approx(0, abs=1e-12)
    # So does one that ends earlier, with every candidate beyond its end.
    assert threshold(with_counts(spike(200, 201))).bin == BINS


def test_candidates_that_leave_values_beyond_need_a_filled_last_bin_and_a_second_one():
    found = threshold(with_counts(spike(200, 300, 2047)))
    assert found.divergences is not None
    usable = oracle.LEVELS + np.flatnonzero(np.isfinite(found.divergences))
    # 201 ends at a filled bin, but holds no other.
    assert usable.tolist() == [301, BINS]


def test_zeros_do_not_move_the_entropy2_threshold():
    counts = np.round(1e5 * np.exp(-np.arange(BINS) / 200)).astype(np.int64)
    many = counts.copy()
    many[0] += 10**9
    assert threshold(with_counts(counts)).bin == threshold(with_counts(many)).bin


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_all_zero_tensor_has_no_threshold(algorithm):
    histogram = AbsHistogram()
    assert threshold(histogram, algorithm).value == 0.0
    histogram.add(torch.zeros(10))
    assert threshold(histogram, algorithm).value == 0.0


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("value", [1.0, -3.7, 1e-30, 1e30])
def test_constant_tensor_keeps_its_value_in_range(algorithm, value):
    histogram = AbsHistogram()
    histogram.add(torch.full((100,), value))
    magnitude = float(torch.tensor(value).abs())
    assert magnitude <= threshold(histogram, algorithm).value <= float(np.float32(magnitude * 2048.5 / 2048))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_threshold_is_positive_and_at_most_half_a_bin_above_the_range(algorithm, seed):
    histogram = random_histogram(seed)
    value = threshold(histogram, algorithm).value
    assert type(value) is float
    assert 0 < value <= float(np.float32(histogram.range * 2048.5 / 2048))


def test_percentile():
    histogram = AbsHistogram()
    histogram.add(torch.arange(1, 1001) / 1000)
    assert threshold(histogram, "percentile", percentile=100).value == 1.0
    assert threshold(histogram, "percentile", percentile=50).value == pytest.approx(0.5, abs=1 / BINS)
    assert threshold(histogram, "percentile", percentile=99).value == pytest.approx(0.99, abs=1 / BINS)
    assert threshold(histogram, "percentile", percentile=1e-9).value > 0


@settings(max_examples=50)
@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=100), st.floats(0.01, 100))
def test_percentile_keeps_at_least_its_share(values, percentile):
    histogram = AbsHistogram()
    histogram.add(torch.tensor(values, dtype=torch.float32))
    found = threshold(histogram, "percentile", percentile=percentile).value
    inside = sum(abs(value) <= found for value in values)
    assert inside >= math.floor(percentile / 100 * len(values) - 1e-9)
    assert found <= histogram.maximum


def test_legacy_is_the_upper_end_of_the_bin_where_the_share_exceeds_the_quantile():
    counts = np.zeros(BINS, dtype=np.int64)
    counts[[10, 500, 2000]] = [50, 25, 25]
    histogram = with_counts(counts)
    assert threshold(histogram, "legacy", quantile=0.5).value == 501 / BINS
    assert threshold(histogram, "legacy", quantile=0.4).value == 11 / BINS
    assert threshold(histogram, "legacy", quantile=1.0).value == 1.0


def test_legacy_is_not_limited_to_the_maximum():
    histogram = AbsHistogram()
    histogram.add(torch.tensor([1.0]))
    histogram.add(torch.tensor([1.1]))
    assert threshold(histogram, "legacy").value == float(np.float32((math.floor(1.1 * 1024) + 1) / 1024))


def test_unknown_algorithm_and_option():
    with pytest.raises(InputError, match="entropy3"):
        threshold(with_counts(spike(5)), "entropy3")
    with pytest.raises(InputError, match="'share'"):
        threshold(with_counts(spike(5)), share=0.5)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_registry_alone_names_an_algorithm(name):
    found = CalibrationTable.loads(CalibrationTable({"x": 1.0}, name).dumps()).algorithm
    assert ALGORITHMS[found].header == ALGORITHMS[name].header
    assert (found == name) == (ALGORITHMS[name].tensorrt is not None)
    for option in ALGORITHMS[name].options:
        assert getattr(CalibrationConfig(), option.name) == option.default
        for value in (0, option.largest * 1.01):
            with pytest.raises(InputError, match=rf"calibration\.{option.name} must be in \(0, {option.largest:g}\]"):
                CalibrationConfig(**{option.name: value})


def test_data_of_nvidias_sample_gives_the_scale_that_tensorrt_wrote(mnist_dir):
    # sampleINT8 calibrates on images 50 to 549 of the training file, in batches of 50; TensorRT 7.2.2 wrote 3c008912.
    histogram = AbsHistogram()
    for batch in mnist(mnist_dir).train_file.images(slice(50, 550)).split(50):
        histogram.add(batch)
    found = threshold(histogram)
    assert found.bin == 2040
    assert scale_to_hex(found.value / 127) == "3c008912"
