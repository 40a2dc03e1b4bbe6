"""The data of a run as a LightningDataModule."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lightning.pytorch import LightningDataModule

from data.augment import Affine
from data.base import ImageSet
from data.loaders import EvaluationLoader, TrainLoader
from data.splits import Splits
from data.tensor import Selection

_EVALUATION_FACTOR = 4
"""Evaluation keeps no activations for gradients, so that larger batches fit."""


class ImageData(LightningDataModule):
    """The loaders of one data set's images; its parts are attributes, as :class:`data.splits.Splits` has them.

    Args:
        splits: The images.
        batch_size: Images per training batch and process.
        augment: Ranges of the random transform of training batches; None for none.
        seed: Decides the order of the batches and the augmentation.
    """

    def __init__(self, splits: Splits, *, batch_size: int, augment: Affine | None, seed: int) -> None:
        super().__init__()
        self.info = splits.info
        self.train_file = splits.train_file
        self.train = splits.train
        self.train_index = splits.train_index
        self.validation = splits.validation
        self.test = splits.test
        self.batch_size = batch_size
        self.augment = augment
        self.seed = seed
        self._device = torch.device("cpu")
        self._placed: Mapping[str, ImageSet] = {"train": self.train, "validation": self.validation, "test": self.test}

    def train_dataloader(self) -> TrainLoader:
        rank, processes = self._rank()
        return TrainLoader(self._on_device("train"), self.batch_size, self.seed, self.augment, rank, processes)

    def val_dataloader(self) -> EvaluationLoader:
        return self._evaluation_loader("validation")

    def test_dataloader(self) -> EvaluationLoader:
        return self._evaluation_loader("test")

    def _evaluation_loader(self, name: str) -> EvaluationLoader:
        return EvaluationLoader(self._on_device(name), self.batch_size * _EVALUATION_FACTOR, *self._rank())

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _on_device(self, name: str) -> ImageSet:
        """A split on the device that Lightning runs on: a data set in memory is copied there once."""
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        if device != self._device:
            memo: dict[int, ImageSet] = {}
            sets = {"train": self.train, "validation": self.validation, "test": self.test}
            self._placed = {key: _moved(images, device, memo) for key, images in sets.items()}
            self._device = device
        return self._placed[name]


def _moved(images: ImageSet, device: torch.device, memo: dict[int, ImageSet]) -> ImageSet:
    """``images`` on ``device``; what two selections share is copied once."""
    if isinstance(images, Selection):
        return Selection(_moved(images.source, device, memo), images.index.to(device))
    if id(images) not in memo:
        memo[id(images)] = images.to(device)
    return memo[id(images)]
