"""IInt8EntropyCalibrator2: the range whose INT8 distribution diverges least from the values'."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from calib.algorithms.base import Algorithm, Threshold

if TYPE_CHECKING:
    import torch

    from calib.histogram.base import AbsHistogram


def find(histograms: Sequence[AbsHistogram], device: torch.device | None) -> Iterator[Threshold]:
    """The thresholds by the entropy search."""
    from calib.algorithms.search import search

    return search(histograms, device)


ALGORITHM = Algorithm(header="EntropyCalibration2", tensorrt="ENTROPY_CALIBRATION_2", find=find)
