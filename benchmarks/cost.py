"""How calibration's cost grows: with the number of images, in time and memory, and with the number of tensors."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.process import run_process
from benchmarks.results import Entry, Findings, Table, Target
from benchmarks.setting import BATCH, Setting
from benchmarks.timing import in_turns, spread, timed
from calib.calibrator import find_thresholds
from calib.collect import collect
from calib.network import Network
from calib.tracing import trace
from data.base import ImageSet

COUNTS = (50, 500, 5000, 50000)
TRIAL_COUNTS = (50, 100, 200)
TENSORS = (10, 20, 40, 60)
CHANNELS, SIDE = 8, 14
LINEAR = 1.25
"""Cost grows linearly where the cost of one does not grow by more than this factor."""
RESET = Path("/proc/self/clear_refs")
"""Writing 5 lets Linux count a process's peak memory anew (proc(5))."""

METHOD = (
    f"Images come in batches of {BATCH}, gathered from the training file as they are needed, and repeat where there "
    "are fewer. The memory is by how much the peak of a process of its own, which holds network and data, "
    "exceeds what it held before. The networks of several sizes are chains of 3x3 convolutions of 8 channels with "
    "in-place ReLU on 14x14 random images, so that nearly every tensor is of one size; 10 batches of 50."
)


def run(setting: Setting) -> Findings:
    """See the module."""
    images, targets = _by_images(setting)
    tensors, target = _by_tensors(setting)
    return Findings(METHOD, [images, tensors], [*targets, target])


def _by_images(setting: Setting) -> tuple[Table, list[Target]]:
    network, source = setting.network, setting.data.train_file
    counts = TRIAL_COUNTS if setting.quick else COUNTS
    rounds = setting.rounds(5)
    seconds = in_turns(
        {str(count): timed(_calibration(network, source, count)) for count in counts},
        rounds,
        {str(counts[-1]): min(2, rounds)},
    )
    entries, per_image = [], []
    peaks = [_peak_in_a_process_of_its_own(setting, count) for count in counts]
    for count, peak in zip(counts, peaks, strict=True):
        measured = spread(seconds[str(count)])
        per_image.append(1e6 * measured.median / count)
        memory = "not measured" if peak is None else peak
        entries.append(
            Entry(f"{count:,} images", measured, figures={"µs per image": per_image[-1], "peak memory, MiB": memory})
        )
    few, many = f"{counts[1]:,}", f"{counts[-1]:,}"
    growth = None if peaks[1] is None or peaks[-1] is None else peaks[-1] - peaks[1]
    targets = [
        Target(
            f"calibration, time per image: {many} images against {few}",
            "at most",
            LINEAR,
            "",
            per_image[-1] / per_image[1],
        ),
        Target(
            f"calibration, peak memory of {many} images beyond that of {few}",
            "at most",
            32.0,
            "MiB",
            growth,
            "" if growth is not None else "this system does not tell the peak",
        ),
    ]
    return Table(f"calibration of {network.name}, by the number of images", "s", entries), targets


def _calibration(network: Network, source: ImageSet, count: int) -> Callable[[], object]:
    def batches() -> Iterator[Tensor]:
        for start in range(0, count, BATCH):
            yield source.images(torch.arange(start, start + BATCH) % len(source))

    return lambda: find_thresholds(collect(network, batches()))


def _by_tensors(setting: Setting) -> tuple[Table, Target]:
    images = torch.rand(setting.images(500), 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    sizes = TENSORS[:2] if setting.quick else TENSORS
    networks = {count: chain(count) for count in sizes}
    searches: dict[int, list[float]] = {count: [] for count in sizes}

    def calibration(count: int) -> Callable[[], float]:
        def measure() -> float:
            begin = time.perf_counter()
            found = find_thresholds(collect(networks[count], images.split(BATCH)))
            seconds = time.perf_counter() - begin
            searches[count].append(found.post_seconds)
            return seconds

        return measure

    rounds = setting.rounds(5)
    seconds = in_turns({str(count): calibration(count) for count in sizes}, rounds, warm_up=not setting.quick)
    entries, per_tensor = [], []
    for count in sizes:
        measured = spread(seconds[str(count)])
        per_tensor.append(1e3 * measured.median / count)
        search = statistics.median(searches[count][-rounds:])
        entries.append(
            Entry(f"{count} tensors", measured, figures={"of it search, s": search, "ms per tensor": per_tensor[-1]})
        )
    target = Target(
        f"calibration, time per tensor: {sizes[-1]} tensors against {sizes[0]}",
        "at most",
        LINEAR,
        "",
        per_tensor[-1] / per_tensor[0],
    )
    return Table("calibration of 500 images, by the number of tensors", "s", entries), target


def chain(tensors: int) -> Network:
    """A network of so many tensors: ``data``, convolutions with ReLU, a linear layer and ``prob``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for index in range(tensors - 3):
            convolution = nn.Conv2d(CHANNELS if index else 1, CHANNELS, 3, padding=1)
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
            layers += [convolution, nn.ReLU(inplace=True)]
        layers += [nn.Flatten(), nn.Linear(CHANNELS * SIDE * SIDE, 10), nn.Softmax(1)]
        network = trace(nn.Sequential(*layers), f"Chain{tensors}")
    assert len(network.tensors) == tensors
    return network


def _peak_in_a_process_of_its_own(setting: Setting, count: int) -> float | None:
    """MiB by which calibration raises the peak memory of a process that holds network and data alone.

    None where the system has no ``/proc`` to tell it.

    Raises:
        InputError: the process failed.
    """
    if not RESET.exists():
        return None
    line = [sys.executable, "-m", __name__, str(setting.artifacts.absolute()), str(int(setting.quick)), str(count)]
    return float(run_process(f"the calibration of {count} images in a process of its own", line).stdout)


def main(artifacts: str, quick: str, count: str) -> None:
    """Print what :func:`_peak_in_a_process_of_its_own` returns."""
    setting = Setting(Path(artifacts), bool(int(quick)))
    run_calibration = _calibration(setting.network, setting.data.train_file, int(count))
    RESET.write_text("5")
    before = _status("VmRSS")
    run_calibration()
    print((_status("VmHWM") - before) / 1024)


def _status(key: str) -> int:
    """A line of this process's status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[key].split()[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
