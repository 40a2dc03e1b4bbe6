"""The calibration algorithms, one file each, and the thresholds that they find.

A file defines ``ALGORITHM``, and its name is the algorithm's. The configuration, the command lines, the table and
TensorRT read :data:`ALGORITHMS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING

from calib.algorithms.base import Algorithm, Option, Threshold
from common.errors import InputError

if TYPE_CHECKING:
    import torch

    from calib.histogram.base import AbsHistogram

__all__ = ["ALGORITHMS", "DEFAULT", "OPTIONS", "Algorithm", "Option", "Threshold", "threshold", "thresholds"]

_FILES = (
    "entropy2",
    "minmax",
    "percentile",
    "entropy",
    "legacy",
)

ALGORITHMS: Mapping[str, Algorithm] = MappingProxyType(
    {name: import_module(f"{__name__}.{name}").ALGORITHM for name in _FILES}
)
"""Name -> algorithm, in the order in which they are offered."""

DEFAULT = _FILES[0]
"""The algorithm where none is named, as in trtexec."""

OPTIONS: Mapping[str, Option] = MappingProxyType(
    {option.name: option for algorithm in ALGORITHMS.values() for option in algorithm.options}
)
"""Name -> option, of all algorithms."""


def threshold(histogram: AbsHistogram, algorithm: str = DEFAULT, **options: float) -> Threshold:
    """The threshold of one tensor: see :func:`thresholds`."""
    return thresholds([histogram], algorithm, device=None, **options)[0]


def thresholds(
    histograms: Sequence[AbsHistogram],
    algorithm: str = DEFAULT,
    *,
    device: torch.device | None = None,
    **options: float,
) -> list[Threshold]:
    """The thresholds of several tensors, each by itself.

    Args:
        histograms: One for each tensor, of its absolute values.
        algorithm: One of :data:`ALGORITHMS`.
        device: Where the entropy search runs (the CPU if None): it takes a GPU a millisecond for all tensors.
        options: Of any algorithm; what this one takes and is not given has its default.

    Returns:
        The thresholds in the same order; the value is 0 if all values were zero.

    Raises:
        InputError: unknown algorithm or option.
    """
    if algorithm not in ALGORITHMS:
        raise InputError(f"unknown calibration algorithm {algorithm!r}")
    for name in options.keys() - OPTIONS.keys():
        raise InputError(f"unknown option {name!r} of a calibration algorithm")
    chosen = ALGORITHMS[algorithm]
    taken = {option.name: options.get(option.name, option.default) for option in chosen.options}
    alive = [histogram for histogram in histograms if histogram.maximum > 0]
    found = iter(chosen.find(alive, device, **taken))
    return [next(found) if histogram.maximum > 0 else Threshold(0.0) for histogram in histograms]
