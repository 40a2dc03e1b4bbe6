"""What a calibration algorithm is: a name for it, its options, and the function from histograms to thresholds.

Imports neither torch nor numpy: the command line and the table tools read the registry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from calib.histogram.base import AbsHistogram

MERGED_LEVELS = 128
"""Levels that the entropy search merges a candidate's bins into, the non-negative INT8 codes: so many bins has the
smallest candidate."""


@dataclass(frozen=True)
class Threshold:
    """Where a tensor saturates.

    Attributes:
        value: The threshold, rounded to float32 as TensorRT does before it divides: scale = value / 127. 0 if the
            tensor has no usable range (all values were zero).
        bin: Bins that the winning candidate keeps; None for algorithms that do not choose a bin.
        divergences: Of candidates 128 .. 2048, float64 [1921], infinite where the candidate is passed over; None for
            algorithms without a search.
    """

    value: float
    bin: int | None = None
    divergences: NDArray[np.float64] | None = field(default=None, repr=False, compare=False)

    def excess(self, value: float) -> float | None:
        """By what share the divergence of another threshold, ``value``, exceeds this one's.

        None where there was no search, or no candidate has that threshold.
        """
        if self.bin is None or self.divergences is None or not self.value:
            return None
        bins = value / self.value * (self.bin + 0.5) - 0.5
        kept = round(bins)
        if abs(bins - kept) > 0.01 or not 0 <= kept - MERGED_LEVELS < len(self.divergences):
            return None
        own, other = float(self.divergences[self.bin - MERGED_LEVELS]), float(self.divergences[kept - MERGED_LEVELS])
        return other / own - 1 if own > 0 and other < math.inf else None


@dataclass(frozen=True)
class Option:
    """A number that an algorithm takes: an option of the configuration and of ``python -m calib calibrate``.

    Attributes:
        name: As the function of :attr:`Algorithm.find` calls it; no other algorithm's option has it.
        default: Its value where none is given.
        largest: It lies in (0, largest].
        help: For the configuration's help.
    """

    name: str
    default: float
    largest: float
    help: str

    @property
    def range(self) -> str:
        """Such as ``(0, 100]``."""
        return f"(0, {self.largest:g}]"

    def allows(self, value: float) -> bool:
        """Whether ``value`` lies in the range."""
        return 0 < value <= self.largest


Find = Callable[..., Iterable[Threshold]]
"""``(histograms, device, **options)``: thresholds of histograms that are not all zero, in their order."""


@dataclass(frozen=True)
class Algorithm:
    """A calibration algorithm. Its name is that of its file.

    Attributes:
        header: How line 1 of the table calls it.
        find: Finds the thresholds; see :data:`Find` and :func:`each`.
        tensorrt: Its member of ``torch_tensorrt.ts.ptq.CalibrationAlgo``; None if TensorRT does not have it, whose
            ``header`` then is that of another algorithm, as which the table reads back.
        after_fusion: Whether TensorRT counts its values after it has fused layers, so that fewer tensors have entries.
        concatenations: Whether concatenations have entries then, and what is copied into them.
        parameters_in_header: Whether line 1 holds the algorithm's parameters in place of version and ``header``.
        options: The numbers that it takes.
    """

    header: str
    find: Find
    tensorrt: str | None = None
    after_fusion: bool = False
    concatenations: bool = True
    parameters_in_header: bool = False
    options: tuple[Option, ...] = ()


def each(value: Callable[..., float]) -> Find:
    """The function of an algorithm that looks at one histogram at a time.

    Args:
        value: ``(histogram, **options)``: the threshold, of any size; it is rounded to the nearest finite float32.
    """

    def find(histograms: Sequence[AbsHistogram], device: torch.device, **options: float) -> list[Threshold]:
        return [Threshold(to_float32(value(histogram, **options))) for histogram in histograms]

    return find


def to_float32(value: float) -> float:
    """The nearest float32; infinity beyond the largest one, as in TensorRT."""
    import numpy as np

    with np.errstate(over="ignore"):
        return float(np.float32(value))
