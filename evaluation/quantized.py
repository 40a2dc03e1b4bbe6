"""What ``quantize.py`` made, as JSON and for people."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calib.algorithms import Threshold
from calib.calibrator import CalibrationResult
from calib.run_table import RunTable
from calib.table import LEVELS
from common.config import Config
from common.console import print_table
from common.macs import MacCount
from engines.base import Compiled, OwnCalibration
from engines.tensorrt.match import Pair, compare, made_by, short_name
from evaluation.subject import TrainedRun

_ROUNDING = 1e-5
"""Scales this close, relative to each other, differ by the rounding of the network's values."""


@dataclass(frozen=True)
class Quantized:
    """What ``quantize.py`` made.

    Attributes:
        trained: Of this network.
        config: By this configuration.
        compiled: The network in the precision that was asked for.
        reason: Why this engine runs it.
        table: The calibration table; None for another precision than INT8.
        own: The table that TensorRT made for itself, where it runs INT8 from that.
        macs: What is multiplied in INT8, where it was counted.
        files: ONNX files that were written.
    """

    trained: TrainedRun
    config: Config
    compiled: Compiled
    reason: str
    table: RunTable | None = None
    own: OwnCalibration | None = None
    macs: MacCount | None = None
    files: tuple[Path, ...] = ()

    def summary(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        compiled, network, dataset = self.compiled, self.trained.network, self.trained.meta.dataset
        summary: dict[str, Any] = {
            "run": self.config.run,
            "network": network.name,
            "traced_by": network.traced_by,
            "task": self.trained.purpose.task,
            "seed": self.config.seed,
            "dataset": dataset.name,
            "notes": list(dataset.notes),
            "precision": compiled.precision,
            "engine": {"name": compiled.engine, "device": compiled.device, "reason": self.reason, **compiled.details},
            "keep_fp": list(self.config.quantization.keep_fp),
            "files": [str(path) for path in self.files],
        }
        if compiled.latency_note:
            summary["engine"]["note"] = compiled.latency_note
        if self.macs is not None:
            summary["macs"] = {
                "summary": self.macs.summary(),
                "total": self.macs.total,
                "int8": self.macs.int8,
                "share": self.macs.share,
                **dataclasses.asdict(self.macs),
            }
        if self.table is not None:
            summary["table"] = _table(self.table)
        if self.own is not None:
            summary["tensorrt"] = _tensorrt(self.own, self._pairs())
        if self.table is not None and self.table.calibration is not None:
            summary["calibration"] = _calibration(self.table.calibration)
        return summary

    def show(self) -> None:
        """Print it."""
        compiled = self.compiled
        if self.table is not None:
            _show_table(self.table)
        if self.own is not None:
            _show_side_by_side(self.own, self._pairs())
        print(f"{self.trained.network.name} is ready in {compiled.precision} on {compiled.engine}, {compiled.device}")
        if self.macs is not None:
            print(f"{self.macs.summary()} ({self.macs.source})")
        if self.config.quantization.keep_fp:
            print(f"kept in float: {', '.join(self.config.quantization.keep_fp)}")
        for path in self.files:
            print(f"wrote {path}")
        if compiled.latency_note:
            print(f"note: {compiled.latency_note}")

    def _pairs(self) -> tuple[Pair, ...]:
        """The scales of both tables, side by side."""
        if self.table is None or self.own is None:
            return ()
        pairs = compare(self.table.table, self.own.table, made_by(self.trained.network))
        calibration = self.table.calibration
        return pairs if calibration is None else tuple(_explained(pair, calibration.thresholds) for pair in pairs)


def _explained(pair: Pair, thresholds: Mapping[str, Threshold]) -> Pair:
    """The pair with why its scales differ, where TensorRT's is another candidate of our search."""
    if pair.reference is None or pair.tensorrt_scale is None or pair.ratio is None or abs(pair.ratio - 1) < _ROUNDING:
        return pair
    excess = thresholds[pair.reference].excess(pair.tensorrt_scale * LEVELS)
    if excess is None:
        return pair
    note = f"another candidate of the search: its divergence, by our counts, is {100 * excess:.2f} % larger"
    return dataclasses.replace(pair, note=note)


def _table(used: RunTable) -> dict[str, Any]:
    return {
        "path": str(used.path),
        "header": used.table.header,
        "algorithm": used.table.algorithm,
        "calibrated": used.calibration is not None,
        "reason": used.reason,
        "scales": used.table.finite,
    }


def _tensorrt(found: OwnCalibration, pairs: Sequence[Pair]) -> dict[str, Any]:
    return {
        "path": str(found.path),
        "header": found.table.header,
        "calibrated": found.calibrated,
        "reason": found.reason,
        "seconds": found.seconds,
        "tensors": [{**dataclasses.asdict(pair), "ratio": pair.ratio} for pair in pairs],
    }


def _calibration(calibration: CalibrationResult) -> dict[str, Any]:
    histograms = calibration.histograms
    return {
        "images": histograms.images,
        "batch_seconds": list(histograms.batch_seconds),
        "post_seconds": calibration.post_seconds,
        "tensors": {
            name: {
                "range": histograms.of[histograms.network.scale_source[name]].range,
                "threshold": threshold.value,
                "clipped": calibration.clipped(name),
            }
            for name, threshold in calibration.thresholds.items()
        },
    }


def _show_table(used: RunTable) -> None:
    tensors = _calibration(used.calibration)["tensors"] if used.calibration is not None else {}
    rows = []
    for name, scale in used.table.scales.items():
        found = tensors.get(name)
        rows.append(
            (
                name,
                f"{found['range']:.6g}" if found else "-",
                f"{found['threshold'] if found else scale * LEVELS:.6g}",
                f"{scale:.8g}",
                f"{100 * found['clipped']:.4f} %" if found else "-",
            )
        )
    print_table(f"{used.table.header}: {used.path}", ("tensor", "range R", "threshold", "scale", "clipped"), rows)


def _show_side_by_side(own: OwnCalibration, pairs: Sequence[Pair]) -> None:
    """Print TensorRT's own table beside ours."""

    def cell(value: str | float | None) -> str:
        return "-" if value is None else f"{value:.8g}" if isinstance(value, float) else short_name(value)

    columns = ("ours", "TensorRT's", "our scale", "TensorRT's scale", "ratio", "")
    rows = [
        tuple(
            cell(value)
            for value in (
                pair.reference,
                pair.tensorrt,
                pair.reference_scale,
                pair.tensorrt_scale,
                pair.ratio,
                pair.note,
            )
        )
        for pair in pairs
    ]
    print_table(f"{own.table.header}: {own.path}", columns, rows)
