"""The images that a network was trained on, and others."""

import dataclasses

import pytest

from common.config import DataConfig
from common.errors import InputError
from data import open_data
from models.checkpoint import CheckpointMeta
from models.reopen import reopen_data

CONFIG = DataConfig(dataset="digits", augment=False)


@pytest.fixture(scope="module")
def digits() -> CheckpointMeta:
    info = open_data(CONFIG, 1).info
    return CheckpointMeta("LeNet", "models.LeNet", {"num_classes": 10}, info, CONFIG, seed=1)


def test_the_same_images_are_opened_again(digits: CheckpointMeta) -> None:
    assert reopen_data(digits, CONFIG).info == digits.dataset


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": "0" * 64}, "is not what the network was trained on"),
        ({"classes": tuple("ABCDEFGHIJ")}, "have other classes"),
        ({"scale": 1 / 256}, "are prepared differently"),
        ({"mean": (0.1307,), "std": (0.3081,)}, "are prepared differently"),
        ({"height": 32, "width": 32}, "are prepared differently"),
    ],
)
def test_other_images_are_refused(digits: CheckpointMeta, change: dict[str, object], message: str) -> None:
    dataset = digits.dataset
    if not change.keys() & {"fingerprint", "classes"}:
        change = {"preprocessing": dataclasses.replace(dataset.preprocessing, **change)}  # type: ignore[arg-type]
    changed = dataclasses.replace(digits, dataset=dataclasses.replace(dataset, **change))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=message):
        reopen_data(changed, CONFIG)
