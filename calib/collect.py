"""Running the network over calibration batches, on any device and in any number of processes, to count its values."""

from __future__ import annotations

import copy
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup

from calib.histogram.base import AbsHistogram, counting_threads
from calib.histogram.device import DeviceHistograms
from calib.network import Network
from common.errors import InputError
from common.processes import ANOTHER_ENDED, collective

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Histograms:
    """What the network's tensors looked like over the calibration batches.

    Attributes:
        network: The traced network.
        of: Histogram of every tensor that has a scale of its own (``scale_source`` points to itself).
        batch_seconds: Time of each batch.
        images: Images seen.
    """

    network: Network
    of: Mapping[str, AbsHistogram]
    batch_seconds: tuple[float, ...]
    images: int


def collect(
    network: Network,
    batches: Iterable[Any],
    progress: Callable[[int, float], None] | None = None,
    *,
    process_group: ProcessGroup | None = None,
) -> Histograms:
    """Run ``network`` over ``batches`` and histogram its tensors; memory does not grow with their number.

    On a GPU the histograms are counted there, without waiting for it, and without TF32: the scales are the CPU's but
    for the rounding of the network's own operations.

    Args:
        network: The traced network.
        batches: As :func:`calib.calibrator.calibrate` takes them. With ``process_group``, all batches in each process,
            which takes every N-th of them: a sequence, of which the process reads no others, or what can be iterated
            again.
        progress: Called after each batch of this process with (batches done, seconds it took).
        process_group: Processes that share the batches. The histograms, in each of them, are those of one process.

    Raises:
        InputError: as :func:`calib.calibrator.calibrate` does; or another process ended with an error.
    """
    device = device_of(network)
    names = [name for name in network.tensors if network.scale_source[name] == name]
    seen = _Seen(progress)
    if device.type == "cuda" or process_group is not None:
        with as_calibrated(network, device):
            of = _collect_on_device(network, names, batches, seen, device, process_group)
    else:
        of = _collect_on_cpu(network, names, batches, seen)
    if not seen.count:
        raise InputError("calibration needs at least one batch of images, and got none")
    if seen.constant:
        logger.warning("all pixels of each calibration batch are equal: these images represent nothing")
    elif seen.same and seen.images > 1:
        logger.warning("all %d calibration images are the same one: it represents nothing but itself", seen.images)
    return Histograms(network, of, tuple(seen.seconds), seen.images)


def _all_equal(images: Tensor, to: Tensor) -> bool:
    """Whether all images are ``to``; where they are not, the last one mostly tells."""
    return all(bool((part == to).all()) for part in (images[-1:], images[:-1]))


def device_of(network: Network) -> torch.device:
    """Where the network's parameters are; the CPU if it has none."""
    return next((parameter.device for parameter in network.module.parameters()), torch.device("cpu"))


class _Seen:
    """What the batches so far were like.

    Attributes:
        count: Batches.
        images: Images in them.
        constant: Whether every batch is of one value.
        same: Whether all images are the same.
        seconds: Time of each batch.
    """

    def __init__(self, progress: Callable[[int, float], None] | None) -> None:
        self._progress = progress
        self._first: Tensor | None = None
        self.count = self.images = 0
        self.constant = self.same = True
        self.seconds: list[float] = []

    def run(self, batch: Any, use: Callable[[Tensor], object]) -> None:
        """Give the images of ``batch`` to ``use``, and record the time."""
        start = time.perf_counter()
        images = _images(batch)
        self._first = images[:1] if self._first is None else self._first
        self.constant = self.constant and _all_equal(images, images[0, 0, 0, 0])
        self.same = self.same and images.shape[1:] == self._first.shape[1:] and _all_equal(images, self._first)
        use(images)
        self.count += 1
        self.images += len(images)
        self.seconds.append(time.perf_counter() - start)
        if self._progress is not None:
            self._progress(self.count, self.seconds[-1])

    def agree(self, group: ProcessGroup, device: torch.device) -> None:
        """Take what all processes saw for what was seen (but for the times)."""
        numbers = torch.tensor([self.count, self.images, not self.constant, not self.same], device=device)
        distributed.all_reduce(numbers, group=group)
        self.count, self.images, various, different = numbers.tolist()
        self.constant, self.same = not various, not different


def collect_prefixes(
    network: Network,
    images: Callable[[int, int], Tensor],
    counts: Iterable[int],
    batch_size: int,
    progress: Callable[[int, float], None] | None = None,
) -> dict[int, Histograms]:
    """Histograms of the first n images for several n, in one pass over the images of the largest.

    Each is what :func:`collect` makes of these n images alone, in batches of ``batch_size`` and the rest.

    Args:
        network: The traced network.
        images: Gives those from one position to another, float32 [N, C, H, W].
        counts: The numbers of images, in any order.
        batch_size: Images per batch.
        progress: Called at each n with (n, seconds since the beginning).

    Raises:
        InputError: as :func:`collect` does.
    """
    wanted = sorted(set(counts))
    start = time.perf_counter()
    names = [name for name in network.tensors if network.scale_source[name] == name]
    of = {name: AbsHistogram() for name in names}
    found = {}
    seen = _Seen(None)

    def keep(count: int, histograms: dict[str, AbsHistogram]) -> None:
        found[count] = Histograms(network, histograms, tuple(seen.seconds), count)
        if progress is not None:
            progress(count, time.perf_counter() - start)

    with counting_threads() as pool:
        for begin in range(0, wanted[-1], batch_size):
            end = begin + batch_size
            for count in wanted:
                if begin < count < end:
                    part = copy.deepcopy(of)
                    _observe(network, images(begin, count), part, seen.count + 1, pool)
                    keep(count, part)
            if end <= wanted[-1]:
                seen.run(images(begin, end), lambda batch: _observe(network, batch, of, seen.count + 1, pool))
            if end in wanted:
                keep(end, copy.deepcopy(of))
    return found


def _collect_on_cpu(
    network: Network, names: Sequence[str], batches: Iterable[Any], seen: _Seen
) -> Mapping[str, AbsHistogram]:
    of = {name: AbsHistogram() for name in names}
    with counting_threads() as pool:
        for batch in batches:
            seen.run(batch, lambda images: _observe(network, images, of, seen.count + 1, pool))
    return of


def _observe(
    network: Network, images: Tensor, of: Mapping[str, AbsHistogram], number: int, pool: Executor | None
) -> None:
    """Count batch ``number``, from 1, into the histograms."""

    def observe(name: str, value: Tensor) -> None:
        histogram = of.get(name)
        if histogram is None:
            return
        try:
            histogram.add(value, pool)
        except InputError as error:
            raise InputError(f"calibration batch {number}, tensor {name}: {error}") from error

    network.run(images, observe)


def _collect_on_device(
    network: Network,
    names: Sequence[str],
    batches: Iterable[Any],
    seen: _Seen,
    device: torch.device,
    group: ProcessGroup | None,
) -> Mapping[str, AbsHistogram]:
    """Histograms counted on ``device``, shared by the processes of ``group``.

    The first process runs the first batch, whose maxima are the ranges that all begin with. Where a tensor is all
    zeros in it and not later, or its range does not only double, its range at each batch is known only when all
    batches have run, and they run once more for it.
    """
    rank, processes = (0, 1) if group is None else (distributed.get_rank(group), distributed.get_world_size(group))
    if group is not None and iter(batches) is batches:
        raise InputError("batches that processes share must be a list, or what can be iterated again: not a generator")
    found = DeviceHistograms(names, device, rank=rank, processes=processes)

    def count(into: DeviceHistograms, part: Iterable[Any], seen: _Seen) -> None:
        def use(images: Tensor) -> None:
            network.run(images.to(device, non_blocking=True), into.add)
            into.end_batch()

        for batch in part:
            seen.run(batch, use)
        into.check()

    if group is None:
        count(found, batches, seen)
        return found.finish()[0] if seen.count else {}
    mine = _every(batches, rank, processes)
    bases: list[float] = []

    def begin() -> None:
        if rank == 0:
            count(found, itertools.islice(mine, 1), seen)
            bases[:] = found.bases()

    _together(begin, group, device)
    agreed = torch.tensor(bases if rank == 0 else [0.0] * len(names), dtype=torch.float64, device=device)
    distributed.broadcast(agreed, group_src=0, group=group)
    if rank > 0:
        found = DeviceHistograms(names, device, agreed.tolist(), rank, processes)
    found.leave_late()
    _together(lambda: count(found, mine, seen), group, device)
    seen.agree(group, device)
    if not seen.count:
        return {}
    of, ranges = found.finish(group)
    if ranges:
        known = torch.stack(list(ranges.values()), dim=1)
        again = DeviceHistograms(list(ranges), device, rank=rank, processes=processes, ranges=known)
        rest = _every(batches, rank, processes)
        _together(lambda: count(again, rest, _Seen(None)), group, device)
        of |= again.finish(group)[0]
    return of


def _together(work: Callable[[], None], group: ProcessGroup, device: torch.device) -> None:
    """Do this process's part, then wait for the others'.

    Raises:
        InputError: another process failed. What fails in this process is raised as it is.
    """
    failure: Exception | None = None
    try:
        work()
    except Exception as error:  # noqa: BLE001 - raised again, when the others know
        failure = error
    failed = torch.tensor(int(failure is not None), device=device)
    # What failed here comes first.
    with nullcontext() if failure is None else suppress(InputError), collective():
        distributed.all_reduce(failed, group=group)
    if failure is not None:
        raise failure
    if int(failed):
        raise InputError(ANOTHER_ENDED)


def _every(batches: Iterable[Any], rank: int, processes: int) -> Iterator[Any]:
    """Batches rank, rank + processes, ...; of a sequence, no others are read."""
    if isinstance(batches, Sequence):
        return (batches[number] for number in range(rank, len(batches), processes))
    return itertools.islice(batches, rank, None, processes)


@contextmanager
def as_calibrated(network: Network, device: torch.device) -> Iterator[None]:
    """Compute as calibration on ``device`` does: in full float32, with the weights laid out for it."""
    with _without_tf32(device), _planar_weights(network, device):
        yield


@contextmanager
def _without_tf32(device: torch.device) -> Iterator[None]:
    """Make a GPU the current one, and compute convolutions and matrix products there in full float32."""
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    cudnn = torch.backends.cudnn.flags(
        enabled=torch.backends.cudnn.enabled,
        benchmark=torch.backends.cudnn.benchmark,
        deterministic=torch.backends.cudnn.deterministic,
        allow_tf32=False,
    )
    try:
        with torch.cuda.device(device), cudnn:
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = matmul


@contextmanager
def _planar_weights(network: Network, device: torch.device) -> Iterator[None]:
    """On a GPU, store convolutions' weights plane by plane meanwhile: without TF32, resnet50 takes 0.85 of the time."""
    convolutions = [module for module in network.module.modules() if isinstance(module, nn.Conv2d)]
    before = [module.weight.data for module in convolutions]
    if device.type == "cuda":
        for module in convolutions:
            # Weights of 1x1 are contiguous in both layouts, and PyTorch tells which is meant by their strides.
            planes = torch.empty(module.weight.shape, device="meta").stride()
            if module.weight.stride() != planes:
                module.weight.data = module.weight.data.clone(memory_format=torch.contiguous_format)
    try:
        yield
    finally:
        for module, weight in zip(convolutions, before, strict=True):
            module.weight.data = weight


def _images(batch: Any) -> Tensor:
    images = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(images, Tensor) or images.dtype != torch.float32 or images.dim() != 4 or not len(images):
        kind = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise InputError(f"a calibration batch must be a float32 tensor [N, C, H, W], not {kind}")
    return images
