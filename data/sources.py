"""Opening a data set by its name in the configuration."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from common.config import DataConfig, DatasetName
from data import cifar, digits, folder, mnist
from data.augment import Affine
from data.base import DatasetInfo, Preprocessing
from data.locate import NotAvailableError
from data.splits import LARGEST_VALIDATION_SHARE, Splits, divide
from data.tensor import TensorImages

if TYPE_CHECKING:
    from data.module import ImageData

logger = logging.getLogger(__name__)


def open_splits(config: DataConfig, seed: int) -> Splits:
    """Open the data set that ``config`` names, downloading it if need be and allowed; Lightning is not imported.

    ``auto`` is MNIST, or scikit-learn's digits (with notes that say so) where MNIST is nowhere to be had.

    Raises:
        InputError: a file is missing, corrupt or does not fit, or the data set cannot be had.
    """
    return _OPENERS[config.dataset](config, seed)


def open_data(config: DataConfig, seed: int) -> ImageData:
    """:func:`open_splits`, with the loaders that training needs."""
    from data.module import ImageData

    splits = open_splits(config, seed)
    augment = Affine() if config.augment else None
    return ImageData(splits, batch_size=config.batch_size, augment=augment, seed=seed)


def _open_auto(config: DataConfig, seed: int) -> Splits:
    try:
        return _open_collection(mnist.MNIST, config, seed)
    except NotAvailableError as error:
        reason = str(error)
    logger.warning("%s; going on with scikit-learn's digits", reason)
    return _open_digits(config, seed, notes=(f"the digits stand in for MNIST: {reason}",))


def _open_mnist(config: DataConfig, seed: int) -> Splits:
    return _open_collection(mnist.MNIST, config, seed)


def _open_fashion_mnist(config: DataConfig, seed: int) -> Splits:
    return _open_collection(mnist.FASHION_MNIST, config, seed)


def _open_collection(collection: mnist.Collection, config: DataConfig, seed: int) -> Splits:
    place = mnist.find_or_download(collection, config.dir, config.download)
    logger.info("reading %s from %s", collection.title, place)
    loaded = mnist.load(collection, place)
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


def _open_digits(config: DataConfig, seed: int, notes: tuple[str, ...] = ()) -> Splits:
    splits = digits.load()
    config = replace(config, validation=_held_out(config, len(splits[0].labels)))
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


def _open_cifar10(config: DataConfig, seed: int) -> Splits:
    root = cifar.find_or_download(config.dir, config.download)
    logger.info("reading %s from %s", cifar.TITLE, root)
    train, test, fingerprint = cifar.load(root)
    return _in_memory(
        cifar.NAME,
        cifar.TITLE,
        cifar.CLASSES,
        cifar.PREPROCESSING,
        (train, test),
        config,
        seed,
        fingerprint=fingerprint,
        notes=(),
    )


def _open_folder(config: DataConfig, seed: int) -> Splits:
    folders = folder.open_folders(config)
    what = f"{len(folders.classes):,} classes" if folders.classes else "no classes"
    counts = f"{len(folders.train):,} + {len(folders.test):,} images, {what}"
    info = DatasetInfo(
        name="imagefolder",
        title=f"image folder ({counts})",
        classes=folders.classes,
        preprocessing=folders.train.preprocessing,
        fingerprint=folders.fingerprint,
        notes=folders.notes,
        targets=folders.targets,
    )
    validation = _held_out(config, len(folders.train)) if folders.validation is None else folders.validation
    return divide(info, folders.train, folders.test, validation, seed)


def _held_out(config: DataConfig, images: int) -> int:
    """Images to hold out for validation: the default is meant for larger sets, and no cause for a warning in small."""
    asked = config.validation
    return min(asked, images // LARGEST_VALIDATION_SHARE) if asked == DataConfig.validation else asked


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
) -> Splits:
    train, test = splits
    counts = f"{len(train.labels):,} + {len(test.labels):,}"
    info = DatasetInfo(name, f"{title} ({counts})", classes, preprocessing, fingerprint, notes)
    return divide(
        info,
        TensorImages(train.pixels, train.labels, preprocessing),
        TensorImages(test.pixels, test.labels, preprocessing),
        config.validation,
        seed,
    )


def _fingerprint(splits: tuple[mnist.Split, ...]) -> str:
    digest = hashlib.sha256()
    for split in splits:
        digest.update(split.pixels.numpy().tobytes())
        digest.update(split.labels.numpy().tobytes())
    return digest.hexdigest()


_OPENERS: Mapping[DatasetName, Callable[[DataConfig, int], Splits]] = {
    "auto": _open_auto,
    "mnist": _open_mnist,
    "digits": _open_digits,
    "fashion_mnist": _open_fashion_mnist,
    "cifar10": _open_cifar10,
    "imagefolder": _open_folder,
}
