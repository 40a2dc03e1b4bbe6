"""Calibration: histograms -> thresholds -> scales -> calibration table.

``from calib import CalibrationTable, calibrate, plan_int8, trace``. All but the table need torch and are imported when
asked for, so that the table tools (``python -m calib``) start at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from calib.table import CalibrationTable

if TYPE_CHECKING:
    from calib.calibrator import calibrate
    from calib.plan import plan_int8
    from calib.tracing import trace

__all__ = ["CalibrationTable", "calibrate", "plan_int8", "trace"]


def __getattr__(name: str) -> Any:
    if name == "calibrate":
        from calib.calibrator import calibrate

        return calibrate
    if name == "plan_int8":
        from calib.plan import plan_int8

        return plan_int8
    if name == "trace":
        from calib.tracing import trace

        return trace
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
