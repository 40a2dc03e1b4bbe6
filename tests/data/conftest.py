"""Small data sets in MNIST's format, made by the tests."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import pytest
import torch
from torch import Tensor


class WriteSet(Protocol):
    def __call__(
        self, folder: Path, *, train: int = 60, test: int = 20, separator: str = "-", suffix: str = "", size: int = 28
    ) -> Path: ...


def idx_bytes(values: Tensor) -> bytes:
    """A uint8 tensor as an idx file."""
    header = struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    return header + values.contiguous().numpy().tobytes()


@pytest.fixture(scope="session")
def as_idx() -> Callable[[Tensor], bytes]:
    return idx_bytes


@pytest.fixture(scope="session")
def write_set() -> WriteSet:
    """Write four idx files of random images with labels 0 to 9 in turn; the folder is made."""

    def write(
        folder: Path, *, train: int = 60, test: int = 20, separator: str = "-", suffix: str = "", size: int = 28
    ) -> Path:
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

    return write


@pytest.fixture
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No data set can be found or downloaded; the default folders lie under the returned cache folder."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    for variable in ("MNIST_DIR", "FASHION_MNIST_DIR", "CIFAR10_DIR", "TRT_DATADIR"):
        monkeypatch.delenv(variable, raising=False)
    return cache
