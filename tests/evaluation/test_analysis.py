"""Tensors against FP32, the sensitivity of layers, what to keep in float, and the images that changed."""

import base64
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from calib.int8 import quantize
from calib.plan import plan_int8
from calib.table import CalibrationTable
from data.base import Preprocessing
from data.tensor import TensorImages
from engines.integer import IntegerNetwork
from evaluation.accuracy import Classes, Predictions
from evaluation.analysis import (
    LEAST_IMAGES,
    Sample,
    affordable_images,
    analyse,
    changed_images,
    data_uri,
    layers_to_keep,
    sample,
    sensitivities,
    tensor_figures,
)
from evaluation.results import Report
from evaluation.subject import Subject
from evaluation.verdict import Limits

LAYERS = ["conv1", "conv2", "ip1", "ip2"]


@pytest.fixture(scope="module")
def subject(evaluated: object) -> Subject:
    return evaluated.subject  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def images(subject: Subject) -> Sample:
    return sample(subject.images, 0, len(subject.images), 64)


def table_of(subject: Subject, **factors: float) -> CalibrationTable:
    """The run's table with some scales multiplied."""
    assert subject.int8.table is not None
    scales = {name: scale * factors.get(name, 1.0) for name, scale in subject.int8.table.scales.items()}
    return CalibrationTable(scales)


def test_a_sample_is_spread_evenly_and_never_larger_than_the_set(subject: Subject) -> None:
    assert sample(subject.images, 5, 100, 4).positions.tolist() == [5, 30, 55, 80]
    assert sample(subject.images, 0, 3, 10).positions.tolist() == [0, 1, 2]
    batches = list(sample(subject.images, 0, 50, 5).batches(2))
    assert [len(labels) for _, labels in batches] == [2, 2, 1]
    assert torch.equal(batches[1][0], subject.images.images(torch.tensor([20, 30])))


def test_tensor_figures_are_what_both_networks_hold(subject: Subject, images: Sample) -> None:
    table = table_of(subject)
    plan = plan_int8(subject.network, table)
    figures = {item.name: item for item in tensor_figures(subject.network, table.scales, plan, images)}
    batch = images.source.images(images.positions)
    truth: dict[str, Tensor] = {}
    quantized: dict[str, Tensor] = {}
    subject.network.run(batch, truth.__setitem__)
    IntegerNetwork(plan, quantized.__setitem__)(batch)

    assert tuple(figures) == subject.network.tensors
    for name, item in figures.items():
        x, y = truth[name].double(), quantized[name].double()
        assert item.scale == table.scales[name]
        assert item.threshold is not None
        assert item.threshold == pytest.approx(127 * table.scales[name])
        assert item.clipped == pytest.approx(100 * float((x.abs() > item.threshold).double().mean()))
        assert item.histogram.maximum == float(x.abs().max())
        assert sum(item.histogram.counts) == x.numel()
        own = quantize(truth[name], item.scale).double() * item.scale
        assert item.own_sqnr_db == pytest.approx(
            float(10 * (x.square().sum() / (x - own).square().sum()).log10()), 1e-4
        )
        if name != "data":
            noise = (x - y).square().sum()
            assert item.sqnr_db == pytest.approx(float(10 * (x.square().sum() / noise).log10()), 1e-4)
            assert item.cosine == pytest.approx(float((x * y).sum() / (x.norm() * y.norm())), 1e-6)
    assert figures["data"].sqnr_db is None
    assert figures["data"].cosine == pytest.approx(1)
    assert [name for name, item in figures.items() if item.quantized] == ["data", "pool1", "pool2", "ip1"]


def test_tensor_figures_do_not_depend_on_the_batches(
    subject: Subject, images: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_int8(subject.network, table_of(subject))
    scales = table_of(subject).scales
    whole = tensor_figures(subject.network, scales, plan, images)
    monkeypatch.setattr("evaluation.analysis.TENSOR_BYTES", 1)

    for one, other in zip(whole, tensor_figures(subject.network, scales, plan, images), strict=True):
        assert one.cosine == pytest.approx(other.cosine)
        assert one.clipped == pytest.approx(other.clipped)
        assert one.own_sqnr_db == pytest.approx(other.own_sqnr_db, 1e-4)


def test_without_a_table_there_are_still_histograms(subject: Subject, images: Sample) -> None:
    for item in tensor_figures(subject.network, {}, None, images):
        assert sum(item.histogram.counts) > 0
        assert item.scale is item.clipped is item.own_sqnr_db is item.cosine is None
        assert not item.quantized


def test_histograms_end_at_the_largest_value(report: Report) -> None:
    for tensor in report.tensors:
        assert 0 < len(tensor.histogram.counts) <= 128
        assert tensor.histogram.counts[-1] > 0
        assert tensor.histogram.range >= tensor.histogram.maximum * 0.999


def test_sensitivities_are_those_of_networks_with_these_layers(subject: Subject, images: Sample) -> None:
    table = table_of(subject, pool1=0.05)
    plan = plan_int8(subject.network, table)
    found = {item.layer: item for item in sensitivities(subject.network, plan, images, 16, Classes(10)).layers}
    batch, labels = next(images.batches(64))
    with torch.inference_mode():
        reference = subject.network.module(batch)

    assert set(found) == set(LAYERS)
    assert sum(item.noise_share for item in found.values()) == pytest.approx(100)
    for name, item in found.items():
        others = [layer for layer in LAYERS if layer != name]
        for keep, points, changed in (
            (others, item.only_points, item.only_changed),
            ([name], item.without_points, item.without_changed),
        ):
            output = IntegerNetwork(plan_int8(subject.network, table, keep))(batch)
            right = (output.argmax(1) == labels).double().mean() - (reference.argmax(1) == labels).double().mean()
            assert points == pytest.approx(100 * float(right))
            assert changed == pytest.approx(100 * float((output.argmax(1) != reference.argmax(1)).double().mean()))


def test_a_sabotaged_layer_is_ranked_first_and_kept(subject: Subject, images: Sample) -> None:
    # pool1's values are all clipped: conv2, which reads them, is lost.
    plan = plan_int8(subject.network, table_of(subject, pool1=0.001))

    analysis = analyse(subject.network, plan, images, 64, Classes(10), Limits(2.0, 0.0), passed=False)

    assert analysis.layers[0].layer == "conv2"
    assert analysis.layers[0].noise_share > 50
    assert analysis.suggestion == ["conv2"]
    assert "quantize.py --keep-fp conv2" in analysis.advice
    kept = layers_to_keep(
        subject.network, plan, ["conv2", "ip1", "ip2", "conv1"], images, 64, Classes(10), Limits(2.0, 0.0)
    )
    assert kept is not None
    assert kept[0] == ["conv2"]


def test_when_every_layer_is_lost_nothing_is_suggested(subject: Subject, images: Sample) -> None:
    plan = plan_int8(subject.network, table_of(subject, data=1e-5, pool1=1e-5, pool2=1e-5, ip1=1e-5))

    analysis = analyse(subject.network, plan, images, 64, Classes(10), Limits(0.0, 0.0), passed=False)

    assert analysis.suggestion == []
    assert "No choice of layers" in analysis.advice


def test_what_passes_needs_no_layer(subject: Subject, images: Sample) -> None:
    plan = plan_int8(subject.network, table_of(subject))

    analysis = analyse(subject.network, plan, images, 64, Classes(10), Limits(1.0, 0.0), passed=True)

    assert analysis.suggestion == []
    assert analysis.advice.startswith("INT8 is within the tolerance")
    failed_elsewhere = analyse(subject.network, plan, images, 64, Classes(10), Limits(50.0, 0.0), passed=False)
    assert "comes from the engine" in failed_elsewhere.advice


def test_the_number_of_images_follows_the_arithmetic(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_int8(subject.network, table_of(subject))

    count = affordable_images(subject.network, plan, subject.images)

    assert count >= 10_000  # all of MNIST's test set for LeNet
    monkeypatch.setattr("evaluation.analysis.ARITHMETIC", 1.0)
    assert affordable_images(subject.network, plan, subject.images) == LEAST_IMAGES


def predictions(predicted: list[int]) -> Predictions:
    count = len(predicted)
    return Predictions(
        torch.tensor(predicted, dtype=torch.int32),
        torch.full((count,), 0.5),
        torch.ones(count, dtype=torch.bool),
        1.0,
        0.0,
    )


def test_changed_images_are_named_ordered_and_limited() -> None:
    pixels = torch.arange(6, dtype=torch.uint8).reshape(6, 1, 1, 1).expand(6, 1, 4, 4).clone()
    source = TensorImages(pixels, torch.zeros(6, dtype=torch.int64), Preprocessing(1, 4, 4))
    labels = torch.tensor([0, 0, 0, 0, 0])
    found = {
        "fp32": predictions([1, 1, 0, 0, 0]),
        "int8": predictions([0, 2, 1, 0, -1]),
        "fp16": predictions([1, 1, 0, 0, 0]),
    }

    shown, totals = changed_images(source, 1, labels, found, source.preprocessing, limit=3)  # type: ignore[arg-type]

    assert totals == {"int8": 4, "fp16": 0}
    assert [(item.index, item.change, item.fp32, item.predicted) for item in shown] == [
        (3, "lost", 0, 1),
        (5, "lost", 0, -1),
        (1, "gained", 1, 0),
    ]
    assert decoded(shown[0].picture).tolist() == [[3] * 4] * 4


def decoded(uri: str) -> np.ndarray:
    assert uri.startswith("data:image/png;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_show_the_stored_pixels(channels: int) -> None:
    stored = torch.randint(0, 256, (1, channels, 9, 7), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    plain = Preprocessing(channels, 9, 7)
    normalised = replace(plain, mean=(0.48, 0.45, 0.4)[:channels], std=(0.22, 0.23, 0.2)[:channels])
    expected = stored[0, 0] if channels == 1 else stored[0].permute(1, 2, 0)

    for preprocessing in (plain, normalised):
        image = TensorImages(stored, torch.zeros(1, dtype=torch.int64), preprocessing).images(slice(0, 1))[0]
        assert decoded(data_uri(image, preprocessing)).tolist() == expected.tolist()


def test_large_pictures_are_reduced() -> None:
    assert decoded(data_uri(torch.rand(3, 300, 200), Preprocessing(3, 300, 200), largest=90)).shape == (90, 60, 3)
