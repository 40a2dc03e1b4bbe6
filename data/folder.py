"""A user's images in folders, one per class or without classes: decoded by threads ahead of their use."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.config import DataConfig
from common.errors import InputError
from common.images import in_eight_bits
from data.base import Preprocessing
from data.locate import expanded, is_folder
from data.targets import read_targets
from data.tensor import preprocess
from data.transform import Transform, open_transform

if TYPE_CHECKING:
    from PIL import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
GRAY_MEAN, GRAY_STD = (0.449,), (0.226,)
"""The mean of ImageNet's over the channels."""

MAX_RESIZED_PIXELS = 1 << 26
"""A long strip grows as its short side is resized; beyond this the image is refused rather than held in memory."""

_AHEAD = 2


class FolderImages:
    """Labelled image files, decoded when they are asked for.

    Args:
        paths: The files.
        labels: int64 [N], or targets, float32 [N, K].
        preprocessing: Shorter side to ``resize``, centre crop to the shape, then scale, mean and std, all as
            torchvision's reference transforms for classification do.
        workers: Threads that decode; 0 decodes in the caller. Pillow releases Python's lock while it decodes.
        device: Where the decoded pixels are preprocessed.
        transform: The user's own preprocessing, which takes the place of all this but for the number of channels.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Tensor,
        preprocessing: Preprocessing,
        workers: int,
        device: torch.device | None = None,
        transform: Transform | None = None,
    ) -> None:
        self.paths = paths
        self.preprocessing = preprocessing
        self.workers = workers
        self.device = device or torch.device("cpu")
        self.transform = transform
        self._labels = labels.to(self.device)

    @property
    def labels(self) -> Tensor:
        return self._labels

    def __len__(self) -> int:
        return len(self.paths)

    def images(self, index: slice | Tensor) -> Tensor:
        return next(self.stream([index]))

    def stream(self, indices: Iterable[slice | Tensor]) -> Iterator[Tensor]:
        """Batches in turn; the threads work up to two batches ahead. Raises InputError naming a broken image."""
        if self.workers == 0:
            for index in indices:
                yield self._batch([self._decode(path) for path in self._chosen(index)])
            return
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="decode")
        try:
            pending: deque[list[Future[Tensor]]] = deque()
            for index in indices:
                pending.append([pool.submit(self._decode, path) for path in self._chosen(index)])
                if len(pending) > _AHEAD:
                    yield self._batch([future.result() for future in pending.popleft()])
            while pending:
                yield self._batch([future.result() for future in pending.popleft()])
        finally:
            # Also when the consumer stops early: nothing is decoded for nobody.
            pool.shutdown(wait=False, cancel_futures=True)

    def to(self, device: torch.device) -> FolderImages:
        return FolderImages(self.paths, self._labels, self.preprocessing, self.workers, device, self.transform)

    def _chosen(self, index: slice | Tensor) -> Sequence[Path]:
        return self.paths[index] if isinstance(index, slice) else [self.paths[position] for position in index.tolist()]

    def _decode(self, path: Path) -> Tensor:
        if self.transform is None:
            return decode(path, self.preprocessing)
        values = transformed(path, self.transform)
        if tuple(values.shape) != self.preprocessing.shape:
            sizes = ["x".join(map(str, shape)) for shape in (values.shape, self.preprocessing.shape)]
            raise InputError(
                f"{path}: data.transform {self.transform.path} makes {sizes[0]} of it, and {sizes[1]} of the first "
                "image: let it bring all to one size"
            )
        return values

    def _batch(self, pixels: Sequence[Tensor]) -> Tensor:
        if self.transform is not None:
            return torch.stack(list(pixels)).to(self.device)
        # A quarter of the bytes goes to the device: uint8, not float32.
        return preprocess(torch.stack(list(pixels)).to(self.device), self.preprocessing)


def read_image(path: Path, channels: int) -> Image.Image:
    """An image file in colour (3 channels) or in gray (1); what is transparent in it is not.

    Raises:
        InputError: the file cannot be read or decoded.
    """
    from PIL import Image

    try:
        with Image.open(path) as stored:
            return in_eight_bits(stored).convert("L" if channels == 1 else "RGB")
    except InputError as error:
        raise InputError(f"{path} {error}") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on broken files.
        raise InputError(f"{path} is not a readable image ({type(error).__name__}): repair or remove it") from error


def transformed(path: Path, transform: Transform) -> Tensor:
    """What the user's transform makes of one image, float32 [C, H, W].

    Raises:
        InputError: the file cannot be read, or the transform fails.
    """
    try:
        return transform(read_image(path, transform.channels))
    except InputError as error:
        raise InputError(str(error) if str(path) in str(error) else f"{path}: {error}") from error


def decode(path: Path, preprocessing: Preprocessing) -> Tensor:
    """Read, resize and crop one image: uint8 [C, H, W].

    Raises:
        InputError: the file cannot be read or decoded, or is absurdly large.
    """
    from torchvision.transforms.v2 import functional

    image = read_image(path, preprocessing.channels)
    if preprocessing.resize is not None:
        ratio = preprocessing.resize / min(image.size)
        if image.width * image.height * ratio * ratio > MAX_RESIZED_PIXELS:
            raise InputError(f"{path} is too long a strip ({image.width} x {image.height}): crop or remove it")
        image = functional.resize(image, [preprocessing.resize])
    image = functional.center_crop(image, [preprocessing.height, preprocessing.width])
    pixels: Tensor = functional.pil_to_tensor(image)
    return pixels


@dataclass(frozen=True)
class Folders:
    """The sets under one folder.

    Attributes:
        train: From ``train/``.
        validation: From ``val/`` or ``validation/`` where there is a ``test/`` as well.
        test: From ``test/``, else from the validation folder.
        classes: Names of the class folders, in label order; empty where there are none.
        targets: Numbers that each image has instead; 0 for none.
        fingerprint: Hex digest of paths, sizes, and classes or targets.
        notes: What was used for what, where that is not plain.
    """

    train: FolderImages
    validation: FolderImages | None
    test: FolderImages
    classes: tuple[str, ...]
    targets: int
    fingerprint: str
    notes: tuple[str, ...]


def open_folders(config: DataConfig) -> Folders:
    """Find the images under ``config.dir``, in ``train/``, ``val/`` or ``validation/``, ``test/``.

    They lie in a folder for each class; without such folders, or with ``config.targets``, they have no classes.

    Raises:
        InputError: the folder is not named, a part is missing, empty, or has other classes than ``train/``, or targets
            or an own transform do not fit.
    """
    root = _root(config.dir)
    validation = next((root / name for name in ("val", "validation") if is_folder(root / name)), None)
    test = root / "test" if is_folder(root / "test") else None
    notes: tuple[str, ...] = ()
    if test is None:
        if validation is None:
            raise InputError(f"{root} has neither test/ nor val/ (or validation/): one is needed for the final figure")
        notes = (f"there is no test/: {validation.name}/ is the test set, and train/ gives the validation images",)
        test, validation = validation, None

    return _Listing(root, config, _has_classes(root / "train") and config.targets is None).folders(
        validation, test, notes
    )


def _root(directory: Path | None) -> Path:
    if directory is None:
        raise InputError("data.dataset imagefolder needs data.dir: the folder with train/ and test/ or val/")
    root = expanded(directory)
    if not is_folder(root / "train"):
        raise InputError(f"{root} has no folder train/ with one folder of images per class")
    return root


def _classes(part: Path) -> tuple[str, ...]:
    from torchvision.datasets.folder import find_classes

    try:
        return tuple(find_classes(part)[0])
    except FileNotFoundError as error:
        raise InputError(f"{part} holds no class folders") from error
    except OSError as error:
        raise InputError(f"cannot read {part}: {error.strerror or error}") from error


def _has_classes(part: Path) -> bool:
    try:
        return any(entry.is_dir() for entry in part.iterdir()) or not _image_files(part)
    except OSError as error:
        raise InputError(f"cannot read {part}: {error.strerror or error}") from error


def _image_files(part: Path) -> list[Path]:
    """All images under ``part``, in the order of their paths."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return sorted(path for path in part.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS and path.is_file())


class _Listing:
    """Lists the images of each part; their names, sizes and labels go into ``digest``.

    Args:
        root: The data's folder.
        config: How the images become inputs, and where targets are.
        by_class: Whether the images lie in one folder per class.
    """

    def __init__(self, root: Path, config: DataConfig, by_class: bool) -> None:
        self.root = root
        self.workers = config.workers
        self.classes = _classes(root / "train") if by_class else ()
        self.by_class = by_class
        self.targets = read_targets(expanded(config.targets)) if config.targets is not None else None
        self.transform = open_transform(config.transform, config.channels) if config.transform else None
        self.digest = hashlib.sha256("\0".join(self.classes).encode(errors="surrogateescape"))
        self.config = config

    def folders(self, validation: Path | None, test: Path, notes: tuple[str, ...]) -> Folders:
        """The sets in the folders of these parts."""
        listed = [(part, *self._listed(part)) for part in (self.root / "train", validation, test) if part is not None]
        self.preprocessing = self._preprocessing(listed[0][1][0])
        sets = {
            part: FolderImages(paths, labels, self.preprocessing, self.workers, transform=self.transform)
            for part, paths, labels in listed
        }
        return Folders(
            train=sets[self.root / "train"],
            validation=sets[validation] if validation else None,
            test=sets[test],
            classes=self.classes,
            targets=len(next(iter(self.targets.values()))) if self.targets else 0,
            fingerprint=self.digest.hexdigest(),
            notes=notes,
        )

    def _preprocessing(self, first: Path) -> Preprocessing:
        """How images become inputs; the shape that an own transform gives is that of the first image."""
        config, gray = self.config, self.config.channels == 1
        if self.transform is not None:
            channels, height, width = transformed(first, self.transform).shape
            return Preprocessing(
                channels, height, width, transform=self.transform.path, transform_digest=self.transform.digest
            )
        return Preprocessing(
            channels=config.channels,
            height=config.image_size,
            width=config.image_size,
            mean=GRAY_MEAN if gray else IMAGENET_MEAN,
            std=GRAY_STD if gray else IMAGENET_STD,
            resize=config.resize,
        )

    def _listed(self, part: Path) -> tuple[list[Path], Tensor]:
        """The images of one part, and their labels or targets."""
        labels: list[int] | list[tuple[float, ...]]
        try:
            if self.by_class:
                paths, labels = self._by_class(part)
            else:
                paths = _image_files(part)
                labels = [0] * len(paths) if self.targets is None else [self._target(path) for path in paths]
            for path, label in zip(paths, labels, strict=True):
                line = f"{part.name}/{path.relative_to(part)}\0{path.stat().st_size}\0{label}\n"
                self.digest.update(line.encode(errors="surrogateescape"))
        except OSError as error:
            raise InputError(f"cannot read {error.filename or part}: {error.strerror or error}") from error
        if not paths:
            raise InputError(f"{part} holds no images")
        return paths, torch.tensor(labels, dtype=torch.int64 if self.targets is None else torch.float32)

    def _by_class(self, part: Path) -> tuple[list[Path], list[int]]:
        """The images of a folder by class and the number of each one's class, in torchvision's order."""
        from torchvision.datasets import ImageFolder

        if (found := _classes(part)) != self.classes:
            different = sorted(set(found) ^ set(self.classes))
            raise InputError(f"{part} and train/ differ in their class folders: {', '.join(different[:5])}")
        try:
            samples = ImageFolder(str(part)).samples
        except FileNotFoundError as error:
            # The first sentence of torchvision's message names the empty class folders.
            raise InputError(f"{part}: {str(error).partition('. ')[0]}") from error
        return [Path(name) for name, _ in samples], [label for _, label in samples]

    def _target(self, path: Path) -> tuple[float, ...]:
        assert self.targets is not None  # the caller has them
        name = path.relative_to(self.root).as_posix()
        if name not in self.targets:
            raise InputError(f"{self.config.targets} has no line for {name}")
        return self.targets[name]
