"""IInt8LegacyCalibrator with a regression cutoff of 1, which sampleINT8 has.

TensorRT's rule for a smaller cutoff is not known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from calib.algorithms.base import Algorithm, Option, each

if TYPE_CHECKING:
    from calib.histogram.base import AbsHistogram


def _end(histogram: AbsHistogram, quantile: float) -> float:
    """Upper end of the first bin at which the cumulative share of the values exceeds ``quantile``, of all bins else.

    The shares are summed in float64, as TensorRT sums them, and the end is not limited to the maximum.
    """
    shares = (histogram.counts / histogram.total).cumsum()
    last = min(int(shares.searchsorted(quantile, side="right")), len(shares) - 1)
    return float((last + 1) * histogram.range / len(shares))


ALGORITHM = Algorithm(
    header="LegacyCalibration",
    tensorrt="LEGACY_CALIBRATION",
    after_fusion=True,
    concatenations=False,
    parameters_in_header=True,
    find=each(_end),
    options=(Option("quantile", 0.9999, 1, "Share of the values that stay in range (``legacy``), as a fraction."),),
)
