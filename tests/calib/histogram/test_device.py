"""Histograms counted on their device, and shared by processes: the counts of ``AbsHistogram``, to the last one."""

import ctypes
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, distributed, nn

from calib.calibrator import calibrate
from calib.collect import collect
from calib.histogram import cuda as cuda_histogram
from calib.histogram import device as device_histogram
from calib.histogram.base import SMALLEST, AbsHistogram
from calib.histogram.counters import Counter, CpuCounter, Tallies, TorchCounter
from calib.histogram.cuda import COUNT, ENTER, CudaCounter
from calib.histogram.device import DeviceHistograms
from calib.tracing import trace
from common.errors import InputError
from common.processes import collective

CPU = torch.device("cpu")
VALUES = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(-1e3, 1e3, width=32),
    st.sampled_from([0.0, 1.0, 2.0, -4.0, 8.0, SMALLEST, SMALLEST / 2]),
)
BATCHES = st.lists(st.lists(VALUES, max_size=30), min_size=1, max_size=6)


def state(histogram: AbsHistogram) -> tuple[float, float, list[int]]:
    return histogram.range, histogram.maximum, histogram.counts.tolist()


def assert_counts_are_equal(batches: list[Tensor], device: torch.device = CPU) -> None:
    bank, expected = DeviceHistograms(["a"], device), AbsHistogram()
    for batch in batches:
        expected.add(batch)
        bank.add("a", batch.to(device))
        bank.end_batch()
    assert state(bank.finish()[0]["a"]) == state(expected)


def difficult() -> list[list[Tensor]]:
    """Batches of all magnitudes: zeros, values at the range, ranges that double, subnormal values."""
    random = np.random.default_rng(0)
    cases = []
    for _ in range(20):
        scale, batches = 10.0 ** random.integers(-44, 30), []
        for _ in range(random.integers(1, 5)):
            values = random.normal(size=random.integers(1, 3000)) * scale * 10.0 ** random.integers(0, 4)
            kind = random.random()
            values = (
                values * 0 if kind < 0.2 else np.full(9, scale * 2.0 ** random.integers(3)) if kind < 0.5 else values
            )
            batches.append(torch.from_numpy(np.clip(values, -3e38, 3e38).astype(np.float32)))
        cases.append(batches)
    return cases


@given(BATCHES)
def test_counts_as_one_histogram_does(batches: list[list[float]]) -> None:
    assert_counts_are_equal([torch.tensor(batch, dtype=torch.float32) for batch in batches])


def test_counts_difficult_batches_as_one_histogram_does() -> None:
    for batches in difficult():
        assert_counts_are_equal(batches)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_counts_halves_and_any_layout(dtype: torch.dtype) -> None:
    values = torch.randn(3, 4, 5, 6).to(dtype)
    assert_counts_are_equal(
        [values, 3 * values.permute(3, 0, 2, 1), values.contiguous(memory_format=torch.channels_last)]
    )


def test_other_dtypes_and_other_names() -> None:
    bank = DeviceHistograms(["a"], CPU)
    with pytest.raises(TypeError, match="float64"):
        bank.add("a", torch.zeros(3, dtype=torch.float64))
    bank.add("b", torch.ones(3))
    bank.end_batch()
    assert bank.finish()[0]["a"].total == 0


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinity")])
def test_values_that_are_not_finite_are_refused_with_their_batch(value: float, word: str) -> None:
    bank = DeviceHistograms(["a", "b"], CPU)
    for last in (1.0, value):
        bank.add("a", torch.ones(3))
        bank.add("b", torch.tensor([0.5, last]))
        bank.end_batch()
    with pytest.raises(InputError, match=f"calibration batch 2, tensor b: the values hold {word}"):
        bank.finish()


CUDA_ON_THE_CPU = """
#include <cmath>
#include <cstring>
#define __global__
#define __device__
#define __shared__ static
struct float4 { float x, y, z, w; };
static struct { int x; } threadIdx, blockIdx, blockDim = {1}, gridDim;
static void __syncthreads() {}
static unsigned __shfl_xor_sync(unsigned, unsigned value, int) { return value; }
static void atomicAdd(int* to, int value) { *to += value; }
static void atomicMax(unsigned* to, unsigned value) { if (*to < value) *to = value; }
static float __uint_as_float(unsigned bits) { float value; memcpy(&value, &bits, 4); return value; }
static unsigned __float_as_uint(float value) { unsigned bits; memcpy(&bits, &value, 4); return bits; }
%s
#define OF(type, n) (*(type*)of[n])
extern "C" void launch(int blocks, void** of)
{
    gridDim.x = blocks;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) %s;
}
"""
"""A kernel as C++, blocks of one thread one after the other: its arithmetic, not its concurrency."""

CALLS = {
    COUNT: "count(OF(float*, 0), OF(int, 1), OF(int, 2), OF(double*, 3), OF(unsigned*, 4), OF(int*, 5), OF(int, 6))",
    ENTER: "enter(OF(double*, 0), OF(double*, 1), OF(long long*, 2), OF(unsigned*, 3), OF(int*, 4), "
    "OF(unsigned char*, 5), OF(double*, 6))",
}


@pytest.fixture(scope="module")
def launcher_on_the_cpu(tmp_path_factory: pytest.TempPathFactory) -> type[cuda_histogram.Launcher]:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++ to compile the kernels with")
    folder = tmp_path_factory.mktemp("kernel")
    kernels = {}
    for name, source in (("count", COUNT), ("enter", ENTER)):
        (folder / f"{name}.cpp").write_text(CUDA_ON_THE_CPU % (source, CALLS[source]))
        options = ["-O1", "-ffp-contract=off", "-shared", "-fPIC", "-o", folder / f"{name}.so"]
        subprocess.run([compiler, *options, folder / f"{name}.cpp"], check=True)
        kernels[name] = ctypes.CDLL(str(folder / f"{name}.so")).launch

    class LauncherOnTheCPU(cuda_histogram.Launcher):
        def __init__(self, device: torch.device) -> None:
            self.blocks = 3

        def launch(self, kernel: str, blocks: int, arguments: cuda_histogram.Arguments) -> None:
            kernels[kernel](blocks, arguments.packed)

    return LauncherOnTheCPU


def assert_counters_agree(launcher: type[cuda_histogram.Launcher], batches: list[Tensor]) -> None:
    """They have the same state after each batch; the second tensor is late: only its maxima count."""
    with mock.patch.object(cuda_histogram, "Launcher", launcher):
        found = []
        for kind in (TorchCounter, CpuCounter, CudaCounter):
            tallies = Tallies(2, CPU)
            tallies.late[1] = True
            counter: Counter = kind(tallies)
            states = []
            for batch in batches:
                record = torch.empty(2, 2, dtype=torch.float64)
                for tensor in range(2):
                    counter.count(tensor, batch, maximum_alone=tensor == 1)
                counter.enter(record)
                # Bin 0 may be left out.
                parts = (tallies.base, tallies.ranges, tallies.counts[:, 1:], record, tallies.largest, tallies.batch)
                states.append([part.tolist() for part in parts])
            found.append(states)
    assert found[0] == found[1] == found[2]


@given(BATCHES)
@settings(max_examples=30)
def test_all_counters_count_alike(
    launcher_on_the_cpu: type[cuda_histogram.Launcher], batches: list[list[float]]
) -> None:
    assert_counters_agree(launcher_on_the_cpu, [torch.tensor(batch) for batch in batches if batch])


def test_all_counters_count_difficult_batches_alike(launcher_on_the_cpu: type[cuda_histogram.Launcher]) -> None:
    odd = torch.randn(5000)
    for batches in [*difficult(), [odd.half(), odd[1:], 9 * odd[:70]]]:
        assert_counters_agree(launcher_on_the_cpu, batches)


class Dying(nn.Module):
    """A network whose ReLU gives zeros alone for images of small values."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 3, 3, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(images) - 2.5)).mean((2, 3))  # type: ignore[no-any-return]


def images(count: int) -> list[Tensor]:
    """Batches of which the first two leave ``Dying``'s ReLU at zero, with a value that equals a doubled range.

    The ninth exceeds the range more than 2048-fold.
    """
    generator = torch.Generator().manual_seed(3)
    found = [torch.randn(4, 1, 12, 12, generator=generator) * (0.2 if n < 2 else 1.7 ** (n % 5)) for n in range(count)]
    for number in range(3, count, 3):
        found[number][0, 0, 0, 0] = 2.0 ** (number // 3) * found[0].abs().max()
    for batch in found[8:9]:
        batch *= 1e5
    return found


def share(rank: int, processes: int, folder: str) -> None:
    """In a process of its own: shared histograms are those of one process, and one's error ends all."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    group = distributed.group.WORLD
    network = trace(Dying())
    for count in (1, 11):
        alone, shared = collect(network, images(count)), collect(network, images(count), process_group=group)
        assert {name: state(one) for name, one in shared.of.items()} == {
            name: state(one) for name, one in alone.of.items()
        }
        assert shared.images == alone.images
    assert calibrate(network, images(5), process_group=group) == calibrate(network, images(5))
    with pytest.raises(InputError, match="not a generator"):
        collect(network, iter(images(3)), process_group=group)
    for broken in (0, 1, processes):
        batches = images(processes + 1)
        batches[broken][0, 0, 0, 0] = float("nan")
        mine = broken % processes == rank
        message = f"batch {broken + 1}, tensor data: the values hold NaN" if mine else "another process ended"
        with pytest.raises(InputError, match=message):
            collect(network, batches, process_group=group)
    with pytest.raises(InputError, match="at least one batch"):
        collect(network, [], process_group=group)
    if rank < processes - 1:  # the last one has ended
        with pytest.raises(InputError, match="another process ended"), collective():
            distributed.all_reduce(torch.zeros(1), group=group)
    distributed.destroy_process_group()


def test_three_processes_give_the_table_of_one(tmp_path: Path) -> None:
    # Forked from one process that has imported this file.
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    torch.multiprocessing.start_processes(  # type: ignore[no-untyped-call]
        share, (3, str(tmp_path)), nprocs=3, start_method="forkserver"
    )


def test_late_tensors_are_in_the_test() -> None:
    histograms = collect(trace(Dying()), images(11)).of
    assert histograms["relu"].range > 0
    assert collect(trace(Dying()), images(1)).of["relu"].range == 0


@pytest.mark.gpu
@pytest.mark.parametrize("counter", [CudaCounter, TorchCounter])
def test_gpu_counts_difficult_batches_as_the_cpu_does(
    counter: type[CudaCounter | TorchCounter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_histogram, "_gpu_counter", lambda index: counter)
    for batches in [*difficult(), [torch.randn(3_000_000), 5 * torch.randn(70_001)]]:
        assert_counts_are_equal(batches, torch.device("cuda", 0))


@pytest.mark.gpu
def test_the_kernel_compiles(caplog: pytest.LogCaptureFixture) -> None:
    assert device_histogram._gpu_counter(0) is CudaCounter
    assert not caplog.messages


@pytest.mark.gpu
def test_gpu_calibrates_as_the_cpu_does() -> None:
    ours = calibrate(trace(Dying()), images(9))
    gpu = calibrate(trace(Dying().cuda()), images(9))
    assert gpu.scales == pytest.approx(ours.scales, rel=1e-2)
