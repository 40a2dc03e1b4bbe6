"""The calibration table in other formats: JSON, and the ranges that ONNX Runtime's TensorRT provider reads.

ONNX Runtime's provider takes two kinds of table (``trt_int8_calibration_table_name``): TensorRT's own, with
``trt_int8_use_native_calibration_table``, and a FlatBuffers file of dynamic ranges, which its quantization tools write
as ``calibration.flatbuffers``. It splits the lines of the former at the first colon, so that names with colons need
the latter.

Imports onnxruntime inside functions: it is slow to load, and only one format needs it.
"""

from __future__ import annotations

import json
import math
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from calib.table import LEVELS, CalibrationTable
from common.errors import InputError
from common.files import read_bytes, write_bytes, write_json

Format = Literal["table", "json", "onnxruntime"]
FORMATS: tuple[Format, ...] = get_args(Format)


def read(path: Path, *, algorithm: str | None = None, tensorrt_version: str | None = None) -> CalibrationTable:
    """Read a table in any of the formats; the content decides which.

    Args:
        path: The file.
        algorithm: Replaces what the file says; needed where the file says nothing (ONNX Runtime's ranges).
        tensorrt_version: Likewise; the tested version where the file says nothing.

    Raises:
        InputError: unreadable or malformed, or the algorithm is neither in the file nor given.
    """
    found = _found(path)
    if algorithm:
        found["algorithm"] = algorithm
    if tensorrt_version:
        found["tensorrt_version"] = tensorrt_version
    if "algorithm" not in found:
        raise InputError(f"{path} does not say which algorithm made it: give --algorithm")
    return _table(found, path)


def read_scales(path: Path) -> tuple[Mapping[str, float], str | None]:
    """The scales of a table in any of the formats, and its line 1, or None where the file does not say enough for it.

    Raises:
        InputError: unreadable or malformed.
    """
    found = _found(path)
    table = _table(found, path)
    return table.scales, table.header if "algorithm" in found else None


def format_of(content: bytes) -> Format:
    """The format that a file's content looks like."""
    if content.lstrip()[:1] == b"{":
        return "json"
    return "onnxruntime" if b"\0" in content[:32] else "table"


def _found(path: Path) -> dict[str, Any]:
    """What a file says, as arguments of ``CalibrationTable``."""
    content = read_bytes(path)
    form = format_of(content)
    if form == "json":
        return _from_json(content, str(path))
    if form == "onnxruntime":
        return {"scales": _from_onnxruntime(content, str(path))}
    table = CalibrationTable.read(path)
    return {"scales": table.scales, "algorithm": table.algorithm, "tensorrt_version": table.tensorrt_version}


def _table(found: Mapping[str, Any], path: Path) -> CalibrationTable:
    try:
        return CalibrationTable(**found)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def write(path: Path, table: CalibrationTable, to: Format) -> None:
    """Write ``table`` to ``path`` in format ``to``, atomically.

    Raises:
        InputError: the file cannot be written, or a scale is unusable where the format holds ranges alone.
    """
    if to == "table":
        table.write(path)
    elif to == "json":
        write_json(path, to_json(table))
    else:
        write_bytes(path, _to_onnxruntime(table))


def to_json(table: CalibrationTable) -> dict[str, Any]:
    """The table as JSON values; numbers read back exactly."""
    return {
        "algorithm": table.algorithm,
        "tensorrt_version": table.tensorrt_version,
        "scales": dict(table.scales),
        "dynamic_ranges": table.dynamic_ranges,
    }


def _from_json(content: bytes, source: str) -> dict[str, Any]:
    try:
        value = json.loads(content, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source} is not valid JSON: {error}") from error
    found: dict[str, Any] = {}
    for key in ("algorithm", "tensorrt_version"):
        if key in value:
            if not isinstance(value[key], str):
                raise InputError(f"{source}: {key} must be text, not {json.dumps(value[key])[:60]}")
            found[key] = value[key]
    scales = _numbers(value, "scales", source)
    ranges = _numbers(value, "dynamic_ranges", source)
    if scales and ranges:
        for name in scales.keys() | ranges.keys():
            if not math.isclose(LEVELS * scales.get(name, -1.0), ranges.get(name, -1.0), rel_tol=1e-6):
                raise InputError(f"{source}: scales and dynamic_ranges disagree about {name!r}: remove one of the two")
    if not scales and not ranges:
        raise InputError(f"{source} has neither scales nor dynamic_ranges")
    return {**found, "scales": scales or {name: value / LEVELS for name, value in ranges.items()}}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a name appears twice in one object")
    return value


def _numbers(value: Mapping[str, Any], key: str, source: str) -> dict[str, float]:
    numbers = value.get(key, {})
    if not isinstance(numbers, dict) or not all(type(number) in (int, float) for number in numbers.values()):
        raise InputError(f"{source}: {key} must map tensor names to numbers")
    try:
        return {name: float(number) for name, number in numbers.items()}
    except OverflowError as error:
        raise InputError(f"{source}: {key} holds a number beyond float64") from error


def _to_onnxruntime(table: CalibrationTable) -> bytes:
    """What onnxruntime.quantization writes as ``calibration.flatbuffers``."""
    for name, reason in table.unusable.items():
        raise InputError(f"ONNX Runtime's ranges cannot hold tensor {name!r}: {reason}; set its range or remove it")
    import numpy as np
    from onnxruntime.quantization import write_calibration_table
    from onnxruntime.quantization.calibrate import TensorData

    ranges = {
        name: TensorData(lowest=np.float32(-limit), highest=np.float32(limit))
        for name, limit in table.dynamic_ranges.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        write_calibration_table(ranges, folder)
        return (Path(folder) / "calibration.flatbuffers").read_bytes()


def _from_onnxruntime(content: bytes, source: str) -> dict[str, float]:
    from onnxruntime.quantization.CalTableFlatBuffers.TrtTable import TrtTable

    scales: dict[str, float] = {}
    try:
        table = TrtTable.GetRootAs(content, 0)
        for index in range(table.DictLength()):
            entry = table.Dict(index)
            name = entry.Key().decode("utf-8")
            if name in scales:
                raise InputError(f"{source}: tensor {name!r} appears twice")
            scales[name] = float(entry.Value()) / LEVELS
    # FlatBuffers' reader does not verify: a damaged file shows as whatever its offsets lead to.
    except (struct.error, ValueError, TypeError, IndexError, AttributeError, OverflowError) as error:
        raise InputError(f"{source} is neither a calibration table nor ONNX Runtime's ranges") from error
    return scales
