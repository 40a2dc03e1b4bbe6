"""Latency, measured so that the precisions can be compared: interleaved, after a warm-up, on real images.

On a CPU, ``perf_counter`` around each call. On a GPU, CUDA events on a stream of its own with the input already on the
device: around a CUDA graph of the network where its engine can be captured, which is what the engine itself takes;
beside it the call through the framework around the engine, and the wall-clock time with the copies from and to pinned
host memory. Events around a single launch of a few microseconds would measure the launch: up to ``LAUNCHES`` follow one
another between two events, and their mean counts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from common.errors import first_line, out_of_memory
from data.base import ImageSet
from engines.base import Compiled, Outputs, as_outputs
from evaluation.measures import Latency, Timing

logger = logging.getLogger(__name__)

SLICE_SECONDS = 0.02
"""How long one network runs before it is the next one's turn: long against a switch, short against clock drift."""
WARM_UP_SECONDS = 0.2
GPU_RUNS, GPU_SECONDS = 200, 2.0
"""On a GPU: at least this many timed runs, or this many seconds."""
LAUNCHES, LAUNCHES_MS = 20, 1.0
"""On a GPU: launches between two events, as many as take this many milliseconds, and at most so many."""
PATIENCE = 10
"""A slow network stops after this many times the configured seconds, however few runs that makes."""
LEAST_RUNS = 5


@dataclass
class _Subject:
    """One network under measurement at one batch size.

    ``sample(n)`` runs it n times and returns the times in milliseconds; ``replayed`` tells whether as a CUDA graph.
    """

    sample: Callable[[int], list[float]]
    runs: int
    seconds: float
    limit: float
    replayed: bool = False
    times: list[float] = field(default_factory=list)
    spent: float = 0.0
    estimate: float = 0.0

    @property
    def done(self) -> bool:
        enough = len(self.times) >= self.runs and self.spent >= self.seconds
        return enough or (self.spent >= self.limit and len(self.times) >= LEAST_RUNS)


def measure_latency(
    compiled: Sequence[Compiled],
    source: ImageSet,
    batch_sizes: Sequence[int],
    seconds: float,
    runs: int,
    device: int = 0,
) -> list[list[Latency]]:
    """Time every network at every batch size; the first is the one that speed-ups are against.

    The networks take turns of about 20 ms, so that a change of clock or of load hits all alike. The first call of
    each turn, which finds the caches full of the other networks' data, is not counted (but where a turn is one long
    call). A network whose latency is not representative anyway (``latency_note``) is timed for ``seconds`` alone,
    without the least number of runs.

    Args:
        compiled: Networks.
        source: Where the images come from, since the time of some kernels depends on the values; they repeat where
            a batch is larger than the set.
        batch_sizes: Images per batch.
        seconds: Timed seconds per network and batch size, at least.
        runs: Timed runs per network and batch size, at least; given up after ten times ``seconds``.
        device: Index of the GPU, for the networks that run on one.

    Returns:
        For each network, one entry per batch size, but for those for which a GPU has no memory left.
    """
    results: list[list[Latency]] = [[] for _ in compiled]
    for size in batch_sizes:
        images = source.images(torch.arange(size) % len(source)).contiguous()
        try:
            entries = _measure(compiled, images, seconds, runs, device)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            logger.warning("no latency at batch %d: GPU %d has no memory left, end what else uses it", size, device)
            continue
        for entry, result in zip(entries, results, strict=True):
            result.append(entry)
    for index, network in enumerate(compiled):
        if index and network.latency_note is None and results[0]:
            results[index] = [
                replace(entry, speedup=base.compute.median / entry.compute.median)
                for base, entry in zip(results[0], results[index], strict=True)
            ]
    return results


def _measure(compiled: Sequence[Compiled], images: Tensor, seconds: float, runs: int, device: int) -> list[Latency]:
    """An entry for each network, without a speed-up, at one batch size; as :func:`measure_latency`."""
    compute = [_subject(network, images, seconds, runs, device) for network in compiled]
    _take_turns(compute)
    on_gpu = [index for index, network in enumerate(compiled) if network.run_on_device is not None]
    called = {
        index: _called_subject(compiled[index], images, seconds, runs, device)
        for index in on_gpu
        if compute[index].replayed
    }
    copies = {index: _end_to_end_subject(compiled[index], images, seconds, runs, device) for index in on_gpu}
    _take_turns(list(called.values()))
    _take_turns(list(copies.values()))
    size = len(images)
    return [
        Latency(
            batch_size=size,
            compute=summarise(subject.times, size),
            without_graph=summarise(called[index].times, size) if index in called else None,
            end_to_end=summarise(copies[index].times, size) if index in copies else None,
        )
        for index, subject in enumerate(compute)
    ]


def summarise(times: Sequence[float], batch_size: int) -> Timing:
    """Median and percentiles (linear interpolation) of times in milliseconds."""
    values = torch.tensor(times, dtype=torch.float64)
    median, p90, p99 = torch.quantile(values, torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64)).tolist()
    return Timing(
        runs=len(times),
        median=median,
        p90=p90,
        p99=p99,
        per_image=median / batch_size,
        images_per_second=1000 * batch_size / median,
    )


def _subject(network: Compiled, images: Tensor, seconds: float, runs: int, device: int) -> _Subject:
    if network.run_on_device is not None:
        runner = _DeviceRunner(network, images, device)
        return replace(_gpu_subject(runner.compute, seconds, runs), replayed=runner.replayed)
    runs = LEAST_RUNS if network.latency_note else runs
    return _Subject(_wall_clock(lambda: network.run(images)), runs, seconds, PATIENCE * seconds)


def _called_subject(network: Compiled, images: Tensor, seconds: float, runs: int, device: int) -> _Subject:
    return _gpu_subject(_DeviceRunner(replace(network, captured=None), images, device).compute, seconds, runs)


def _end_to_end_subject(network: Compiled, images: Tensor, seconds: float, runs: int, device: int) -> _Subject:
    return _gpu_subject(_wall_clock(_DeviceRunner(network, images, device).round_trip), seconds, runs)


def _gpu_subject(sample: Callable[[int], list[float]], seconds: float, runs: int) -> _Subject:
    return _Subject(sample, max(runs, GPU_RUNS), seconds, max(seconds, GPU_SECONDS))


def _wall_clock(call: Callable[[], object]) -> Callable[[int], list[float]]:
    def sample(count: int) -> list[float]:
        times = []
        for _ in range(count):
            begin = time.perf_counter()
            call()
            times.append(1000 * (time.perf_counter() - begin))
        return times

    return sample


def _replay(network: Compiled, images: Tensor) -> Callable[[], Tensor | Outputs] | None:
    """The network as a CUDA graph that reads ``images``; None where it has none, with a warning where it fails."""
    if network.captured is None:
        return None
    try:
        return network.captured(images)
    except RuntimeError as error:
        logger.warning(
            "%s %s at batch %d is timed by calls, since it cannot be captured as a CUDA graph: %s",
            network.engine,
            network.precision,
            len(images),
            first_line(error),
        )
        return None


class _DeviceRunner:
    """Runs a network on a GPU, on a stream of its own, with buffers that are allocated once."""

    def __init__(self, network: Compiled, images: Tensor, device: int) -> None:
        run = network.run_on_device
        assert run is not None  # the caller chose those that have it
        self.stream = torch.cuda.Stream(device)
        self.source = images.pin_memory()
        with torch.cuda.device(device), torch.cuda.stream(self.stream):
            self.input = images.to(torch.device("cuda", device))
            replay = _replay(network, self.input)
            self.run = replay or (lambda: run(self.input))
            outputs = as_outputs(self.run())
        self.replayed = replay is not None
        self.stream.synchronize()
        self.targets = [torch.empty_like(output, device="cpu").pin_memory() for output in outputs]
        self.launches = 1
        self.launches = max(1, min(LAUNCHES, round(LAUNCHES_MS / min(self.compute(LEAST_RUNS)))))

    def compute(self, count: int) -> list[float]:
        """Milliseconds of a launch, ``count`` times: the mean of those between two events on the stream."""
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        with torch.cuda.stream(self.stream):
            for begin, end in events:
                begin.record(self.stream)
                for _ in range(self.launches):
                    self.run()
                end.record(self.stream)
        self.stream.synchronize()
        return [begin.elapsed_time(end) / self.launches for begin, end in events]

    def round_trip(self) -> None:
        """Copy in, run, copy out, and wait for it."""
        with torch.cuda.stream(self.stream):
            self.input.copy_(self.source, non_blocking=True)
            for target, output in zip(self.targets, as_outputs(self.run()), strict=True):
                target.copy_(output, non_blocking=True)
        self.stream.synchronize()


def _take_turns(subjects: Sequence[_Subject]) -> None:
    """Warm every subject up, then let them run in turns until each has enough."""
    with torch.inference_mode():
        for subject in subjects:
            begin = time.perf_counter()
            count = 0
            while count < 2 or (time.perf_counter() - begin < WARM_UP_SECONDS):
                subject.sample(1)
                count += 1
            subject.estimate = (time.perf_counter() - begin) / count
        for subject in _in_turns(subjects):
            begin = time.perf_counter()
            count = max(1, round(SLICE_SECONDS / subject.estimate))
            discarded = 1 if count > 1 else 0
            subject.times += subject.sample(count + discarded)[discarded:]
            subject.spent += time.perf_counter() - begin


def _in_turns(subjects: Sequence[_Subject]) -> Iterator[_Subject]:
    while waiting := [subject for subject in subjects if not subject.done]:
        yield from waiting
