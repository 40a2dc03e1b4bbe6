"""A made-up data set that a small network learns in a second, and checkpoints of it."""

import pytest
import torch

from common.config import DataConfig
from data import DatasetInfo, ImageData, Preprocessing, TensorImages
from data.splits import divide
from models.checkpoint import CheckpointMeta

SHAPE = (1, 8, 8)


@pytest.fixture
def info() -> DatasetInfo:
    return DatasetInfo("mnist", "made up (240 + 60)", ("a", "b", "c"), Preprocessing(*SHAPE), "f" * 64)


@pytest.fixture
def meta(info) -> CheckpointMeta:
    return CheckpointMeta(
        network="LeNet",
        class_path="models.LeNet",
        init_args={"num_classes": 10},
        dataset=info,
        data=DataConfig(dataset="mnist"),
        seed=3,
        epochs=2,
        metrics={"test_top1": 0.5},
        versions={"torch": "2.8.0"},
    )


@pytest.fixture
def blobs(info):
    """Makes data whose classes are bright at different places: 240 training images, 40 of them held out, 60 tests."""

    def make(seed: int = 1, batch_size: int = 16) -> ImageData:
        generator = torch.Generator().manual_seed(0)
        sets = []
        for count in (240, 60):
            labels = torch.arange(count) % 3
            pixels = torch.randint(0, 120, (count, *SHAPE), generator=generator)
            for label in range(3):
                pixels[labels == label, :, 2 * label : 2 * label + 2] += 100
            sets.append(TensorImages(pixels.to(torch.uint8), labels, info.preprocessing))
        splits = divide(info, *sets, validation=40, seed=seed)
        return ImageData(splits, batch_size=batch_size, augment=None, seed=seed)

    return make
