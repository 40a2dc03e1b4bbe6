"""Work shared by several processes, as ``torchrun`` starts them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from common.config import EngineConfig
from common.console import stdout_to_stderr
from common.errors import InputError
from common.threads import available_cores

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

T = TypeVar("T")

_LONGEST_WAIT = timedelta(days=1)
"""For the slowest process; one that ends in an error is noticed at once."""


@contextmanager
def collective() -> Iterator[None]:
    """Around a call of torch.distributed that all processes take part in.

    Raises:
        InputError: another process has ended.
    """
    try:
        yield
    except RuntimeError as error:  # the connection was closed
        raise InputError(ANOTHER_ENDED) from error


ANOTHER_ENDED = "another process ended; see its error above"


@dataclass(frozen=True)
class Processes:
    """The processes that share the work, and which of them this is.

    Attributes:
        rank: Of this process; 0 writes the results.
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
        """Every process's value in the order of their ranks, in the first process; None in the others.

        Raises:
            InputError: another process ended.
        """
        if self.count == 1:
            return [value]
        from torch import distributed

        found: list[T] | None = [value] * self.count if self.first else None
        with collective():
            distributed.gather_object(value, found)
        return found

    @contextmanager
    def leading(self) -> Iterator[Callable[[], None]]:
        """In the first process: gives what calls the others to work; without a call, they end when the block does.

        Raises:
            InputError: where it calls: another process ended.
        """
        waiting = True

        def call() -> None:
            nonlocal waiting
            waiting = False
            self._agree(called=True)

        failure: Exception | None = None
        try:
            yield call
        except Exception as error:
            failure = error
            raise
        finally:
            if waiting:
                self._agree(called=False, failure=failure)

    def called(self, failure: Exception | None = None) -> bool:
        """In a process that is not the first: whether that calls it to work, or needs it no more.

        Args:
            failure: Why this process cannot work, if so; raised again when the others know.

        Raises:
            InputError: another process ended.
        """
        return self._agree(called=False, failure=failure)

    def _agree(self, *, called: bool, failure: Exception | None = None) -> bool:
        if self.count > 1:
            import torch
            from torch import distributed

            flags = torch.tensor([int(called), int(failure is not None)])
            # What failed here comes first.
            with nullcontext() if failure is None else suppress(InputError), collective():
                distributed.all_reduce(flags, distributed.ReduceOp.MAX)
            called, failed = map(bool, flags.tolist())
        if failure is not None:
            raise failure
        if self.count > 1 and failed:
            raise InputError(ANOTHER_ENDED)
        return called

    @contextmanager
    def first_ahead(self) -> Iterator[None]:
        """The first process does the block, then the others do: they find what it kept in files.

        Raises:
            InputError: another process ended, or failed in the block.
        """
        if not self.first:
            self._agree(called=False)
            yield
            return
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
            raise
        finally:
            self._agree(called=False, failure=failure)

    def help(self, prepare: Callable[[], Callable[[], object]]) -> None:
        """In a process that is not the first: get ready, and do the work if the first one calls to it.

        Args:
            prepare: Finds all that can be found missing, and gives what does the work.

        Raises:
            InputError: another process ended. What ``prepare`` raises is raised again, when the others know.
        """
        failure: Exception | None = None
        try:
            work = prepare()
        except Exception as error:  # noqa: BLE001 - raised again, when the others know
            failure = error
        if self.called(failure):
            work()

    @contextmanager
    def group(self, device: torch.device) -> Iterator[ProcessGroup | None]:
        """A group for tensors on ``device`` (NCCL between GPUs, gloo between CPUs); None where this process is alone.

        All processes must begin and end it.
        """
        if self.count == 1:
            yield None
            return
        from torch import distributed

        with stdout_to_stderr():  # gloo says there whom it reached
            group = distributed.new_group(timeout=_LONGEST_WAIT, backend="nccl" if device.type == "cuda" else "gloo")
        try:
            yield group
        finally:
            distributed.destroy_process_group(group)

    def device(self, engine: EngineConfig) -> torch.device:
        """Where this process computes, once the machine is divided: on its own GPU if there are any, else on the CPU.

        Raises:
            InputError: there are too few GPUs.
        """
        import torch

        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if gpus == 0:
            return torch.device("cpu")
        if self.local_count > gpus:
            raise InputError(
                f"{self.local_count} processes need a GPU each, and there are {gpus}: start fewer, or hide the GPUs "
                "with CUDA_VISIBLE_DEVICES= to compute on the CPU"
            )
        if engine.device >= gpus:
            raise InputError(f"engine.device {engine.device} is not there: this machine has {gpus} GPUs")
        return torch.device("cuda", engine.device)

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


def is_first_process() -> bool:
    """Whether this process has rank 0, by the variables of torchrun, SLURM and Lightning's own launcher."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "NODE_RANK", "LOCAL_RANK", "SLURM_PROCID"))


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
        with stdout_to_stderr():  # gloo says there whom it reached
            distributed.init_process_group("gloo", timeout=_LONGEST_WAIT)
    except (KeyError, ValueError) as error:
        raise InputError(f"WORLD_SIZE is set, but not all that torchrun sets: {error}") from error
    try:
        yield processes
    finally:
        distributed.destroy_process_group()
