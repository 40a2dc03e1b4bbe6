"""The plain loop that the benchmark compares with is the definition: it finds the calibrator's thresholds."""

import numpy as np
import pytest
import torch

from benchmarks import plain
from benchmarks.cost import TENSORS, chain
from calib.algorithms import threshold
from calib.histogram.base import AbsHistogram


@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_threshold(seed):
    generator = torch.Generator().manual_seed(seed)
    ours, loop = AbsHistogram(), plain.PlainHistogram()
    for scale in (1.0, 3.0):
        values = torch.randn(20000, generator=generator).relu() * scale
        ours.add(values)
        loop.add(values.numpy())

    assert loop.range == ours.range
    # np.histogram rounds at a bin's edge otherwise than exact arithmetic does.
    assert np.abs(loop.counts - ours.counts).sum() <= 4
    assert plain.threshold(loop) == pytest.approx(threshold(ours).value, rel=1e-6)


def test_empty_candidates_lose():
    histogram = plain.PlainHistogram()
    histogram.add(np.array([1.0, -1.0], dtype=np.float32))
    assert plain.divergence(histogram.counts.astype(float), 200) == float("inf")
    assert plain.threshold(histogram) == pytest.approx(2048.5 / 2048)


def test_chains_have_as_many_tensors_as_they_say():
    for count in TENSORS:
        assert len(chain(count).tensors) == count
