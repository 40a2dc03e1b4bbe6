"""What every data set looks like to the rest of the project."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Preprocessing:
    """How stored pixels become the network's input; recorded in the checkpoint and in the calibration side file.

    Attributes:
        channels: 1 or 3; any number that an own transform makes.
        height: Pixels of the network's input.
        width: Pixels of the network's input.
        scale: Factor on the stored uint8 pixels (1/255 gives [0, 1]), applied before ``mean`` and ``std``.
        mean: Per channel, subtracted after scaling; empty for none.
        std: Per channel, divides after subtracting; empty for none.
        resize: Length of the shorter side before the centre crop; None where images are taken as they are.
        transform: The user's own, which takes the place of all the above but the shape; None for none.
        transform_digest: Of its source or its parameters, where they can be had.
    """

    channels: int
    height: int
    width: int
    scale: float = 1 / 255
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    resize: int | None = None
    transform: str | None = None
    transform_digest: str | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one input."""
        return self.channels, self.height, self.width


@dataclass(frozen=True)
class DatasetInfo:
    """What a run records about its data.

    Attributes:
        name: ``mnist``, ``digits``, ...
        title: For people, such as ``MNIST (60,000 + 10,000)``.
        classes: Class names, in label order; none where the images have no classes.
        preprocessing: What makes the network's input of an image file.
        fingerprint: Hex digest of the images and labels (or of the list of files), equal when the data is.
        targets: Numbers that each image has instead of a class, for regression; 0 for none.
        notes: What a reader must know, such as that the digits stand in for MNIST; shown on the terminal, in the
            artifacts and in the report.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    fingerprint: str
    notes: tuple[str, ...] = field(default=())
    targets: int = 0


class ImageSet(Protocol):
    """Labelled images, indexable in batches."""

    @property
    def preprocessing(self) -> Preprocessing: ...

    @property
    def labels(self) -> Tensor:
        """Classes, int64 [N] (0 where there are none), or targets of regression, float32 [N, K]."""
        ...

    def __len__(self) -> int: ...

    def images(self, index: slice | Tensor) -> Tensor:
        """The images at ``index`` (a slice, or int64 positions), preprocessed: float32 [B, C, H, W]."""
        ...

    def stream(self, indices: Iterable[slice | Tensor]) -> Iterator[Tensor]:
        """``images`` of each index in turn; a set that decodes files works ahead of its consumer."""
        ...

    def to(self, device: torch.device) -> ImageSet:
        """The same images, preprocessed on ``device`` and held there where they are held in memory."""
        ...


def batches(
    source: ImageSet, batch_size: int, start: int = 0, count: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Consecutive batches in order: (float32 images [B, C, H, W], int64 labels [B]).

    Args:
        source: The images.
        batch_size: Images per batch; the last one may be smaller.
        start: Batches to skip at the beginning.
        count: Batches to give; all that are left if None.
    """
    first = start * batch_size
    last = len(source) if count is None else min(len(source), first + count * batch_size)
    indices = [slice(begin, min(begin + batch_size, last)) for begin in range(first, last, batch_size)]
    for index, images in zip(indices, source.stream(indices), strict=True):
        yield images, source.labels[index]
