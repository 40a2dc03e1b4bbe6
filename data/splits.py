"""A data set divided into training, validation and test images."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import InputError
from data.base import DatasetInfo, ImageSet
from data.tensor import Selection

logger = logging.getLogger(__name__)

LARGEST_VALIDATION_SHARE = 6
"""At most one in so many training images is held out, whatever ``data.validation`` says."""


@dataclass(frozen=True)
class Splits:
    """Training, validation and test images of one data set.

    Attributes:
        info: What a run records about it.
        train_file: All training images, in the order of their file.
        train: ``train_file`` without the held-out images, in the same order.
        train_index: int64, positions of ``train`` in ``train_file``, ascending.
        validation: The held-out images, to choose by.
        test: For the final figure alone.
    """

    info: DatasetInfo
    train_file: ImageSet
    train: ImageSet
    train_index: Tensor
    validation: ImageSet
    test: ImageSet


def divide(info: DatasetInfo, train_file: ImageSet, test: ImageSet, validation: int | ImageSet, seed: int) -> Splits:
    """Divide a data set.

    Args:
        info: What a run records about it.
        train_file: All training images, in the order of their file.
        test: For the final figure alone.
        validation: Number of images to hold out of ``train_file`` (stratified, seeded), or a set of its own.
        seed: Decides which images are held out.

    Raises:
        InputError: there are too few images to hold any out.
    """
    if isinstance(validation, int):
        kept, held_out = hold_out(train_file.labels, validation, seed)
        return Splits(info, train_file, Selection(train_file, kept), kept, Selection(train_file, held_out), test)
    return Splits(info, train_file, train_file, torch.arange(len(train_file)), validation, test)


def hold_out(labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Split positions into (kept, held out), each ascending, every class held out in its share of ``labels``.

    Args:
        labels: int64 [N], or targets, float32 [N, K], which are not divided by.
        count: How many to hold out; at most N / ``LARGEST_VALIDATION_SHARE`` are.
        seed: Decides which images are chosen.

    Raises:
        InputError: there are too few images to hold any out.
    """
    largest = len(labels) // LARGEST_VALIDATION_SHARE
    if largest < 1:
        raise InputError(f"{len(labels)} training images are too few to hold some out for validation")
    if count > largest:
        logger.warning(
            "%s images are held out for validation, not %s: at most one in %s of the %s training images",
            f"{largest:,}",
            f"{count:,}",
            LARGEST_VALIDATION_SHARE,
            f"{len(labels):,}",
        )
        count = largest
    generator = torch.Generator().manual_seed(seed)
    if labels.is_floating_point():
        labels = torch.zeros(len(labels), dtype=torch.int64)  # targets, not classes
    order = torch.randperm(len(labels), generator=generator)
    # Shuffled, then sorted by class (stable): the first of each class's run are held out.
    order = order[torch.argsort(labels[order], stable=True)]
    sizes = torch.bincount(labels)
    quotas = _shares(sizes, count)
    starts = torch.cumsum(sizes, 0) - sizes
    rank = torch.arange(len(labels)) - starts.repeat_interleave(sizes)
    held = rank < quotas.repeat_interleave(sizes)
    return order[~held].sort().values, order[held].sort().values


def _shares(sizes: Tensor, count: int) -> Tensor:
    """``count`` divided in proportion to ``sizes``, by largest remainder: int64, summing to ``count``."""
    exact = sizes * count
    quotas: Tensor = exact // sizes.sum()
    left = count - int(quotas.sum())
    quotas[torch.argsort(exact % sizes.sum(), descending=True, stable=True)[:left]] += 1
    return quotas
