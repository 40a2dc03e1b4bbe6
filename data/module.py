"""The data of a run as a LightningDataModule, and how it is opened from the configuration."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from common.config import DataConfig
from common.errors import InputError
from data import digits, mnist
from data.augment import Affine
from data.base import DatasetInfo, ImageSet, Preprocessing
from data.loaders import EvaluationLoader, TrainLoader
from data.locate import NotAvailableError
from data.tensor import Selection, TensorImages

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


def open_data(config: DataConfig, seed: int) -> ImageData:
    """Open the data set that ``config`` names, downloading it if need be and allowed.

    ``auto`` is MNIST, or scikit-learn's digits (with notes that say so) where MNIST is nowhere to be had.

    Raises:
        InputError: a file is missing, corrupt or does not fit, or the data set cannot be had.
    """
    return _OPENERS[config.dataset](config, seed)


def _open_auto(config: DataConfig, seed: int) -> ImageData:
    try:
        return _open_collection(mnist.MNIST, config, seed)
    except NotAvailableError as error:
        reason = str(error)
    logger.warning("%s; going on with scikit-learn's digits", reason)
    return _open_digits(config, seed, notes=(f"the digits stand in for MNIST: {reason}",))


def _open_mnist(config: DataConfig, seed: int) -> ImageData:
    return _open_collection(mnist.MNIST, config, seed)


def _open_fashion_mnist(config: DataConfig, seed: int) -> ImageData:
    return _open_collection(mnist.FASHION_MNIST, config, seed)


def _open_collection(collection: mnist.Collection, config: DataConfig, seed: int) -> ImageData:
    folder = mnist.find_or_download(collection, config.dir, config.download)
    logger.info("reading %s from %s", collection.title, folder)
    loaded = mnist.load(collection, folder)
    fingerprint = hashlib.sha256("".join(loaded.digests).encode()).hexdigest()
    return _in_memory(
        collection.name,
        collection.title,
        collection.classes,
        Preprocessing(channels=1, height=mnist.SIZE, width=mnist.SIZE),
        (loaded.train, loaded.test),
        config,
        seed,
        fingerprint=fingerprint,
        notes=loaded.notes,
    )


def _open_digits(config: DataConfig, seed: int, notes: tuple[str, ...] = ()) -> ImageData:
    splits = digits.load()
    return _in_memory(
        "digits",
        "scikit-learn's digits",
        digits.CLASSES,
        Preprocessing(channels=1, height=mnist.SIZE, width=mnist.SIZE),
        splits,
        config,
        seed,
        fingerprint=_fingerprint(splits),
        notes=(digits.NOTE, *notes),
    )


def _in_memory(
    name: str,
    title: str,
    classes: tuple[str, ...],
    preprocessing: Preprocessing,
    splits: tuple[mnist.Split, mnist.Split],
    config: DataConfig,
    seed: int,
    *,
    fingerprint: str,
    notes: tuple[str, ...],
) -> ImageData:
    train, test = splits
    counts = f"{len(train.labels):,} + {len(test.labels):,}"
    info = DatasetInfo(name, f"{title} ({counts})", classes, preprocessing, fingerprint, notes)
    return ImageData(
        info,
        TensorImages(train.pixels, train.labels, preprocessing),
        TensorImages(test.pixels, test.labels, preprocessing),
        batch_size=config.batch_size,
        validation=config.validation,
        augment=Affine() if config.augment else None,
        seed=seed,
    )


def _fingerprint(splits: tuple[mnist.Split, ...]) -> str:
    digest = hashlib.sha256()
    for split in splits:
        digest.update(split.pixels.numpy().tobytes())
        digest.update(split.labels.numpy().tobytes())
    return digest.hexdigest()


_OPENERS: Mapping[str, Callable[[DataConfig, int], ImageData]] = {
    "auto": _open_auto,
    "mnist": _open_mnist,
    "digits": _open_digits,
    "fashion_mnist": _open_fashion_mnist,
}
