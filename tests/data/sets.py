"""Small data sets, made by the tests: in MNIST's format, and folders of images."""

import gzip
import struct
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor


def idx_bytes(values: Tensor) -> bytes:
    """A uint8 tensor as an idx file."""
    header = struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    return header + values.contiguous().numpy().tobytes()


def write_set(
    folder: Path, *, train: int = 60, test: int = 20, separator: str = "-", suffix: str = "", size: int = 28
) -> Path:
    """Write four idx files of random images with labels 0 to 9 in turn; the folder is made."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for name, count in (("train", train), ("t10k", test)):
        pixels = torch.randint(0, 256, (count, size, size), dtype=torch.uint8, generator=generator)
        labels = (torch.arange(count) % 10).to(torch.uint8)
        for kind, values in (("images", pixels), ("labels", labels)):
            content = idx_bytes(values)
            path = folder / f"{name}-{kind}{separator}idx{values.ndim}-ubyte{suffix}"
            path.write_bytes(gzip.compress(content) if suffix else content)
    return folder


def write_image(path: Path, size: tuple[int, int] = (40, 36), seed: int = 0, mode: str = "RGB") -> Path:
    """Random pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256, (size[1], size[0], 3), dtype=torch.uint8, generator=generator)
    Image.fromarray(values.numpy()).convert(mode).save(path)
    return path


def write_part(root: Path, part: str, count: int, classes: tuple[str, ...] = ("cat", "dog")) -> None:
    """A folder of images ``PART/CLASS/NUMBER.png`` of several sizes."""
    for label, name in enumerate(classes):
        for number in range(count):
            write_image(root / part / name / f"{number}.png", (40 + number % 3, 36), seed=100 * label + number)
