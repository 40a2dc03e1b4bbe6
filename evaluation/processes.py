"""An evaluation shared by several processes, as ``torchrun`` starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from common.config import EngineConfig
from common.errors import InputError
from common.threads import available_cores

T = TypeVar("T")

_LONGEST_WAIT = timedelta(days=1)
"""For the slowest process; one that ends in an error is noticed at once."""


@dataclass(frozen=True)
class Processes:
    """The processes of this evaluation, and which of them this is.

    Attributes:
        rank: Of this process; 0 writes the report.
        count: Number of processes, on all machines.
        local_rank: Of this process on its machine.
        local_count: Number of processes on this machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, batches: int) -> range:
        """Which of so many batches are this process's: a run of them.

        Raises:
            InputError: there are too few for all processes.
        """
        if batches < self.count:
            raise InputError(
                f"{batches} batches cannot be shared by {self.count} processes: lower --batch-size, or start fewer"
            )
        return range(batches * self.rank // self.count, batches * (self.rank + 1) // self.count)

    def gather(self, value: T) -> list[T] | None:
        """Every process's value in the order of their ranks, in the first process; None in the others."""
        if self.count == 1:
            return [value]
        from torch import distributed

        found: list[T] | None = [value] * self.count if self.first else None
        distributed.gather_object(value, found)
        return found

    def divide(self, engine: EngineConfig) -> None:
        """Give this process its part of the machine: its own GPU, or its share of the cores where not said how many."""
        if self.count == 1:
            return
        import torch

        gpus = torch.cuda.device_count()
        engine.device = (engine.device + self.local_rank) % gpus if gpus else engine.device
        if engine.threads is None:
            engine.threads = max(1, available_cores() // self.local_count)


ALONE = Processes()


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes that ``torchrun`` started, connected; :data:`ALONE` without it.

    Raises:
        InputError: the variables that ``torchrun`` sets are incomplete.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    from torch import distributed

    try:
        processes = Processes(
            *(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
        )
        distributed.init_process_group("gloo", timeout=_LONGEST_WAIT)
    except (KeyError, ValueError) as error:
        raise InputError(f"WORLD_SIZE is set, but not all that torchrun sets: {error}") from error
    try:
        yield processes
    finally:
        distributed.destroy_process_group()
