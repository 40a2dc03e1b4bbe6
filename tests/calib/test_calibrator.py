"""calibrate(): from images to the table."""

import logging

import pytest
import torch
from torch import Tensor, nn

from calib import calibrate
from calib.calibrator import find_thresholds
from calib.collect import collect
from calib.table import Legacy
from calib.tracing import trace
from common.errors import InputError
from models import LeNet


@pytest.fixture
def model() -> LeNet:
    torch.manual_seed(0)
    return LeNet()


def images(batches: int = 2, size: int = 20) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.rand(size, 1, 28, 28, generator=generator) for _ in range(batches)]


def test_minmax_is_the_absolute_maximum_of_all_batches(model: LeNet) -> None:
    data = images()
    data[1][0, 0, 0, 0] = 3.5
    table = calibrate(model, data, algorithm="minmax")
    assert table.scales["data"] == pytest.approx(3.5 / 127, rel=1e-6)
    with torch.no_grad():
        largest = torch.cat([model.conv1(batch) for batch in data]).abs().max()
    assert table.scales["conv1"] == pytest.approx(float(largest) / 127, rel=1e-6)


def test_the_table_of_a_legacy_calibration_holds_its_parameters(model: LeNet) -> None:
    histograms = collect(trace(model), images())
    chosen = find_thresholds(histograms, "legacy", options={"quantile": 0.99}).table
    assert chosen.legacy == Legacy(quantile=0.99)
    assert find_thresholds(histograms, "legacy").table.header == "0 3ff0000000000000 3fefff2e48e8a71e"


def test_a_threshold_lies_half_a_bin_above_the_kept_bins(model: LeNet) -> None:
    calibration = find_thresholds(collect(trace(model), images()))
    for name, found in calibration.thresholds.items():
        histogram = calibration.histograms.of[calibration.histograms.network.scale_source[name]]
        assert found.bin is not None
        assert 128 <= found.bin <= 2048
        assert found.value == pytest.approx((found.bin + 0.5) * histogram.range / 2048, rel=1e-7)
        assert calibration.table.scales[name] == pytest.approx(found.value / 127, rel=1e-7)


def test_batch_order_matters_only_through_the_first_batchs_range(model: LeNet) -> None:
    data = images(3)
    forward, backward = collect(trace(model), data), collect(trace(model), data[:1] + data[:0:-1])
    for name, histogram in forward.of.items():
        assert (histogram.counts == backward.of[name].counts).all()


def test_batches_with_labels_are_taken_as_a_data_loader_gives_them(model: LeNet) -> None:
    data = images()
    labelled = [(batch, torch.zeros(len(batch), dtype=torch.int64)) for batch in data]
    assert calibrate(model, labelled).scales == calibrate(model, data).scales


def test_what_int8_reads_and_is_clipped_much_is_named(model: LeNet, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    calibrate(model, images(), "percentile", options={"percentile": 99.9})
    assert not caplog.records
    calibrate(model, images(), "percentile", options={"percentile": 90})
    (message,) = caplog.messages
    assert message.startswith("percentile clips ")
    assert message.endswith(": INT8 may lose accuracy; try another algorithm")
    assert "% of pool1" in message
    assert "% of conv1" not in message  # only the pooled values are read


def test_progress_counts_batches(model: LeNet) -> None:
    seen: list[int] = []
    histograms = collect(trace(model), images(3), lambda batch, seconds: seen.append(batch))
    assert seen == [1, 2, 3]
    assert histograms.images == 60
    assert len(histograms.batch_seconds) == 3


def test_a_tensor_of_zeros_has_no_range_and_is_named(model: LeNet, caplog: pytest.LogCaptureFixture) -> None:
    nn.init.zeros_(model.ip1.weight)
    nn.init.constant_(model.ip1.bias, -1.0)
    with caplog.at_level(logging.WARNING, "calib"):
        table = calibrate(model, images())
    assert table.scales["ip1"] == 0
    assert "ip1" in table.unusable
    assert "no usable range, all values were zero: ip1" in caplog.text


def test_constant_images_are_called_out(model: LeNet, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "calib"):
        calibrate(model, [torch.full((4, 1, 28, 28), 0.5)])
    assert "represent nothing" in caplog.text


def test_one_image_again_and_again_is_called_out(model: LeNet, caplog: pytest.LogCaptureFixture) -> None:
    images = torch.rand(2, 1, 28, 28)
    with caplog.at_level(logging.WARNING, "calib"):
        calibrate(model, [images])
        calibrate(model, [images[:1]])
    assert "same one" not in caplog.text
    with caplog.at_level(logging.WARNING, "calib"):
        calibrate(model, [images[:1].expand(3, 1, 28, 28), images[:1]])
    assert "all 4 calibration images are the same one" in caplog.text


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "at least one batch"),
        ([torch.zeros(2, 1, 28, 28, dtype=torch.uint8)], "must be a float32 tensor"),
        ([torch.rand(1, 28, 28)], "must be a float32 tensor"),
        ([torch.rand(0, 1, 28, 28)], "must be a float32 tensor"),
        (["images"], "not str"),
        ([torch.rand(2, 3, 28, 28)], "does not take images"),
        ([torch.full((2, 1, 28, 28), float("nan"))], "batch 1, tensor data: .*NaN"),
        ([torch.rand(2, 1, 28, 28), torch.full((2, 1, 28, 28), float("inf"))], "batch 2, tensor data: .*infinity"),
        ([torch.zeros(2, 1, 28, 28)], "all calibration images are zero"),
    ],
)
def test_bad_batches_are_refused(model: LeNet, batches: list[object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        calibrate(model, batches)


def test_weights_that_are_not_finite_are_found(model: LeNet) -> None:
    with torch.no_grad():
        model.conv2.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match=r"tensor conv2: .*NaN"):
        calibrate(model, images())
