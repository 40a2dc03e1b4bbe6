"""TensorRT's calibration table: its text (``text``), other formats (``formats``) and the tools (``tools``).

The package gives what its text is made of. Imports neither torch nor numpy: the table tools start at once.
"""

from __future__ import annotations

from calib.table.text import (
    LEVELS,
    CalibrationTable,
    Legacy,
    Problem,
    Scan,
    parse,
    scale_from_hex,
    scale_to_hex,
    scan,
    why_unusable,
)
from calib.table.version import TESTED_TENSORRT, version_number, version_string

__all__ = [
    "LEVELS",
    "TESTED_TENSORRT",
    "CalibrationTable",
    "Legacy",
    "Problem",
    "Scan",
    "parse",
    "scale_from_hex",
    "scale_to_hex",
    "scan",
    "version_number",
    "version_string",
    "why_unusable",
]
