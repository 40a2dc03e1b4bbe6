"""Counting on the CPU in C, compiled when first used, where this machine has a C compiler."""

from __future__ import annotations

import ctypes
import logging
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.histogram.base import BINS

logger = logging.getLogger(__name__)

_LANES = 2
"""Sets of counters, which values take turns between: a counter need not wait for its last increment."""

SOURCE = rf"""
#include <stdint.h>
#include <string.h>

#define BINS {BINS}
#define COUNTERS (2 * BINS + 1)
#define LANES {_LANES}
#define PIECE 1024

/* Adds values, fewer than 2^32, to counts[0][BINS + 1] by trunc(|value| * factor), at most BINS, and what a ReLU makes
   of them to counts[1][BINS + 1]. Gives the bits of the largest magnitude and of the largest value: without its sign,
   the bits of a float are in the order of magnitudes; NaN comes last. */
void count(const float *values, int64_t size, float factor, int64_t *counts, int32_t *largest)
{{
    int64_t *magnitudes = counts, *rectified = counts + BINS + 1;
    uint32_t lanes[LANES][COUNTERS];
    int32_t bins[PIECE], magnitude = 0, most = 0;
    memset(lanes, 0, sizeof lanes);
    for (int64_t start = 0; start < size; start += PIECE) {{
        const float *piece = values + start;
        const int length = size - start < PIECE ? (int)(size - start) : PIECE;
        for (int i = 0; i < length; ++i) {{  /* becomes vector instructions, unlike the next loop */
            int32_t bits;
            memcpy(&bits, piece + i, sizeof bits);
            const int32_t absolute = bits & 0x7fffffff;
            magnitude = absolute > magnitude ? absolute : magnitude;
            most = bits > most ? bits : most;
            float scaled = piece[i] * factor;
            scaled = scaled > -BINS ? scaled : -BINS;  /* what NaN becomes, too */
            scaled = scaled < BINS ? scaled : BINS;
            bins[i] = (int32_t)scaled + BINS;
        }}
        int i = 0;
        for (; i + LANES <= length; i += LANES)
            for (int lane = 0; lane < LANES; ++lane)
                ++lanes[lane][bins[i + lane]];
        for (; i < length; ++i)
            ++lanes[0][bins[i]];
    }}
    for (int lane = 0; lane < LANES; ++lane) {{
        const uint32_t *zero = lanes[lane] + BINS;
        magnitudes[0] += zero[0];
        rectified[0] += zero[0];
        for (int bin = 1; bin <= BINS; ++bin) {{
            magnitudes[bin] += (int64_t)zero[bin] + zero[-bin];
            rectified[bin] += zero[bin];
            rectified[0] += zero[-bin];
        }}
    }}
    largest[0] = magnitude;
    largest[1] = most;
}}
"""

_OPTIONS = ("-O3", "-march=native", "-fno-trapping-math", "-shared", "-fPIC")
"""Without traps to care for, comparisons of floats are vector instructions as well."""

Counter = Callable[[NDArray[np.float32], np.float32, NDArray[np.int64]], tuple[float, float]]
"""Adds to the first row of int64 [2, 2049] how many values of a row without gaps lie in each bin trunc(abs(value) *
factor), and to the second one how many do of what a ReLU makes of them. Returns the largest magnitude, NaN if a value
is, and the largest value, at least 0. The bins are right where values lie in the range."""


@cache
def native_counter() -> Counter | None:
    """The compiled counter; None where there is no C compiler, or none whose code counts as NumPy does."""
    try:
        counter = _compiled()
    except (OSError, subprocess.SubprocessError) as error:
        logger.debug("no C compiler works here, which makes calibration slower: %s", error)
        return None
    values = np.linspace(-1.5, 1.25, 20_011, dtype=np.float32)
    factor, found = np.float32(BINS / 1.5), np.zeros((2, BINS + 1), np.int64)
    extremes = counter(values, factor, found)
    both = (np.abs(values), values.clip(0))
    wanted = [np.bincount((one * factor).astype(np.int64), minlength=BINS + 1) for one in both]
    if extremes == (1.5, 1.25) and np.array_equal(found, wanted):
        return counter
    logger.warning("what the C compiler makes of the counting of histograms counts wrongly: NumPy counts, more slowly")
    return None


def _compiled() -> Counter:
    """The counter in C.

    Raises:
        OSError: there is no compiler, or its library cannot be loaded.
        subprocess.SubprocessError: it does not compile.
    """
    with tempfile.TemporaryDirectory() as name:
        source, library = Path(name, "count.c"), Path(name, "count.so")
        source.write_text(SOURCE, encoding="ascii")
        line = [*shlex.split(os.environ.get("CC", "cc")), *_OPTIONS, str(source), "-o", str(library)]
        subprocess.run(line, check=True, capture_output=True, timeout=60)
        run = ctypes.CDLL(str(library)).count
    run.restype = None
    run.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p, ctypes.c_void_p]
    pair = ctypes.c_float * 2

    def count(values: NDArray[np.float32], factor: np.float32, counts: NDArray[np.int64]) -> tuple[float, float]:
        largest = pair()
        run(_address(values), values.size, factor, _address(counts), largest)
        return largest[0], largest[1]

    return count


def _address(array: NDArray[Any]) -> int:
    """Where an array's values begin: ``array.ctypes.data`` in a third of its time, in which Python's lock is held."""
    address: int = array.__array_interface__["data"][0]
    return address
