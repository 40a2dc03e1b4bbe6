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

from calib.histogram import AbsHistogram
from calib.table import scale_to_hex
from calib.threshold import threshold

HERE = Path(__file__).parent / "tensorrt"
ALGORITHMS = ("entropy2", "entropy", "minmax", "legacy")


@pytest.fixture(scope="module")
def histograms():
    found = {}
    cases = np.load(HERE / "distributions.npz")
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


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_scale_is_tensorrts(histograms, algorithm):
    scales = json.loads((HERE / "scales.json").read_text())
    assert len(scales) == 296
    assert histograms.keys() == scales.keys()
    column = ALGORITHMS.index(algorithm)
    expected = {name: row[column] for name, row in scales.items()}
    found = {name: scale_to_hex(threshold(histograms[name], algorithm).value / 127) for name in scales}
    assert found == expected
