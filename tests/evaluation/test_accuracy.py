"""Predictions of several precisions over the same images, and the figures made of them."""

from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy

from common.errors import InputError
from data.base import Preprocessing
from data.tensor import TensorImages
from engines.base import Compiled, EngineError
from evaluation.accuracy import Classes, Predictions, accuracy, paired
from evaluation.running import check_range, run, run_shared, sqnr_db


def network(run: Callable[[Tensor], Tensor], precision: str = "fp32") -> Compiled:
    return Compiled("fake", precision, "CPU", run, 1)  # type: ignore[arg-type]


def predict(
    compiled: list[Compiled], batches: list[tuple[Tensor, Tensor]], classes: int
) -> tuple[Tensor, list[Predictions]]:
    labels, found = run(compiled, batches, Classes(classes))
    return labels, cast("list[Predictions]", found)


def probabilities(count: int, classes: int, seed: int) -> Tensor:
    return torch.rand(count, classes, generator=torch.Generator().manual_seed(seed)).softmax(1)


def stream(labels: Tensor, size: int = 32) -> list[tuple[Tensor, Tensor]]:
    """Batches whose "images" are the positions of their rows."""
    index = torch.arange(len(labels), dtype=torch.float32).reshape(-1, 1, 1, 1)
    return list(zip(index.split(size), labels.split(size), strict=True))


def lookup(table: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda images: table[images.flatten().long()]


@pytest.mark.parametrize("classes", [2, 4, 5, 10])
def test_figures_are_those_of_torchmetrics(classes: int) -> None:
    outputs = probabilities(300, classes, 1)
    labels = torch.randint(0, classes, (300,), generator=torch.Generator().manual_seed(2))

    target, (found,) = predict([network(lookup(outputs))], stream(labels), classes)
    figures = accuracy(found, found, target, classes)

    def expected(top_k: int) -> float:
        return float(multiclass_accuracy(outputs, labels, classes, average="micro", top_k=top_k))

    assert figures.top1 == pytest.approx(100 * expected(1), abs=1e-4)
    assert figures.top5 == pytest.approx(100 * expected(min(5, classes)), abs=1e-4)
    assert figures.images == 300
    assert figures.top1_interval.low < figures.top1 < figures.top1_interval.high
    shares = [entry.correct / entry.images for entry in figures.per_class]
    assert shares == pytest.approx(multiclass_accuracy(outputs, labels, classes, average="none").tolist())
    assert sum(mistake.count for mistake in figures.mistakes) == 300 - figures.correct_top1
    counts = [mistake.count for mistake in figures.mistakes]
    assert counts == sorted(counts, reverse=True)


def test_the_reference_agrees_with_itself() -> None:
    outputs = probabilities(50, 10, 1)
    labels = torch.arange(50) % 10

    target, (reference, same) = predict([network(lookup(outputs)), network(lookup(outputs))], stream(labels), 10)

    figures = accuracy(same, reference, target, 10)
    assert figures.agreement == 100
    assert figures.sqnr_db is None
    assert paired(same, reference, target).lost == 0
    assert paired(same, reference, target).mcnemar_mid == 1


def test_pairs_agreement_and_noise() -> None:
    reference = torch.eye(3)[[0, 1, 2, 0]] * 0.8 + 0.1
    other = torch.eye(3)[[0, 2, 2, 1]] * 0.8 + 0.1
    labels = torch.tensor([0, 1, 0, 1])

    target, (first, second) = predict([network(lookup(reference)), network(lookup(other))], stream(labels, 3), 3)

    assert target.tolist() == [0, 1, 0, 1]
    comparison = paired(second, first, target)
    assert (comparison.lost, comparison.gained, comparison.top1_points) == (1, 1, 0)
    assert accuracy(second, first, target, 3).agreement == 50
    noise = float((reference - other).double().square().sum())
    signal = float(reference.double().square().sum())
    assert second.sqnr_db == pytest.approx(sqnr_db(signal, noise))


def test_outputs_that_are_not_finite_count_as_wrong_and_are_counted() -> None:
    reference = torch.eye(3)[[0, 1, 2]]
    broken = reference.clone()
    broken[1, 0] = float("nan")
    broken[2, 2] = float("inf")
    labels = torch.tensor([0, 1, 2])

    target, (first, second) = predict([network(lookup(reference)), network(lookup(broken), "fp16")], stream(labels), 3)
    figures = accuracy(second, first, target, 3)

    assert (figures.non_finite, figures.correct_top1, figures.correct_top5) == (2, 1, 1)
    assert figures.agreement == pytest.approx(100 / 3)
    assert paired(second, first, target).lost == 2


@pytest.mark.parametrize(
    ("outputs", "labels", "message"),
    [
        (torch.full((4, 3), torch.nan), [0, 0, 0, 0], "FP32 outputs are not finite for 4 of 4 images"),
        (torch.eye(3), [0, -1, 1], "but the network has 3 classes"),
        (torch.eye(3), [0, 3, 1], "but the network has 3 classes"),
        (torch.eye(4), [0, 1], "not a classifier of this data set"),
        (torch.eye(3), [], "no images"),
    ],
)
def test_what_has_no_accuracy_is_refused(outputs: Tensor, labels: list[int], message: str) -> None:
    batches = stream(torch.tensor(labels)) if labels else []
    with pytest.raises(InputError, match=message):
        predict([network(lookup(outputs))], batches, 3)


def test_an_engine_that_stops_is_told_in_one_line() -> None:
    def full(images: Tensor) -> Tensor:
        raise EngineError("the GPU has too little free memory")

    labels = torch.zeros(4, dtype=torch.int64)
    compiled = [network(lookup(probabilities(4, 3, 0))), network(full, "int8")]
    with pytest.raises(InputError, match="^fake in int8 stopped: the GPU has too little free memory$"):
        run(compiled, stream(labels), Classes(3))


def images(count: int) -> TensorImages:
    pixels = torch.zeros(count, 1, 2, 2, dtype=torch.uint8)
    return TensorImages(pixels, torch.arange(count) % 3, Preprocessing(1, 2, 2))


@pytest.mark.parametrize(
    ("start", "count", "expected"), [(0, None, 10), (2, None, 2), (1, 1, 4), (2, 1, 2), (0, 3, 10)]
)
def test_the_range_of_batches(start: int, count: int | None, expected: int) -> None:
    assert check_range(images(10), 4, start, count) == expected

    measured = run_shared([network(lambda x: torch.ones(len(x), 3) / 3)], images(10), Classes(3), 4, start, count)

    assert measured is not None
    labels, _ = measured
    assert labels.tolist() == [index % 3 for index in range(4 * start, 4 * start + expected)]


@pytest.mark.parametrize(("start", "count", "message"), [(3, None, "skips all 3"), (1, 3, "more than the 3 batches")])
def test_a_range_beyond_the_images_is_refused(start: int, count: int | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_range(images(10), 4, start, count)
