"""Data sets: found, checked, and given out in batches.

``open_data`` opens what the configuration names; the rest of the project sees :class:`ImageData`,
:class:`DatasetInfo` and image sets. What needs Lightning is imported at first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from data.base import DatasetInfo, ImageSet, Preprocessing, batches
from data.tensor import TensorImages

if TYPE_CHECKING:
    from data.module import ImageData
    from data.sources import open_data

__all__ = ["DatasetInfo", "ImageData", "ImageSet", "Preprocessing", "TensorImages", "batches", "open_data"]


def __getattr__(name: str) -> Any:
    if name == "ImageData":
        from data.module import ImageData

        return ImageData
    if name == "open_data":
        from data.sources import open_data

        return open_data
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
