"""The data of a run as a LightningDataModule."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from common.errors import InputError
from data.augment import Affine
from data.base import DatasetInfo, ImageSet
from data.loaders import EvaluationLoader, TrainLoader
from data.tensor import Selection

logger = logging.getLogger(__name__)

LARGEST_VALIDATION_SHARE = 6
"""At most one in so many training images is held out, whatever ``data.validation`` says."""
_EVALUATION_FACTOR = 4
"""Evaluation keeps no activations for gradients, so that larger batches fit."""


class ImageData(LightningDataModule):
    """Training, validation and test images of one data set.

    Args:
        info: What a run records about it.
        train_file: All training images, in the order of their file.
        test: For the final figure alone.
        batch_size: Images per training batch and process.
        validation: Number of images to hold out of ``train_file`` (stratified, seeded), or a set of its own.
        augment: Ranges of the random transform of training batches; None for none.
        seed: Of the hold-out, the order of the batches and the augmentation.

    Attributes:
        train: ``train_file`` without the held-out images, in the same order.
        train_index: int64, positions of ``train`` in ``train_file``, ascending.
        validation: The held-out images, to choose by.
    """

    def __init__(
        self,
        info: DatasetInfo,
        train_file: ImageSet,
        test: ImageSet,
        *,
        batch_size: int,
        validation: int | ImageSet,
        augment: Affine | None,
        seed: int,
    ) -> None:
        super().__init__()
        self.info = info
        self.batch_size = batch_size
        self.augment = augment
        self.seed = seed
        self.train_file = train_file
        self.test = test
        if isinstance(validation, int):
            self.train_index, held_out = hold_out(train_file.labels, validation, seed)
            self.train: ImageSet = Selection(train_file, self.train_index)
            self.validation: ImageSet = Selection(train_file, held_out)
        else:
            self.train_index = torch.arange(len(train_file))
            self.train, self.validation = train_file, validation
        self._device = torch.device("cpu")
        self._placed: Mapping[str, ImageSet] = {"train": self.train, "validation": self.validation, "test": test}

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


def hold_out(labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Split positions into (kept, held out), each ascending, every class held out in its share of ``labels``.

    Args:
        labels: int64 [N].
        count: How many to hold out; at most N / ``LARGEST_VALIDATION_SHARE`` are.
        seed: Of the choice.

    Raises:
        InputError: there are too few images to hold any out.
    """
    largest = len(labels) // LARGEST_VALIDATION_SHARE
    if largest < 1:
        raise InputError(f"{len(labels)} training images are too few to hold some out for validation")
    if count > largest:
        logger.warning(
            "%s images are held out for validation, not %s: at most one in %s of the %s training images",
            f"{largest:,}",
            f"{count:,}",
            LARGEST_VALIDATION_SHARE,
            f"{len(labels):,}",
        )
        count = largest
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    # Shuffled, then sorted by class (stable): the first of each class's run are held out.
    order = order[torch.argsort(labels[order], stable=True)]
    sizes = torch.bincount(labels)
    quotas = _shares(sizes, count)
    starts = torch.cumsum(sizes, 0) - sizes
    rank = torch.arange(len(labels)) - starts.repeat_interleave(sizes)
    held = rank < quotas.repeat_interleave(sizes)
    return order[~held].sort().values, order[held].sort().values


def _shares(sizes: Tensor, count: int) -> Tensor:
    """``count`` divided in proportion to ``sizes``, by largest remainder: int64, summing to ``count``."""
    exact = sizes * count
    quotas: Tensor = exact // sizes.sum()
    left = count - int(quotas.sum())
    quotas[torch.argsort(exact % sizes.sum(), descending=True, stable=True)[:left]] += 1
    return quotas
