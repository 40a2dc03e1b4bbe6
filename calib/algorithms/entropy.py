"""IInt8EntropyCalibrator, the first version: the search of ``entropy2``, but TensorRT calibrates after layer fusion."""

from __future__ import annotations

from calib.algorithms import entropy2
from calib.algorithms.base import Algorithm

ALGORITHM = Algorithm(
    header="EntropyCalibration", tensorrt="ENTROPY_CALIBRATION", after_fusion=True, find=entropy2.find
)
