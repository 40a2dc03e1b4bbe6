"""The latency harness, on a clock that only the networks under measurement move."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from data.base import Preprocessing
from data.tensor import TensorImages
from engines.base import Compiled
from evaluation import latency
from evaluation.latency import measure_latency, summarise


class Clock:
    """Time that passes only when ``spend`` is called."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    result = Clock()
    monkeypatch.setattr(latency, "time", result)
    return result


def source(count: int = 6) -> TensorImages:
    pixels = torch.arange(count, dtype=torch.uint8).reshape(count, 1, 1, 1).expand(count, 1, 2, 2).clone()
    return TensorImages(pixels, torch.zeros(count, dtype=torch.int64), Preprocessing(1, 2, 2, scale=1.0))


def network(clock: Clock, seconds: float, calls: list[str], name: str, note: str | None = None) -> Compiled:
    def run(images: Tensor) -> Tensor:
        calls.append(name)
        clock.now += seconds * len(images)
        return images.flatten(1)

    return Compiled(name, "fp32", "CPU", run, 1, latency_note=note)


def test_medians_speed_up_and_rates(clock: Clock) -> None:
    calls: list[str] = []
    networks = [network(clock, 0.004, calls, "slow"), network(clock, 0.001, calls, "fast")]

    slow, fast = measure_latency(networks, source(), [1, 4], 0.1, 10)

    assert [entry.batch_size for entry in slow] == [1, 4]
    assert slow[0].compute.median == pytest.approx(4)
    assert slow[1].compute.median == pytest.approx(16)
    assert slow[1].compute.per_image == pytest.approx(4)
    assert slow[1].compute.images_per_second == pytest.approx(250)
    assert slow[0].speedup is None
    assert fast[1].speedup == pytest.approx(4)
    assert fast[0].end_to_end is None


def test_a_slowdown_of_the_machine_leaves_the_ratio_as_it_is(clock: Clock) -> None:
    def drifting(name: str, factor: float) -> Compiled:
        def run(images: Tensor) -> Tensor:
            clock.now += factor * (0.001 if clock.now < 2.0 else 0.002)
            return images.flatten(1)

        return Compiled(name, "fp32", "CPU", run, 1)

    _, other = measure_latency([drifting("a", 1.0), drifting("b", 2.0)], source(), [1], 2.0, 10)

    assert other[0].speedup == pytest.approx(0.5, rel=0.01)


def test_enough_runs_and_enough_seconds(clock: Clock) -> None:
    calls: list[str] = []
    quick, slow = network(clock, 0.0001, calls, "quick"), network(clock, 0.02, calls, "slow")

    first, second = measure_latency([quick, slow], source(), [1], 0.1, 30)

    assert first[0].compute.runs * 0.0001 > 0.09
    assert second[0].compute.runs >= 30


def test_a_network_that_is_far_too_slow_is_given_up_early(clock: Clock) -> None:
    (entry,) = measure_latency([network(clock, 1.0, [], "glacial")], source(), [1], 0.1, 1000)[0]

    assert entry.compute.runs == latency.LEAST_RUNS


def test_a_latency_that_says_nothing_takes_little_time_and_has_no_speed_up(clock: Clock) -> None:
    calls: list[str] = []
    networks = [network(clock, 0.1, calls, "real"), network(clock, 0.1, calls, "simulated", "simulated")]

    real, simulated = measure_latency(networks, source(), [1], 0.2, 20)

    assert real[0].compute.runs >= 20
    assert simulated[0].compute.runs == latency.LEAST_RUNS
    assert simulated[0].speedup is None


def test_a_batch_larger_than_the_set_repeats_its_images(clock: Clock) -> None:
    seen: list[Tensor] = []

    def run(images: Tensor) -> Tensor:
        clock.now += 0.01
        seen.append(images)
        return images.flatten(1)

    measure_latency([Compiled("a", "fp32", "CPU", run, 1)], source(3), [7], 0.01, 5)

    assert seen[0].shape == (7, 1, 2, 2)
    assert seen[0][:, 0, 0, 0].tolist() == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize(
    "error", [torch.cuda.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: out of memory")]
)
def test_a_full_gpu_costs_the_latency_of_that_batch_size_alone(
    error: RuntimeError, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    def run(images: Tensor) -> Tensor:
        if len(images) == 4:
            raise error
        clock.now += 0.001
        return images.flatten(1)

    full = Compiled("full", "int8", "GPU", run, 1)
    found = measure_latency([network(clock, 0.004, [], "other"), full], source(), [1, 4, 2], 0.1, 10)
    assert [[entry.batch_size for entry in entries] for entries in found] == [[1, 2], [1, 2]]
    assert found[1][1].speedup == pytest.approx(8)
    assert caplog.messages == ["no latency at batch 4: GPU 0 has no memory left, end what else uses it"]


def test_percentiles_are_numpys() -> None:
    times = torch.rand(137, dtype=torch.float64).mul(10).tolist()

    timing = summarise(times, 8)

    assert (timing.median, timing.p90, timing.p99) == pytest.approx(np.percentile(times, [50, 90, 99]))
    assert timing.runs == 137
    assert timing.images_per_second == pytest.approx(8000 / timing.median)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1, 64])
def test_on_a_gpu_events_time_the_launches_and_copies_come_on_top(size: int) -> None:
    device = torch.device("cuda")
    weight = torch.randn(4, 2048, device=device)
    work = torch.randn(1024, 1024, device=device)
    streams: set[int] = set()

    def forward(factor: int) -> Callable[[Tensor], Tensor]:
        def on_device(images: Tensor) -> Tensor:
            streams.add(torch.cuda.current_stream(device).cuda_stream)
            result = images.flatten(1) @ weight
            for _ in range(20 * factor):
                result = result + (work @ work)[0, 0] * 0
            return result

        return on_device

    networks = [
        Compiled("gpu", "fp32", "GPU", lambda x: x, 1, run_on_device=forward(2)),
        Compiled("gpu", "fp16", "GPU", lambda x: x, 1, run_on_device=forward(1)),
    ]

    slow, fast = measure_latency(networks, source(100), [size], 0.2, 50)

    assert torch.cuda.default_stream(device).cuda_stream not in streams
    assert fast[0].compute.runs >= latency.GPU_RUNS
    assert fast[0].speedup is not None
    assert fast[0].speedup > 1.2
    assert slow[0].end_to_end is not None
    assert slow[0].end_to_end.median > slow[0].compute.median


def test_what_cannot_be_captured_is_timed_by_calls_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(images: Tensor) -> Callable[[], Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    compiled = Compiled("torch-tensorrt", "fp16", "GPU", lambda images: images, 1, captured=refuse)
    assert latency._replay(compiled, torch.zeros(8, 1)) is None
    assert "torch-tensorrt fp16 at batch 8 is timed by calls" in caplog.text
    assert "not permitted when stream is capturing" in caplog.text


def test_what_is_captured_is_replayed() -> None:
    compiled = Compiled("torch-tensorrt", "fp16", "GPU", lambda images: images, 1, captured=lambda images: images.sum)
    replay = latency._replay(compiled, torch.ones(3))
    assert replay is not None
    assert replay() == 3
    assert latency._replay(Compiled("torch", "fp32", "CPU", lambda images: images, 1), torch.ones(3)) is None
