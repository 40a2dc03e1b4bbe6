"""The kernels that count histograms on an NVIDIA GPU, compiled when first used by NVRTC, which comes with PyTorch."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor

from calib.histogram.counters import Tallies

_RANGES = r"""extern "C" {
#define BINS 2048
#define COPIES 4

// The range, float64, that holds `most` as well: calib.histogram.base.grown. NaN and infinity are refused later.
static __device__ double widened(double range, double most)
{
    if (range == 0) return most;
    if (most > BINS * range && most < 1e39) return fmax(most, ceil(most / range) * range);
    while (most > range && most < 1e39) range *= 2;
    return range;
}
"""
"""In parentheses of ``extern "C"`` as a whole, which PyTorch would else put in front of the first declaration."""

COUNT = (
    _RANGES
    + r"""
struct Counter
{
    int* counts;
    float factor;
    unsigned most;

    // The bits of a float32 without its sign are in the order of magnitudes; NaN comes last.
    __device__ void add(float value)
    {
        const unsigned bits = __float_as_uint(value) & 0x7fffffff;
        most = most < bits ? bits : most;
        const int bin = (int)fminf(__uint_as_float(bits) * factor, BINS);
        // Bin 0, where a ReLU puts half of all values, is what remains of them.
        if (bin > 0 && bits >= 0x00800000) atomicAdd(counts + bin, 1);
    }
};

// Without `again`, raises largest[tensor] and counts by ranges[tensor] into out[tensor][0]. With it, where that range
// does not hold largest[tensor], counts by the range that does into out[tensor][1].
__global__ void count(const float* values, int size, int tensor, const double* ranges, unsigned* largest,
                                 int* out, int again)
{
    __shared__ int counts[COPIES * (BINS + 1)];
    __shared__ unsigned most;
    double range = ranges[tensor];
    if (again) {
        const double before = range;
        range = widened(range, __uint_as_float(largest[tensor]));
        if (range == before) return;
    }
    for (int i = threadIdx.x; i < COPIES * (BINS + 1); i += blockDim.x) counts[i] = 0;
    if (threadIdx.x == 0) most = 0;
    __syncthreads();

    // The factor of a tiny range is infinite.
    Counter counter = {counts + threadIdx.x % COPIES * (BINS + 1), range > 0 ? (float)(BINS / range) : 0.0f, 0u};
    const long long first = (long long)blockIdx.x * blockDim.x + threadIdx.x, step = (long long)gridDim.x * blockDim.x;
    const long long fours = (size_t)values % 16 ? 0 : size / 4;
    for (long long i = first; i < fours; i += step) {
        const float4 four = ((const float4*)values)[i];
        counter.add(four.x);
        counter.add(four.y);
        counter.add(four.z);
        counter.add(four.w);
    }
    for (long long i = 4 * fours + first; i < size; i += step) counter.add(values[i]);

    if (!again) {
        for (int other = 16; other > 0; other /= 2) {
            const unsigned found = __shfl_xor_sync(0xffffffff, counter.most, other);
            counter.most = counter.most < found ? found : counter.most;
        }
        if (threadIdx.x % 32 == 0) atomicMax(&most, counter.most);
    }
    __syncthreads();
    if (threadIdx.x == 0 && most >= 0x00800000) atomicMax(largest + tensor, most);
    int* mine = out + (2 * tensor + again) * (BINS + 1);
    for (int i = threadIdx.x; i < BINS + 1; i += blockDim.x) {
        int sum = 0;
        for (int copy = 0; copy < COPIES; ++copy) sum += counts[copy * (BINS + 1) + i];
        if (sum) atomicAdd(mine + i, sum);
    }
}
}
"""
)

ENTER = (
    _RANGES
    + r"""
// Ends a batch, in one block for each tensor: calib.histogram.counters.Counter.enter.
__global__ void enter(double* base, double* ranges, long long* counts, unsigned* largest, int* batch,
                      const unsigned char* late, double* record)
{
    __shared__ long long sums[BINS];
    const int tensor = blockIdx.x, tensors = gridDim.x;
    const double before = ranges[tensor], most = __uint_as_float(largest[tensor]);
    const double range = late[tensor] ? 0 : widened(before, most);
    int doublings = 0;
    for (double reached = before; reached > 0 && reached < range && doublings < 11; reached *= 2) ++doublings;
    long long* all = counts + (long long)tensor * BINS;
    int* both = batch + 2 * tensor * (BINS + 1);
    const int* added = both + (range == before ? 0 : BINS + 1);
    for (int i = threadIdx.x; i < BINS; i += blockDim.x) {
        long long sum = added[i];
        for (int bin = i << doublings; bin < BINS && bin < (i + 1) << doublings; ++bin) sum += all[bin];
        sums[i] = sum;
    }
    if (threadIdx.x == 0) {
        record[tensor] = most;
        record[tensors + tensor] = added[BINS];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < BINS; i += blockDim.x) all[i] = sums[i];
    for (int i = threadIdx.x; i < 2 * (BINS + 1); i += blockDim.x) both[i] = 0;
    if (threadIdx.x == 0) {
        if (before == 0) base[tensor] = range;
        ranges[tensor] = range;
        largest[tensor] = 0;
    }
}
}
"""
)

_THREADS = 1024
_BLOCKS_PER_PROCESSOR = 2
_VALUES_PER_BLOCK = 16 * _THREADS
"""At least; a block has its counters to clear and to add up as well."""


class CudaCounter:
    """Counts by kernels of its own; a ``calib.histogram.counters.Counter``.

    Raises:
        Exception: whatever the compiler or the driver raise; ``torch.cuda._compile_kernel`` may be missing.
    """

    def __init__(self, tallies: Tallies) -> None:
        self._gpu = Launcher(tallies.base.device)
        self._tensors = len(tallies.base)
        # What the pointers point to must not be freed.
        self._tallies = tallies
        ranges, largest, batch = map(_pointer, (tallies.ranges, tallies.largest, tallies.batch))
        self._values, self._size, self._tensor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
        of_count = (self._values, self._size, self._tensor, ranges, largest, batch)
        self._passes = tuple(Arguments(*of_count, ctypes.c_int(again)) for again in (0, 1))
        self._record = ctypes.c_void_p()
        base, counts, late = map(_pointer, (tallies.base, tallies.counts, tallies.late))
        self._end = Arguments(base, ranges, counts, largest, batch, late, self._record)

    def count(self, tensor: int, values: Tensor, *, maximum_alone: bool = False) -> None:
        """See ``calib.histogram.counters.Counter``."""
        values = values.float()
        size = values.numel()
        self._values.value, self._size.value, self._tensor.value = values.data_ptr(), size, tensor
        blocks = min(self._gpu.blocks, -(-size // _VALUES_PER_BLOCK))
        for arguments in self._passes[:1] if maximum_alone else self._passes:
            self._gpu.launch("count", blocks, arguments)

    def enter(self, record: Tensor) -> None:
        """See ``calib.histogram.counters.Counter``."""
        self._record.value = record.data_ptr()
        self._gpu.launch("enter", self._tensors, self._end)


class Arguments:
    """A kernel's arguments as the driver takes them, which reads their values at each launch."""

    def __init__(self, *values: ctypes.c_void_p | ctypes.c_int) -> None:
        self._values = values
        self.packed = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))


class Launcher:
    """Starts the kernels on the stream that is current when it is made.

    PyTorch's own way opens the driver's library at each call, which takes longer than LeNet's layers.

    Args:
        device: A GPU with its index; the current one at each launch.

    Attributes:
        blocks: How many keep the GPU busy.
    """

    def __init__(self, device: torch.device) -> None:
        with torch.cuda.device(device):
            self._functions = {name: _kernel(device.index, name).func for name in ("count", "enter")}
            self._stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self.blocks = _BLOCKS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
        self._start = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1").cuLaunchKernel

    def launch(self, kernel: str, blocks: int, arguments: Arguments) -> None:
        """Start a kernel, without waiting for it.

        Raises:
            RuntimeError: the driver refuses.
        """
        sizes = (blocks, 1, 1, _THREADS, 1, 1)
        error = self._start(self._functions[kernel], *sizes, 0, self._stream, arguments.packed, None)
        if error:
            raise RuntimeError(f"CUDA cannot start the kernel: error {error}")


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


@cache
def _kernel(index: int, name: str) -> Any:
    return torch.cuda._compile_kernel({"count": COUNT, "enter": ENTER}[name], name)
