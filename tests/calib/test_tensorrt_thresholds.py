"""Thresholds that TensorRT 10.6.0 itself chose on an H100, for 296 distributions of 41 kinds.

``tensorrt/scales.json`` holds the scales that IInt8EntropyCalibrator2, IInt8EntropyCalibrator, IInt8MinMaxCalibrator
and IInt8LegacyCalibrator (quantile 0.9999, regression cutoff 1) wrote. ``tensorrt/distributions.npz`` holds what they
were calibrated on: of half the cases the values, float32 [batches, values]; of the others, to keep the file small, the
histogram and the maximum.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from calib.algorithms import device_search, threshold, thresholds
from calib.histogram.base import AbsHistogram
from calib.table import scale_to_hex

HERE = Path(__file__).parent / "tensorrt"
ALGORITHMS = ("entropy2", "entropy", "minmax", "legacy")


def histograms_of(file):
    """Name of the distribution -> its histogram."""
    found = {}
    cases = np.load(file)
    for name in cases.files:
        case, _, part = name.partition("|")
        histogram = found.setdefault(case, AbsHistogram())
        if part == "counts":
            histogram.counts = cases[name].astype(np.int64)
        elif part == "range":
            histogram.range, histogram.maximum = cases[name].tolist()
        else:
            for batch in cases[name]:
                histogram.add(torch.from_numpy(batch))
    return found


@pytest.fixture(scope="module")
def histograms():
    return histograms_of(HERE / "distributions.npz")


@pytest.fixture(scope="module")
def scales():
    found = json.loads((HERE / "scales.json").read_text())
    assert len(found) == 296
    return found


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_scale_is_tensorrts(histograms, scales, algorithm):
    assert histograms.keys() == scales.keys()
    column = ALGORITHMS.index(algorithm)
    expected = {name: row[column] for name, row in scales.items()}
    found = {name: scale_to_hex(threshold(histograms[name], algorithm).value / 127) for name in scales}
    assert found == expected


def test_the_search_for_a_gpu_finds_the_same_divergences(histograms):
    alive = {name: histogram for name, histogram in histograms.items() if histogram.maximum > 0}
    assert len(alive) > 290
    for name in list(alive)[::4]:
        histogram = alive[name]
        counts = np.concatenate([histogram.counts[1:2], histogram.counts[1:]])
        found = device_search.divergences(torch.from_numpy(counts)[None])[0].numpy()
        np.testing.assert_allclose(found, threshold(histogram).divergences, rtol=0, atol=1e-12, err_msg=name)


@pytest.mark.gpu
def test_the_search_on_a_gpu_finds_tensorrts_scales_too(histograms, scales):
    found = thresholds([histograms[name] for name in scales], device=torch.device("cuda", 0))
    assert [scale_to_hex(one.value / 127) for one in found] == [row[0] for row in scales.values()]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_difficult_distributions(algorithm):
    """304 more: heavy tails, spikes, few values, edges of bins, batches of one value, the largest and smallest ones."""
    wanted = json.loads((HERE / "difficult.json").read_text())
    assert len(wanted) == 304
    column = {"entropy2": 0, "entropy": 0, "minmax": 1, "legacy": 2}[algorithm]
    histograms = histograms_of(HERE / "difficult.npz")
    found = {name: scale_to_hex(threshold(histograms[name], algorithm).value / 127) for name in wanted}
    assert found == {name: row[column] for name, row in wanted.items()}
