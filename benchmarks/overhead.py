"""What calibration costs beside the forward passes that it needs anyway, on the CPU and on a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.results import Entry, Findings, Table, Target
from benchmarks.setting import BATCH, BATCHES, Setting
from benchmarks.timing import in_turns, ratio, spread
from calib.calibrator import find_thresholds
from calib.collect import as_calibrated, collect
from calib.histogram.base import AbsHistogram
from calib.network import Network
from calib.tracing import trace

IMAGENET = (3, 224, 224)
BANDWIDTH = 3e12
"""Bytes a second that an H100's memory gives, for the limit of what the counting can reach."""

GOALS = {"LeNet": 0.010, "resnet18": 0.10, "resnet50": 0.25}
"""Seconds on an H100."""

CPU_BATCHES, CPU_BATCH = 4, 8

METHOD = (
    "Networks with random weights over random images in memory, of ImageNet's size but for LeNet's. The forward passes "
    "alone, as calibration computes them (float32 without TF32), take turns with the whole calibration by entropy2: "
    "forward passes, histograms, search, table. On the GPU: "
    f"{BATCHES * BATCH} images in batches of {BATCH}, which lie in its memory; the limit is the forward passes and "
    "every value of every tensor read twice (for the range, and to count it) at 3 TB/s. Peak memory is what PyTorch "
    f"allocates, images and weights included. On the CPU: {CPU_BATCHES * CPU_BATCH} images in batches of {CPU_BATCH}."
)


def run(setting: Setting) -> Findings:
    """See the module."""
    table, target = _on_the_cpu(setting)
    tables, targets, skipped = [table], [target], {}
    if torch.cuda.is_available():
        table, more = _on_the_gpu(setting)
        tables.append(table)
        targets += more
    else:
        skipped["calibration on a GPU"] = "PyTorch finds none"
    return Findings(METHOD, tables, targets, skipped)


def _network(name: str) -> Network:
    import torchvision

    from models import LeNet

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LeNet() if name == "LeNet" else getattr(torchvision.models, name)(weights=None)
    return trace(model.eval(), name, (1, 28, 28) if name == "LeNet" else IMAGENET)


def _images(network: Network, count: int, side: int | None = None) -> Tensor:
    assert network.input_shape is not None
    channels, height, width = network.input_shape
    shape = (channels, side or height, side or width)
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(0))


def _calibrate(network: Network, batches: Sequence[Tensor]) -> None:
    find_thresholds(collect(network, batches))


def _forward(network: Network, batches: Sequence[Tensor]) -> None:
    with torch.inference_mode():
        for batch in batches:
            network.module(batch)


def _timed(work: Callable[[Network, Sequence[Tensor]], None], network: Network, batches: Sequence[Tensor]) -> float:
    """Seconds until all is done, on a GPU too."""
    device = batches[0].device
    with as_calibrated(network, device):
        _wait(device)
        begin = time.perf_counter()
        work(network, batches)
        _wait(device)
        return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _on_the_cpu(setting: Setting) -> tuple[Table, Target]:
    network = _network("resnet18")
    batches = _images(network, CPU_BATCHES * CPU_BATCH, 64 if setting.quick else None).split(CPU_BATCH)
    seconds = in_turns(
        {
            "forward passes": lambda: _timed(_forward, network, batches),
            "calibration": lambda: _timed(_calibrate, network, batches),
        },
        setting.rounds(9),
    )
    forward, whole = seconds["forward passes"], seconds["calibration"]
    entries = [
        Entry("forward passes", spread(forward), 1.0),
        Entry("calibration", spread(whole), ratio(forward, whole)),
    ]
    more = statistics.median(one / other - 1 for one, other in zip(whole, forward, strict=True))
    title = f"resnet18 on the CPU, {CPU_BATCHES * CPU_BATCH} images, {torch.get_num_threads()} threads"
    target = Target("resnet18 on the CPU: counting and search, share of the forward passes", "at most", 0.3, "", more)
    return Table(title, "s", entries, "forward passes"), target


def _on_the_gpu(setting: Setting) -> tuple[Table, list[Target]]:
    device = torch.device("cuda", 0)
    entries, targets, worst = [], [], 0.0
    for name in list(GOALS)[:1] if setting.quick else GOALS:
        on_cpu = _network(name)
        network = _network(name)
        network.module.to(device)
        batches = _images(network, setting.images(BATCHES * BATCH)).to(device).split(BATCH)
        seconds = in_turns(
            {
                "forward": lambda network=network, batches=batches: _timed(_forward, network, batches),  # type: ignore[misc]
                "whole": lambda network=network, batches=batches: _timed(_calibrate, network, batches),  # type: ignore[misc]
            },
            setting.rounds(15),
        )
        forward = statistics.median(seconds["forward"])
        values = len(batches) * _values(network, batches[0])
        memory = _peak(_calibrate, network, batches) / _peak(_forward, network, batches)
        worst = max(worst, memory)
        entries.append(
            Entry(
                f"{name}, {sum(map(len, batches))} images",
                spread(seconds["whole"]),
                figures={
                    "forward passes, s": forward,
                    "with TF32, s": _with_tf32(network, batches, setting.rounds(5)),
                    "10⁹ values": values / 1e9,
                    "limit, s": forward + 2 * 4 * values / BANDWIDTH,
                    "times the forward pass": statistics.median(seconds["whole"]) / forward,
                    "peak memory, times the forward pass's": memory,
                    "counts equal to the CPU's": "yes" if _counts_are_the_cpus(network, batches[:3]) else "no",
                    "scales against the CPU's": _difference(network, on_cpu, [batch[:10] for batch in batches[:2]]),
                },
            )
        )
        what = f"{name} on a GPU, {BATCHES * BATCH} images: calibration in all"
        note = f"the goal is for an H100; this is {torch.cuda.get_device_name(device)}"
        targets.append(Target(what, "at most", GOALS[name], "s", statistics.median(seconds["whole"]), note))
    what = "calibration on a GPU: peak memory, times the forward pass's, of the worst network"
    targets.append(Target(what, "at most", 1.2, "", worst))
    note = (
        '"Counts equal to the CPU\'s": of the same activations, to the last one. "Scales": largest relative difference '
        "of a scale where the CPU computes the activations too."
    )
    return Table(f"on {torch.cuda.get_device_name(device)}", "s", entries, notes=[note]), targets


def _values(network: Network, batch: Tensor) -> int:
    """Values that are counted in one batch."""
    sizes: dict[str, int] = {}
    network.run(batch, lambda name, value: sizes.update({name: value.numel()}))
    return sum(size for name, size in sizes.items() if network.scale_source[name] == name)


def _peak(work: Callable[[Network, Sequence[Tensor]], None], network: Network, batches: Sequence[Tensor]) -> int:
    """Bytes that PyTorch has allocated on the GPU at most, while ``work`` runs."""
    device = batches[0].device
    _wait(device)
    torch.cuda.reset_peak_memory_stats(device)
    _timed(work, network, batches)
    return torch.cuda.max_memory_allocated(device)


def _with_tf32(network: Network, batches: Sequence[Tensor], rounds: int) -> float:
    """Median seconds of the forward passes where TF32 is allowed."""
    from torch.backends import cuda, cudnn

    before = cuda.matmul.allow_tf32, cudnn.allow_tf32
    cuda.matmul.allow_tf32 = cudnn.allow_tf32 = True
    try:
        found = []
        for _ in range(rounds + 1):
            _wait(batches[0].device)
            begin = time.perf_counter()
            _forward(network, batches)
            _wait(batches[0].device)
            found.append(time.perf_counter() - begin)
        return statistics.median(found[1:])
    finally:
        cuda.matmul.allow_tf32, cudnn.allow_tf32 = before


def _counts_are_the_cpus(network: Network, batches: Sequence[Tensor]) -> bool:
    """Whether the counts of some batches are those that the CPU counts of the same activations."""
    expected = {name: AbsHistogram() for name, source in network.scale_source.items() if name == source}

    def count(name: str, value: Tensor) -> None:
        if name in expected:
            expected[name].add(value.cpu())

    with as_calibrated(network, batches[0].device):
        for batch in batches:
            network.run(batch, count)
    found = collect(network, batches).of
    return all(
        (one.range, one.maximum) == (found[name].range, found[name].maximum)
        and (one.counts == found[name].counts).all()
        for name, one in expected.items()
    )


def _difference(network: Network, on_cpu: Network, batches: Sequence[Tensor]) -> float:
    """Largest relative difference between scales of a GPU and of the CPU, each with its own activations."""
    ours = find_thresholds(collect(network, batches)).table.scales
    theirs = find_thresholds(collect(on_cpu, [batch.cpu() for batch in batches])).table.scales
    return max(abs(ours[name] / theirs[name] - 1) for name in theirs if theirs[name] > 0)
