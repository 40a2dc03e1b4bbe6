"""Images held as one uint8 tensor, preprocessed batch by batch; and a selection of another set's images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from data.base import ImageSet, Preprocessing


def preprocess(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """uint8 [B, C, H, W] to the network's float32 input: ``(pixels * scale - mean) / std``, on the pixels' device."""
    images = pixels.to(torch.float32).mul_(preprocessing.scale)
    if preprocessing.mean:
        images.sub_(_per_channel(preprocessing.mean, images))
    if preprocessing.std:
        images.div_(_per_channel(preprocessing.std, images))
    return images


def _per_channel(values: tuple[float, ...], images: Tensor) -> Tensor:
    return torch.tensor(values, dtype=images.dtype, device=images.device).view(1, -1, 1, 1)


class TensorImages:
    """Labelled images in one tensor: a batch is a slice or one gather, then one multiplication.

    Args:
        pixels: uint8 [N, C, H, W], or [N, H, W] for one channel.
        labels: Integers [N].
        preprocessing: What makes the network's input of ``pixels``, whose shape it has.

    Raises:
        ValueError: types or shapes do not fit.
    """

    def __init__(self, pixels: Tensor, labels: Tensor, preprocessing: Preprocessing) -> None:
        if pixels.ndim == 3:
            pixels = pixels.unsqueeze(1)
        if pixels.dtype != torch.uint8 or tuple(pixels.shape[1:]) != preprocessing.shape:
            raise ValueError(f"pixels must be uint8 [N, {preprocessing.shape}], not {pixels.dtype} {[*pixels.shape]}")
        if labels.shape != pixels.shape[:1]:
            raise ValueError(f"{len(pixels)} images need as many labels, not {[*labels.shape]}")
        self.pixels = pixels.contiguous()
        self.preprocessing = preprocessing
        self._labels = labels.to(torch.int64)

    @property
    def labels(self) -> Tensor:
        return self._labels

    def __len__(self) -> int:
        return len(self._labels)

    def images(self, index: slice | Tensor) -> Tensor:
        pixels = self.pixels[index] if isinstance(index, slice) else self.pixels.index_select(0, index)
        return preprocess(pixels, self.preprocessing)

    def stream(self, indices: Iterable[slice | Tensor]) -> Iterator[Tensor]:
        return map(self.images, indices)

    def to(self, device: torch.device) -> TensorImages:
        return TensorImages(self.pixels.to(device), self._labels.to(device), self.preprocessing)


class Selection:
    """Some images of another set, in the order of ``index`` (int64 positions [N])."""

    def __init__(self, source: ImageSet, index: Tensor) -> None:
        self.source = source
        self.index = index
        self._labels = source.labels[index]

    @property
    def preprocessing(self) -> Preprocessing:
        return self.source.preprocessing

    @property
    def labels(self) -> Tensor:
        return self._labels

    def __len__(self) -> int:
        return len(self.index)

    def images(self, index: slice | Tensor) -> Tensor:
        return self.source.images(self.index[index])

    def stream(self, indices: Iterable[slice | Tensor]) -> Iterator[Tensor]:
        return self.source.stream(self.index[index] for index in indices)

    def to(self, device: torch.device) -> Selection:
        return Selection(self.source.to(device), self.index.to(device))
