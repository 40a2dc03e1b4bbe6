"""Data sets: found, checked, and given out in batches.

``open_splits`` opens what the configuration names, ``open_data`` with the loaders for training; the rest of the
project sees :class:`Splits` or :class:`ImageData`, :class:`DatasetInfo` and image sets. What needs Lightning is
imported at first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from data.base import DatasetInfo, ImageSet, Preprocessing, batches
from data.splits import Splits
from data.tensor import TensorImages

if TYPE_CHECKING:
    from data.module import ImageData
    from data.sources import open_data, open_splits

__all__ = [
    "DatasetInfo",
    "ImageData",
    "ImageSet",
    "Preprocessing",
    "Splits",
    "TensorImages",
    "batches",
    "open_data",
    "open_splits",
]


def __getattr__(name: str) -> Any:
    if name == "ImageData":
        from data.module import ImageData

        return ImageData
    if name in ("open_data", "open_splits"):
        from data import sources

        return getattr(sources, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
