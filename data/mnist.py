"""MNIST and Fashion-MNIST from their four idx files: found or downloaded, and checked against what was published."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.errors import InputError
from data.idx import IdxFile, read_idx
from data.locate import default_folder, downloading, locate, move_into, not_found

logger = logging.getLogger(__name__)

SIZE = 28
DIMENSIONS: Mapping[str, int] = {"train-images": 3, "train-labels": 1, "t10k-images": 3, "t10k-labels": 1}
"""The four parts, and the dimensions of each."""
PUBLISHED_COUNTS: Mapping[str, int] = {"train": 60_000, "t10k": 10_000}


@dataclass(frozen=True)
class Collection:
    """A data set published in MNIST's four files.

    Attributes:
        name: As in the configuration.
        title: As people write it.
        variable: Environment variable that names its folder.
        subfolder: Where torchvision puts the files within its root.
        classes: Class names, in label order.
        sha256: Hex digest of each part, decompressed.
    """

    name: str
    title: str
    variable: str
    subfolder: str
    classes: tuple[str, ...]
    sha256: Mapping[str, str]


MNIST = Collection(
    name="mnist",
    title="MNIST",
    variable="MNIST_DIR",
    subfolder="MNIST/raw",
    classes=tuple("0123456789"),
    sha256={
        "train-images": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
)
FASHION_MNIST = Collection(
    name="fashion_mnist",
    title="Fashion-MNIST",
    variable="FASHION_MNIST_DIR",
    subfolder="FashionMNIST/raw",
    classes=(
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
    sha256={
        "train-images": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
)
COLLECTIONS = (MNIST, FASHION_MNIST)


@dataclass(frozen=True)
class Split:
    """uint8 ``pixels`` [N, 28, 28] and int64 ``labels`` [N]."""

    pixels: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Loaded:
    """A collection's two splits.

    Attributes:
        train: The training file, in its order.
        test: The test file, in its order.
        digests: SHA-256 of the four parts, in the order of ``DIMENSIONS``.
        notes: Empty for the published files.
    """

    train: Split
    test: Split
    digests: tuple[str, ...]
    notes: tuple[str, ...]


def find_or_download(collection: Collection, directory: Path | None, download: bool) -> Path:
    """The folder with the collection's files, downloaded with torchvision into the default folder if need be.

    Looked for in ``directory``, the collection's environment variable, for MNIST ``$TRT_DATADIR/mnist`` as in
    NVIDIA's samples, and the default folder.

    Raises:
        NotAvailableError: found nowhere, and not downloaded.
        InputError: a named folder lacks files, or what was downloaded is not what was published.
    """
    samples = os.environ.get("TRT_DATADIR")
    implicit = (Path(samples) / "mnist",) if samples and collection is MNIST else ()
    folder = locate(
        collection.name, directory, collection.variable, lambda place: _missing(place, collection), implicit
    )
    if folder is not None:
        return folder
    if not download:
        raise not_found(collection.title, collection.name, collection.variable)
    return _download(collection)


def _candidates(folder: Path, collection: Collection, part: str) -> list[Path]:
    kind = f"idx{DIMENSIONS[part]}-ubyte"
    return [
        place / f"{part}{separator}{kind}{suffix}"
        for place in (folder, folder / collection.subfolder)
        for separator in "-."
        for suffix in ("", ".gz")
    ]


def _find(folder: Path, collection: Collection, part: str) -> Path | None:
    return next((path for path in _candidates(folder, collection, part) if path.exists()), None)


def _missing(folder: Path, collection: Collection) -> list[str]:
    return [
        f"{part}-idx{dimensions}-ubyte[.gz]"
        for part, dimensions in DIMENSIONS.items()
        if _find(folder, collection, part) is None
    ]


def _download(collection: Collection) -> Path:
    from torchvision import datasets

    target = default_folder(collection.name)
    dataset = {MNIST.name: datasets.MNIST, FASHION_MNIST.name: datasets.FashionMNIST}[collection.name]
    with downloading(collection.title, target) as folder:
        dataset(str(folder), download=True)
        load(collection, folder)
        move_into(target, [path for part in DIMENSIONS if (path := _find(folder, collection, part))])
    return target


def load(collection: Collection, folder: Path) -> Loaded:
    """Read and check the four files in ``folder``.

    Raises:
        InputError: a file is missing, unreadable, corrupt, swapped with another, of another data set, or does not fit
            its partner; the message names it.
    """
    paths: dict[str, Path] = {}
    files: dict[str, IdxFile] = {}
    for part, dimensions in DIMENSIONS.items():
        path = _find(folder, collection, part)
        if path is None:
            raise InputError(f"{folder} lacks {part}-idx{dimensions}-ubyte[.gz] for {collection.title}")
        paths[part] = path
        files[part] = read_idx(path, dimensions)
        _check_identity(collection, part, path, files[part])
    splits = {name: _split(paths, files, name) for name in PUBLISHED_COUNTS}
    digests = tuple(file.sha256 for file in files.values())
    return Loaded(splits["train"], splits["t10k"], digests, _notes(collection, folder, digests, splits))


def _check_identity(collection: Collection, part: str, path: Path, file: IdxFile) -> None:
    """Whether a file is what its name says, as far as its digest and its size tell."""
    if file.sha256 == collection.sha256[part]:
        return
    for other in COLLECTIONS:
        for other_part, digest in other.sha256.items():
            if file.sha256 == digest and other is collection:
                raise InputError(f"{path} holds the content of {other_part}: are two files swapped?")
            if file.sha256 == digest:
                raise InputError(
                    f"{path} belongs to {other.title}, not to {collection.title}: set data.dataset to {other.name}"
                )
    if len(file.values) == PUBLISHED_COUNTS[part.partition("-")[0]]:
        raise InputError(
            f"{path} has the size of {collection.title}'s {part} but other content (SHA-256 {file.sha256[:16]}...): "
            "it is corrupt or of another data set; fetch it again"
        )


def _split(paths: Mapping[str, Path], files: Mapping[str, IdxFile], name: str) -> Split:
    pixels, labels = files[f"{name}-images"].values, files[f"{name}-labels"].values
    images_path, labels_path = paths[f"{name}-images"], paths[f"{name}-labels"]
    if tuple(pixels.shape[1:]) != (SIZE, SIZE):
        height, width = pixels.shape[1:]
        raise InputError(f"{images_path} holds images of {height} x {width} pixels, not {SIZE} x {SIZE}")
    if len(pixels) != len(labels):
        raise InputError(f"{images_path} holds {len(pixels):,} images but {labels_path} {len(labels):,} labels")
    if (highest := int(labels.max())) > 9:
        position = int(torch.nonzero(labels > 9)[0])
        raise InputError(f"{labels_path} holds the label {highest}, outside 0 to 9 (first at position {position})")
    return Split(pixels, labels.to(torch.int64))


def _notes(
    collection: Collection, folder: Path, digests: Sequence[str], splits: Mapping[str, Split]
) -> tuple[str, ...]:
    if tuple(digests) == tuple(collection.sha256[part] for part in DIMENSIONS):
        return ()
    counts = " + ".join(f"{len(split.labels):,}" for split in splits.values())
    return (f"the files in {folder} are not the published {collection.title}: they hold {counts} images",)
