"""A user's images in folders, one per class: decoded by threads ahead of their use."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.config import DataConfig
from common.errors import InputError
from common.images import in_eight_bits
from data.base import Preprocessing
from data.locate import expanded, is_folder
from data.tensor import preprocess

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

MAX_RESIZED_PIXELS = 1 << 26
"""A long strip grows as its short side is resized; beyond this the image is refused rather than held in memory."""

_AHEAD = 2


class FolderImages:
    """Labelled image files, decoded when they are asked for.

    Args:
        paths: The files.
        labels: int64 [N].
        preprocessing: Shorter side to ``resize``, centre crop to the shape, then scale, mean and std, all as
            torchvision's reference transforms for classification do.
        workers: Threads that decode; 0 decodes in the caller. Pillow releases Python's lock while it decodes.
        device: Where the decoded pixels are preprocessed.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Tensor,
        preprocessing: Preprocessing,
        workers: int,
        device: torch.device | None = None,
    ) -> None:
        self.paths = paths
        self.preprocessing = preprocessing
        self.workers = workers
        self.device = device or torch.device("cpu")
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
                yield self._batch([decode(path, self.preprocessing) for path in self._chosen(index)])
            return
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="decode")
        try:
            pending: deque[list[Future[Tensor]]] = deque()
            for index in indices:
                pending.append([pool.submit(decode, path, self.preprocessing) for path in self._chosen(index)])
                if len(pending) > _AHEAD:
                    yield self._batch([future.result() for future in pending.popleft()])
            while pending:
                yield self._batch([future.result() for future in pending.popleft()])
        finally:
            # Also when the consumer stops early: nothing is decoded for nobody.
            pool.shutdown(wait=False, cancel_futures=True)

    def to(self, device: torch.device) -> FolderImages:
        return FolderImages(self.paths, self._labels, self.preprocessing, self.workers, device)

    def _chosen(self, index: slice | Tensor) -> Sequence[Path]:
        return self.paths[index] if isinstance(index, slice) else [self.paths[position] for position in index.tolist()]

    def _batch(self, pixels: Sequence[Tensor]) -> Tensor:
        # A quarter of the bytes goes to the device: uint8, not float32.
        return preprocess(torch.stack(list(pixels)).to(self.device), self.preprocessing)


def decode(path: Path, preprocessing: Preprocessing) -> Tensor:
    """Read, resize and crop one image: uint8 [3, H, W].

    Raises:
        InputError: the file cannot be read or decoded, or is absurdly large.
    """
    from PIL import Image
    from torchvision.transforms.v2 import functional

    try:
        with Image.open(path) as stored:
            image = in_eight_bits(stored).convert("RGB")
    except InputError as error:
        raise InputError(f"{path} {error}") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on broken files.
        raise InputError(f"{path} is not a readable image ({type(error).__name__}): repair or remove it") from error
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
        classes: Names of the class folders, in label order.
        fingerprint: Hex digest of paths, sizes and classes.
        notes: What was used for what, where that is not plain.
    """

    train: FolderImages
    validation: FolderImages | None
    test: FolderImages
    classes: tuple[str, ...]
    fingerprint: str
    notes: tuple[str, ...]


def open_folders(config: DataConfig) -> Folders:
    """Find the images under ``config.dir``, in ``train/``, ``val/`` or ``validation/``, ``test/``, by class folder.

    Raises:
        InputError: the folder is not named, or a part is missing, empty, or has other classes than ``train/``.
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

    preprocessing = Preprocessing(
        channels=3,
        height=config.image_size,
        width=config.image_size,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        resize=config.resize,
    )
    classes = _classes(root / "train")
    listing = _Listing(classes, preprocessing, config.workers)
    return Folders(
        train=listing.scan(root / "train"),
        validation=listing.scan(validation) if validation else None,
        test=listing.scan(test),
        classes=classes,
        fingerprint=listing.digest.hexdigest(),
        notes=notes,
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


class _Listing:
    """Lists the images of each part; their names, sizes and labels go into ``digest``."""

    def __init__(self, classes: tuple[str, ...], preprocessing: Preprocessing, workers: int) -> None:
        self.classes = classes
        self.preprocessing = preprocessing
        self.workers = workers
        self.digest = hashlib.sha256("\0".join(classes).encode(errors="surrogateescape"))

    def scan(self, part: Path) -> FolderImages:
        """The images of one part, in torchvision's order."""
        from torchvision.datasets import ImageFolder

        if (found := _classes(part)) != self.classes:
            different = sorted(set(found) ^ set(self.classes))
            raise InputError(f"{part} and train/ differ in their class folders: {', '.join(different[:5])}")
        try:
            samples = [(Path(name), label) for name, label in ImageFolder(str(part)).samples]
            for path, label in samples:
                line = f"{part.name}/{path.relative_to(part)}\0{path.stat().st_size}\0{label}\n"
                self.digest.update(line.encode(errors="surrogateescape"))
        except FileNotFoundError as error:
            # The first sentence of torchvision's message names the empty class folders.
            raise InputError(f"{part}: {str(error).partition('. ')[0]}") from error
        except OSError as error:
            raise InputError(f"cannot read {part}: {error.strerror or error}") from error
        labels = torch.tensor([label for _, label in samples], dtype=torch.int64)
        return FolderImages([path for path, _ in samples], labels, self.preprocessing, self.workers)
