"""What a network is for, found and asked for."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from calib.network import Network
from calib.task import purpose
from calib.tracing import trace
from common.config import TaskName
from common.errors import InputError

ENDS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "": lambda values, features: values,
    "normalize": lambda values, features: nn.functional.normalize(values),
    "sigmoid": lambda values, features: values.sigmoid(),
    "softmax": lambda values, features: values.softmax(1),
    "squeeze": lambda values, features: values.squeeze(1),
    "map": lambda values, features: features,
    "several": lambda values, features: {"boxes": values, "map": features},
}


class Model(nn.Module):
    """``width`` numbers for an image, or what ``end`` makes of them."""

    def __init__(self, width: int, end: str = "") -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.linear = nn.Linear(3 * 4, width)
        self.end = ENDS[end]

    def forward(self, images: Tensor) -> object:
        features = self.conv(images)
        return self.end(self.linear(features.flatten(1)), features)


def traced(width: int, end: str = "") -> Network:
    return trace(Model(width, end).eval(), "Model", (1, 4, 4))


@pytest.mark.parametrize(
    ("width", "end", "classes", "targets", "found"),
    [
        (10, "", 10, 0, "classify (one score for each of 10 classes)"),
        (10, "softmax", 10, 0, "classify (one score for each of 10 classes)"),
        (10, "sigmoid", 10, 0, "classify (one score for each of 10 classes)"),
        (10, "normalize", 10, 0, "embed (a normalised vector: 10)"),
        (7, "", 10, 0, "embed (7 numbers for an image, and the images have 10 classes)"),
        (7, "", 0, 0, "embed (7 numbers for an image, and the images have no classes)"),
        (7, "", 0, 7, "regress (as many numbers for an image as data.targets has: 7)"),
        (1, "", 10, 0, "regress (no scores but numbers: one number)"),
        (1, "squeeze", 10, 0, "regress (no scores but numbers: one number)"),
        (1, "squeeze", 0, 1, "regress (as many numbers for an image as data.targets has: 1)"),
        (3, "sigmoid", 10, 0, "regress (no scores but numbers: 3)"),
        (3, "map", 3, 0, "detect (a value for each place: 3x2x2)"),
        (3, "several", 3, 0, "detect (2 outputs: boxes, map)"),
    ],
)
def test_what_is_found_is_said(width: int, end: str, classes: int, targets: int, found: str) -> None:
    assert str(purpose(traced(width, end), "auto", classes, targets)) == found


@pytest.mark.parametrize("asked", ["regress", "embed", "detect"])
def test_what_is_asked_for_counts(asked: TaskName) -> None:
    assert str(purpose(traced(10), asked, 10, 0)) == f"{asked} (as asked for)"


def test_a_trained_network_is_a_classifier() -> None:
    assert str(purpose(traced(10, "normalize"), "classify", 10, 0)) == "classify (one score for each of 10 classes)"


@pytest.mark.parametrize(
    ("end", "asked", "classes", "targets", "message"),
    [
        ("", "classify", 3, 0, "task classify needs one score for each of 3 classes, but Model gives 5: leave --task"),
        ("", "classify", 0, 0, "needs classes, and the images have none"),
        ("several", "classify", 5, 0, "but Model gives boxes 5, map 3x2x2"),
        ("", "regress", 0, 2, "data.targets has 2 numbers for an image, but Model gives 5"),
        ("", "auto", 0, 2, "data.targets has 2 numbers for an image, but Model gives 5: leave it out"),
        ("softmax", "auto", 10, 0, "Model gives 5 by a softmax, and the images have 10 classes: not a classifier of"),
    ],
)
def test_what_does_not_go_together_is_refused(
    end: str, asked: TaskName, classes: int, targets: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        purpose(traced(5, end), asked, classes, targets)


def test_outputs_have_the_shape_of_one_images_value() -> None:
    assert traced(5, "several").output_shapes == ((5,), (3, 2, 2))
    assert trace(Model(5).eval()).output_shapes == ((),)
    assert torch.is_tensor(traced(5).module(torch.zeros(3, 1, 4, 4)))
