"""Calibration on any device: run the network over the subset, collect histograms, find thresholds, make the table.

This is the reference calibrator. It follows TensorRT's IInt8EntropyCalibrator2 to the bin; see ``calib.algorithms``.
"""

from __future__ import annotations

import copy
import itertools
import logging
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup

from calib.algorithms import ALGORITHMS, Threshold
from calib.algorithms import thresholds as thresholds_of
from calib.device_histogram import DeviceHistograms
from calib.histogram import AbsHistogram, counting_threads
from calib.network import INPUT, Network
from calib.table import LEVELS, TESTED_TENSORRT, CalibrationTable, Legacy
from calib.tracing import trace
from common.config import AlgorithmName, CalibrationConfig
from common.errors import InputError
from common.processes import ANOTHER_ENDED, collective

logger = logging.getLogger(__name__)

MUCH_CLIPPED = 0.05
"""Share of a tensor's values; where INT8 keeps its accuracy, entropy calibration clips 1 or 2 % at most."""


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


@dataclass(frozen=True)
class CalibrationResult:
    """A table and how it came about.

    Attributes:
        table: The result.
        thresholds: Threshold of every tensor of the network, shared ones included; value 0 where there is none.
        histograms: What they were found from.
        post_seconds: Time that finding the thresholds took.
    """

    table: CalibrationTable
    thresholds: Mapping[str, Threshold]
    histograms: Histograms
    post_seconds: float

    def clipped(self, tensor: str) -> float:
        """Share of the tensor's values that lie beyond its threshold, in [0, 1], to the resolution of a bin."""
        histogram = self.histograms.of[self.histograms.network.scale_source[tensor]]
        return histogram.share_above(self.thresholds[tensor].value)


def calibrate(
    model: nn.Module | Network,
    batches: Iterable[Any],
    algorithm: AlgorithmName = "entropy2",
    *,
    tensorrt_version: str = TESTED_TENSORRT,
    options: Mapping[str, float] | None = None,
    process_group: ProcessGroup | None = None,
) -> CalibrationTable:
    """Calibrate ``model`` over ``batches`` and return its calibration table.

    Args:
        model: A float classifier that ``torch.fx`` can trace, or what ``trace`` returned.
        batches: Image batches in order, each float32 [N, C, H, W] (or a tuple that starts with one, as a DataLoader
            with labels gives it). The result depends on their order: the first batch sets the histograms' range.
        algorithm: One of ``calib.algorithms.ALGORITHMS``; ``entropy2`` is IInt8EntropyCalibrator2.
        tensorrt_version: Version for the table's first line.
        options: Parameters of the algorithm, such as ``{"percentile": 99.9}``.
        process_group: Processes of torch.distributed that share the work, each with the same model and batches; every
            one gets the table that one process alone would make. See :func:`collect`.

    Returns:
        The table; ``table.scales`` holds the scales by tensor name, in network order. A tensor that was zero
        throughout has the scale 0, which quantizes nothing (``table.unusable``), and is named in a warning, as is one
        that INT8 layers read and that is clipped much.

    Raises:
        InputError: no batch, a batch that is not float32 [N, C, H, W] or does not fit the network, or values that are
            not finite.
    """
    network = model if isinstance(model, Network) else trace(model)
    histograms = collect(network, batches, process_group=process_group)
    calibration = find_thresholds(histograms, algorithm, tensorrt_version=tensorrt_version, options=options)
    layers = [layer for layer in network.layers if layer.kind != "softmax"]
    warn_of_clipping(calibration, {network.tensor_of[item] for layer in layers for item in layer.inputs})
    return calibration.table


def warn_of_clipping(
    calibration: CalibrationResult, read: Container[str], remedy: str = "try another algorithm"
) -> None:
    """Name the tensors of which a threshold cuts much off.

    Args:
        calibration: What was found.
        read: Tensors that INT8 layers read; others do not matter.
        remedy: What to do about it.
    """
    shares = {name: calibration.clipped(name) for name in calibration.thresholds if name in read}
    much = [f"{share:.1%} of {name}" for name, share in shares.items() if share > MUCH_CLIPPED]
    if much:
        logger.warning("%s clips %s: INT8 may lose accuracy; %s", calibration.table.algorithm, ", ".join(much), remedy)


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
        batches: As :func:`calibrate` takes them. With ``process_group``, all batches in each process, which takes
            every N-th of them: a sequence, of which the process reads no others, or what can be iterated again.
        progress: Called after each batch of this process with (batches done, seconds it took).
        process_group: Processes that share the batches. The histograms, in each of them, are those of one process.

    Raises:
        InputError: as :func:`calibrate` does; or another process ended with an error.
    """
    device = _device(network)
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


def _device(network: Network) -> torch.device:
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
    zeros in it and not later, the range is known only when all batches have run, and they run once more for it.
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
        return found.finish()[0]
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
    of, late = found.finish(group)
    alive = {name: base for name, base in late.items() if base > 0}
    if alive:
        again = DeviceHistograms(list(alive), device, list(alive.values()), rank, processes)
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


def find_thresholds(
    histograms: Histograms,
    algorithm: AlgorithmName = "entropy2",
    *,
    tensorrt_version: str = TESTED_TENSORRT,
    options: Mapping[str, float] | None = None,
) -> CalibrationResult:
    """Find every tensor's threshold and scale from its histogram (threshold / 127).

    Args:
        histograms: From :func:`collect`.
        algorithm: As :func:`calibrate` takes it.
        tensorrt_version: Version for the table's first line.
        options: Parameters of the algorithm.
    """
    start = time.perf_counter()
    network = histograms.network
    values = thresholds_of(list(histograms.of.values()), algorithm, device=_device(network), **(options or {}))
    found = dict(zip(histograms.of, values, strict=True))
    thresholds = {name: found[network.scale_source[name]] for name in network.tensors}
    seen = {name for name, source in network.scale_source.items() if histograms.of[source].total}
    dead = [name for name, value in thresholds.items() if value.value == 0 and name in seen]
    if dead:
        logger.warning(
            "no usable range, all values were zero: %s; what reads %s stays in float",
            ", ".join(dead),
            "it" if len(dead) == 1 else "them",
        )
    scales = {name: value.value / LEVELS for name, value in thresholds.items()}
    if scales[INPUT] == 0:
        raise InputError("all calibration images are zero: there is nothing to calibrate")
    given = options or {}
    legacy = Legacy(quantile=given.get("quantile", Legacy.quantile))
    table = CalibrationTable(scales, algorithm, tensorrt_version, legacy)
    return CalibrationResult(table, thresholds, histograms, time.perf_counter() - start)


def algorithm_options(config: CalibrationConfig) -> dict[str, float]:
    """The parameters that the configured algorithm takes."""
    return {option.name: getattr(config, option.name) for option in ALGORITHMS[config.algorithm].options}
