"""The kernel that counts histograms on an NVIDIA GPU, compiled when first used by NVRTC, which comes with PyTorch."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor

SOURCE = r"""extern "C" {
#define BINS 2048
#define COPIES 4

// The range, float64, that holds `most` as well: AbsHistogram.widen. NaN and infinity are refused later.
static __device__ double widened(double range, double most)
{
    if (range == 0) range = most;
    while (most > range && most < 1e39) range *= 2;
    return range;
}

struct Counter
{
    int* counts;
    float scale, factor;
    unsigned most;

    // The bits of a float32 without its sign are in the order of magnitudes; NaN comes last.
    __device__ void add(float value)
    {
        const unsigned bits = __float_as_uint(value) & 0x7fffffff;
        most = most < bits ? bits : most;
        const int bin = (int)(__uint_as_float(bits) * scale * factor);
        // Bin 0, where a ReLU puts half of all values, is what remains of them.
        if (bin > 0 && bits >= 0x00800000) atomicAdd(counts + (bin < BINS ? bin : BINS), 1);
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

    // 2048 / range must not overflow: 2048 * 2**-126 is where it could.
    const double scale = range < 2048 * 1.1754943508222875e-38 ? 18446744073709551616.0 : 1.0;
    Counter counter = {counts + threadIdx.x % COPIES * (BINS + 1), (float)scale,
                       range > 0 ? (float)(BINS / (range * scale)) : 0.0f, 0u};
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
"""In parentheses of ``extern "C"`` as a whole, which PyTorch would else put in front of the first declaration."""

_THREADS = 1024
_BLOCKS_PER_PROCESSOR = 2
_VALUES_PER_BLOCK = 16 * _THREADS
"""At least; a block has its counters to clear and to add up as well."""


class CudaCounter:
    """Counts into the tensors of a ``calib.device_histogram.Batch``.

    Args:
        ranges: float64 [T].
        largest: float32 [T].
        counts: int32 [T, 2, 2049].

    Raises:
        Exception: whatever the compiler or the driver raise; ``torch.cuda._compile_kernel`` may be missing.
    """

    def __init__(self, ranges: Tensor, largest: Tensor, counts: Tensor) -> None:
        self._device = ranges.device
        with torch.cuda.device(self._device):
            self._kernel = _kernel(self._device.index)
        self._blocks = _BLOCKS_PER_PROCESSOR * torch.cuda.get_device_properties(self._device).multi_processor_count
        self._tensors = (ranges, largest, counts)
        self._pointers = tuple(ctypes.c_void_p(tensor.data_ptr()) for tensor in self._tensors)

    def count(self, tensor: int, values: Tensor, *, maximum_alone: bool = False) -> None:
        """Count one tensor's values; see ``calib.device_histogram.Counter``."""
        values = values.float()
        size = values.numel()
        blocks = min(self._blocks, -(-size // _VALUES_PER_BLOCK))
        data, number, index = ctypes.c_void_p(values.data_ptr()), ctypes.c_int(size), ctypes.c_int(tensor)
        with torch.cuda.device(self._device):
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            for again in (0,) if maximum_alone else (0, 1):
                arguments = (data, number, index, *self._pointers, ctypes.c_int(again))
                packed = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
                sizes = (blocks, 1, 1, _THREADS, 1, 1)
                error = _driver().cuLaunchKernel(self._kernel.func, *sizes, 0, stream, packed, None)
                if error:
                    raise RuntimeError(f"CUDA cannot start the kernel: error {error}")


@cache
def _kernel(index: int) -> Any:
    # PyTorch's own way to call it opens the driver's library at each call, which takes longer than LeNet's layers.
    return torch.cuda._compile_kernel(SOURCE, "count")


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
