"""Iterables of batches for Lightning: slices and gathers of an ImageSet, without workers and without collation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from common.errors import InputError
from data.augment import Affine, apply_affine
from data.base import ImageSet

Batch = tuple[Tensor, Tensor]
"""float32 images [B, C, H, W] and int64 labels [B]."""

_CHUNK_VALUES = 1 << 19
"""Small images are gathered and augmented several batches at a time: about 2 MiB of float32, which stays in cache."""


class TrainLoader:
    """Full batches of one epoch's permutation, augmented; the same for the same seed, epoch and number of processes.

    Lightning calls ``set_epoch`` (it looks for ``sampler``) and saves ``state_dict`` in the middle of an epoch, so
    that a resumed run goes on with the next batch. The random numbers come from the CPU's generator on every device.

    Args:
        source: The images.
        batch_size: Images per batch and process.
        seed: Of permutation and augmentation.
        augment: Ranges of the random transform; None for none.
        rank: Of this process.
        processes: Number of processes; each takes its own part of every step's images.

    Raises:
        InputError: there are fewer images than one step takes.
    """

    def __init__(
        self,
        source: ImageSet,
        batch_size: int,
        seed: int,
        augment: Affine | None = None,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        if len(source) < batch_size * processes:
            raise InputError(
                f"{len(source):,} training images do not fill one batch of {batch_size:,} in each of {processes} "
                "process(es): choose a smaller data.batch_size"
            )
        self.source = source
        self.batch_size = batch_size
        self.seed = seed
        self.augment = augment
        self.rank = rank
        self.processes = processes
        self.epoch = 0
        self._next = 0
        self._resume = 0

    @property
    def sampler(self) -> TrainLoader:
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation; a position to resume at within another epoch is forgotten."""
        if epoch != self.epoch:
            self.epoch = epoch
            self._resume = 0

    def __len__(self) -> int:
        return len(self.source) // (self.batch_size * self.processes)

    def state_dict(self) -> dict[str, Any]:
        """The position: epoch, and the batch that comes next in it."""
        return {"epoch": self.epoch, "next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next pass over that epoch, and only that pass, begin where the state was taken."""
        self.epoch, self._resume = int(state["epoch"]), int(state["next"])

    def __iter__(self) -> Iterator[Batch]:
        # A generator: Lightning makes the first iterator before it sets the epoch, and this runs at the first batch.
        first = self._next = self._resume
        self._resume = 0
        steps, size = len(self), self.batch_size
        generator = torch.Generator().manual_seed(_mix(self.seed, self.epoch))
        order = torch.randperm(len(self.source), generator=generator)[: steps * self.processes * size]
        order = order.view(steps, self.processes, size)[:, self.rank].to(self.source.labels.device)
        transforms = None
        if self.augment is not None:
            transforms = self.augment.draw(steps * self.processes * size, generator)
            transforms = transforms.view(steps, self.processes, size, 2, 3)[:, self.rank].to(order.device)

        # Chunks begin at fixed steps of the epoch, so that a resumed epoch computes the very same numbers.
        chunk = max(1, _CHUNK_VALUES // (size * math.prod(self.source.preprocessing.shape)))
        starts = range(first - first % chunk, steps, chunk)
        indices = [order[start : start + chunk].flatten() for start in starts]
        for start, index, stored in zip(starts, indices, self.source.stream(indices), strict=True):
            images = stored
            if transforms is not None:
                images = apply_affine(stored, transforms[start : start + chunk].flatten(0, 1))
            labels = self.source.labels.index_select(0, index)
            batches = zip(images.view(-1, size, *images.shape[1:]), labels.view(-1, size), strict=True)
            for step, batch in enumerate(batches, start=start):
                if step >= first:
                    self._next = step + 1
                    yield batch


class EvaluationLoader:
    """Every image once, in order, in batches of nearly equal size; with several processes, each takes a run of batches.

    All processes get the same number of batches, without repeating an image to fill up, so that metrics summed over
    processes equal those of one process.

    Args:
        source: The images.
        batch_size: Most images per batch.
        rank: Of this process.
        processes: Number of processes.

    Raises:
        InputError: there are fewer images than processes.
    """

    def __init__(self, source: ImageSet, batch_size: int, rank: int = 0, processes: int = 1) -> None:
        if len(source) < processes:
            raise InputError(f"{len(source):,} images cannot be shared by {processes} processes")
        self.source = source
        self.batch_size = batch_size
        self.rank = rank
        self.processes = processes

    def __len__(self) -> int:
        # No batch is empty: with few images, some hold two where batch_size is 1.
        count = math.ceil(len(self.source) / (self.batch_size * self.processes))
        return min(count, len(self.source) // self.processes)

    def __iter__(self) -> Iterator[Batch]:
        count = len(self)
        total, parts = len(self.source), count * self.processes
        bounds = [total * part // parts for part in range(self.rank * count, (self.rank + 1) * count + 1)]
        indices = [slice(begin, end) for begin, end in pairwise(bounds)]
        for index, images in zip(indices, self.source.stream(indices), strict=True):
            yield images, self.source.labels[index]


def _mix(seed: int, epoch: int) -> int:
    """A generator seed for one epoch; neighbouring seeds and epochs do not share any."""
    return (seed * 0x9E3779B97F4A7C15 + epoch + 1) & 0x7FFF_FFFF_FFFF_FFFF
