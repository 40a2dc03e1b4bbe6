"""IInt8MinMaxCalibrator: the absolute maximum over all batches; no value saturates."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calib.algorithms.base import Algorithm, each

if TYPE_CHECKING:
    from calib.histogram.base import AbsHistogram


def _maximum(histogram: AbsHistogram) -> float:
    return histogram.maximum


ALGORITHM = Algorithm(header="MinMaxCalibration", tensorrt="MINMAX_CALIBRATION", find=each(_maximum))
