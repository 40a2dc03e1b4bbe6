"""The range that a share of all values lies in. TensorRT does not have it: its table reads back as ``minmax``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calib.algorithms.base import Algorithm, Option, each

if TYPE_CHECKING:
    from calib.histogram.base import AbsHistogram


def _quantile(histogram: AbsHistogram, percentile: float) -> float:
    """Upper end of the first bin up to which at least ``percentile`` % of all values lie, and at most the maximum."""
    cumulative = histogram.counts.cumsum()
    # 99.9 % of 1000 values are 999, however the product is rounded.
    wanted = percentile / 100 * cumulative[-1] * (1 - 1e-12)
    last = int(cumulative.searchsorted(wanted))
    return min((last + 1) * histogram.range / len(cumulative), histogram.maximum)


ALGORITHM = Algorithm(
    header="MinMaxCalibration",
    find=each(_quantile),
    options=(Option("percentile", 99.99, 100, "Share of the values that stay in range (``percentile``), in percent."),),
)
