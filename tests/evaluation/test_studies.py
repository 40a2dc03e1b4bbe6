"""Calibration studies on the digits."""

import dataclasses

import pytest

from calib.calibrator import calibrate, find_thresholds
from calib.network import Network
from calib.subset import draw
from calib.tracing import trace
from common.config import CalibrationConfig, DataConfig, QuantizationConfig
from data import Splits, open_splits
from evaluation.accuracy import Classes
from evaluation.studies import compare_algorithms, subset_histograms, sweep_images
from tests.runs import digits_lenet

CONFIG = CalibrationConfig(batches=4, batch_size=50)
MEASURE = Classes(10)


@pytest.fixture(scope="module")
def data() -> Splits:
    return open_splits(DataConfig(dataset="digits", validation=200, augment=False), seed=1)


@pytest.fixture(scope="module")
def network(data: Splits) -> Network:
    """LeNet after a few steps: enough for predictions that quantization could change."""
    return trace(digits_lenet(data, steps=40))


def test_algorithms_are_compared_on_the_same_histograms(network: Network, data: Splits) -> None:
    found = compare_algorithms(network, data, CONFIG, QuantizationConfig(), 1, ["entropy2", "minmax"], MEASURE)
    assert list(found) == ["entropy2", "minmax"]
    direct = find_thresholds(subset_histograms(network, data, CONFIG, 1), "minmax").table
    assert found["minmax"].scales == direct.scales
    assert found["minmax"].scales["ip1"] != found["entropy2"].scales["ip1"]
    for outcome in found.values():
        assert outcome.top1 > 60
        assert abs(outcome.points) <= outcome.changed


def test_a_sweep_calibrates_once_per_number_and_seed(network: Network, data: Splits) -> None:
    points = sweep_images(network, data, CONFIG, QuantizationConfig(), [50, 130], range(3), MEASURE)
    assert [(point.images, len(point.outcomes)) for point in points] == [(50, 3), (130, 3)]
    first, second = points[0].outcomes[:2]
    assert first.scales != second.scales
    assert all(0 <= spread < 1 for spread in points[0].spread.values())
    alone = sweep_images(network, data, CONFIG, QuantizationConfig(), [50], [0], MEASURE)[0]
    assert set(alone.spread.values()) == {0.0}


def test_fewer_images_of_a_sweep_are_the_first_of_the_most(network: Network, data: Splits) -> None:
    counts = [40, 150, 130, 100]
    points = sweep_images(network, data, CONFIG, QuantizationConfig(), counts, [7], MEASURE)
    subset = draw(data, len(data.info.classes), dataclasses.replace(CONFIG, batches=3), 7)
    assert [point.images for point in points] == counts
    for point in points:
        batches = [data.train_file.images(part) for part in subset.positions[: point.images].split(50)]
        assert point.outcomes[0].scales == calibrate(network, batches).scales
