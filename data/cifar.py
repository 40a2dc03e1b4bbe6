"""CIFAR-10 through torchvision: found or downloaded, checked file by file, held in memory."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from common.errors import InputError
from data.base import Preprocessing
from data.locate import default_folder, downloading, locate, move_into, not_found
from data.mnist import Split

NAME = "cifar10"
TITLE = "CIFAR-10"
VARIABLE = "CIFAR10_DIR"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PREPROCESSING = Preprocessing(
    channels=3,
    height=32,
    width=32,
    # Of the training images, the customary figures.
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)
_SUBFOLDER = "cifar-10-batches-py"


def find_or_download(directory: Path | None, download: bool) -> Path:
    """The folder that holds ``cifar-10-batches-py``, downloaded with torchvision into the default folder if need be.

    Looked for in ``directory`` (that folder itself may be named as well), ``$CIFAR10_DIR`` and the default folder.

    Raises:
        NotAvailableError: found nowhere, and not downloaded.
        InputError: a named folder lacks files, or one is corrupt.
    """
    folder = locate(NAME, directory, VARIABLE, _missing)
    if folder is not None:
        return _root(folder)
    if not download:
        raise not_found(TITLE, NAME, VARIABLE)
    target = default_folder(NAME)
    with downloading(TITLE, target) as temporary:
        _torchvision()(str(temporary), download=True)
        move_into(target / _SUBFOLDER, [temporary / _SUBFOLDER / name for name in _digests()])
    return target


def load(root: Path) -> tuple[Split, Split, str]:
    """Training split, test split (uint8 [N, 3, 32, 32]) and fingerprint.

    The files are Python pickles. Each must have its published MD5 before it is opened, so that no other pickle ever
    is.

    Raises:
        InputError: a file is missing or not the published one.
    """
    for name, expected in _digests().items():
        path = root / _SUBFOLDER / name
        try:
            digest = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}") from error
        if digest != expected:
            raise InputError(f"{path} is not the published file (MD5 {digest}, not {expected}): fetch it again")
    train, test = (_split(_torchvision()(str(root), train=part)) for part in (True, False))
    return train, test, hashlib.sha256("".join(_digests().values()).encode()).hexdigest()


def _split(stored: Any) -> Split:
    pixels = torch.from_numpy(stored.data).permute(0, 3, 1, 2).contiguous()
    return Split(pixels, torch.tensor(stored.targets, dtype=torch.int64))


def _torchvision() -> Any:
    from torchvision.datasets import CIFAR10

    return CIFAR10


def _digests() -> dict[str, str]:
    """The published files and their MD5, as torchvision lists them."""
    dataset = _torchvision()
    return {**dict([*dataset.train_list, *dataset.test_list]), dataset.meta["filename"]: dataset.meta["md5"]}


def _root(folder: Path) -> Path:
    return folder.parent if folder.name == _SUBFOLDER else folder


def _missing(folder: Path) -> list[str]:
    return [f"{_SUBFOLDER}/{name}" for name in _digests() if not (_root(folder) / _SUBFOLDER / name).is_file()]
