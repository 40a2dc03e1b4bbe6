"""The representative subset: which images calibration sees, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from common.config import CalibrationConfig
from common.errors import InputError
from data.base import ImageSet
from data.splits import Splits

Strategy = Literal["stratified", "first", "random"]

MANY_CLASSES = 500
"""Above this many classes a subset may lack some: TensorRT's guide holds about 500 images enough for ImageNet."""


@dataclass(frozen=True)
class Subset:
    """Images for calibration, in order; every batch is full and no image comes twice.

    Attributes:
        positions: int64 [batches * batch_size], positions in the labels that it was drawn from.
        batch_size: Images per batch.
    """

    positions: Tensor
    batch_size: int

    @property
    def batches(self) -> tuple[Tensor, ...]:
        """The positions of each batch, int64 [batch_size]."""
        return tuple(torch.split(self.positions, self.batch_size))


def select(
    labels: Tensor,
    num_classes: int,
    strategy: Strategy = "stratified",
    batches: int = 10,
    batch_size: int = 50,
    skip: int = 0,
    seed: int = 1,
) -> Subset:
    """Choose the representative subset.

    Args:
        labels: int64 [N], the classes of the images to choose from.
        num_classes: Classes of the data set.
        strategy: ``stratified`` draws from each class in proportion to its frequency, at least one image of each;
            ``random`` draws uniformly; ``first`` takes the images in order, after ``skip`` batches (NVIDIA's
            sampleINT8 skips one: ``first`` with 10 batches of 50 and ``skip=1`` is images 50 to 549).
        batches: Number of batches.
        batch_size: Images per batch.
        skip: Batches to skip (``first`` alone).
        seed: Decides which images are drawn, and their order.

    Raises:
        InputError: there are fewer images than asked for, ``skip`` is given to another strategy, or a class would be
            missing (only data sets of more than 500 classes may lack some).
    """
    wanted = batches * batch_size
    if skip and strategy != "first":
        raise InputError(f"calibration.skip goes with the subset 'first', not with {strategy!r}")
    needed = wanted + skip * batch_size
    if needed > len(labels):
        raise InputError(
            f"calibration needs {needed} images ({batches} batches of {batch_size}"
            + (f" after {skip} skipped" if skip else "")
            + f"), but there are {len(labels)}: ask for fewer batches"
        )
    generator = torch.Generator().manual_seed(seed)
    if strategy == "first":
        positions = torch.arange(skip * batch_size, needed)
    elif strategy == "random":
        positions = torch.randperm(len(labels), generator=generator)[:wanted]
    else:
        positions = _stratified(labels, num_classes, wanted, generator)
    missing = sorted(set(range(num_classes)) - set(labels[positions].unique().tolist()))
    if missing and num_classes <= MANY_CLASSES:
        listed = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        raise InputError(
            f"the calibration subset has no image of class {listed}: take more images "
            f"(calibration.batches, calibration.batch_size; now {wanted}) or the subset 'stratified'"
        )
    return Subset(positions, batch_size)


def _stratified(labels: Tensor, num_classes: int, wanted: int, generator: torch.Generator) -> Tensor:
    """Positions with every class in proportion (largest remainder, at least one of each), in random order."""
    counts = torch.bincount(labels, minlength=num_classes)
    share = counts.double() * wanted / len(labels)
    least = (counts > 0).long() if wanted >= int((counts > 0).sum()) else torch.zeros_like(counts)
    take = torch.maximum(share.floor().long(), least)
    while int(take.sum()) < wanted:
        take[int(torch.argmax(torch.where(take < counts, share - take, -torch.inf)))] += 1
    while int(take.sum()) > wanted:  # a rare class's guaranteed image comes out of the fullest class
        take[int(torch.argmax(torch.where(take > least, take - share, -torch.inf)))] -= 1
    shuffled = torch.randperm(len(labels), generator=generator)
    of_class = labels[shuffled]
    chosen = torch.cat([shuffled[of_class == label][: int(take[label])] for label in range(num_classes)])
    return chosen[torch.randperm(len(chosen), generator=generator)]


class SubsetImages(Sequence[Tensor]):
    """The images of a subset, batch by batch; each is read when it is asked for.

    Attributes:
        source: What they are among.
        subset: Which they are.
    """

    def __init__(self, source: ImageSet, subset: Subset) -> None:
        self.source, self.subset = source, subset
        self._positions = subset.batches

    def __len__(self) -> int:
        return len(self._positions)

    def between(self, begin: int, end: int) -> Tensor:
        """The images from one place in the subset to another, float32 [end - begin, C, H, W]."""
        return self.source.images(self.subset.positions[begin:end])

    @overload
    def __getitem__(self, number: int) -> Tensor: ...

    @overload
    def __getitem__(self, number: slice) -> Sequence[Tensor]: ...

    def __getitem__(self, number: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(number, slice):
            return [self[index] for index in range(*number.indices(len(self)))]
        return self.source.images(self._positions[number])


def draw(data: Splits, num_classes: int, config: CalibrationConfig, seed: int) -> Subset:
    """Choose the representative subset as configured: positions in ``data.train_file``.

    ``first`` means the whole training file in its order; the others leave out the validation images.

    Raises:
        InputError: as :func:`select` does.
    """
    whole = config.subset == "first"
    labels = data.train_file.labels if whole else data.train.labels
    if num_classes == 0:  # no classes to draw from in their shares
        labels, num_classes = torch.zeros(len(labels), dtype=torch.int64), 1
    subset = select(labels, num_classes, config.subset, config.batches, config.batch_size, config.skip, seed)
    return subset if whole else Subset(data.train_index[subset.positions], subset.batch_size)
