"""The calibration table in other formats: JSON, ONNX Runtime's, sampleINT8API's ranges and NVDLA's.

ONNX Runtime's TensorRT provider takes two kinds of table (``trt_int8_calibration_table_name``): TensorRT's own, with
``trt_int8_use_native_calibration_table``, and a FlatBuffers file of dynamic ranges, which its quantization tools write
as ``calibration.flatbuffers``, beside the same as text (``calibration.cache``) and as JSON. It splits the lines of the
former at the first colon, so that names with colons need the latter. The first two hold the larger one of a tensor's
lowest and highest value; the JSON holds both, and alone gives the range of a tensor whose lowest value goes further.

Imports onnxruntime inside functions: it is slow to load, and only one format needs it.
"""

from __future__ import annotations

import json
import math
import re
import struct
import tempfile
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from calib.algorithms import DEFAULT
from calib.table.text import (
    LEGACY_HEADER,
    LEVELS,
    CalibrationTable,
    Legacy,
    Problem,
    Scan,
    scale_from_hex,
    scale_to_hex,
    scan,
)
from common.errors import InputError
from common.files import read_bytes, read_text, write_bytes, write_json, write_text

Format = Literal["table", "json", "onnxruntime", "onnxruntime-json", "onnxruntime-cache", "ranges", "nvdla"]
"""``onnxruntime`` is its FlatBuffers file; ``ranges`` sampleINT8API's lines of a name, a colon and a range."""

FORMATS: tuple[Format, ...] = get_args(Format)

_HEX = re.compile(r"[0-9a-fA-F]{8}|0", re.ASCII)
_NO_ALGORITHM = Problem(0, "the file does not say which algorithm made it: give --algorithm")
_LARGER_END = (
    "the file holds the larger one of lowest and highest value: where the lowest goes further, that range is too "
    "small; ONNX Runtime's calibration.json has both"
)


def read(path: Path, *, algorithm: str | None = None, tensorrt_version: str | None = None) -> CalibrationTable:
    """Read a table in any of the formats; the content decides which.

    Args:
        path: The file.
        algorithm: Replaces what the file says; needed where the file says nothing (ranges, a table without line 1).
        tensorrt_version: Likewise; the tested version where the file says nothing.

    Raises:
        InputError: unreadable or malformed, or the algorithm is neither in the file nor given.
    """
    return made(scan_file(path), path, algorithm=algorithm, tensorrt_version=tensorrt_version)


def made(found: Scan, path: Path, *, algorithm: str | None, tensorrt_version: str | None) -> CalibrationTable:
    """The table of what :func:`scan_file` found in ``path``; arguments and errors as of :func:`read`."""
    try:
        return found.table(str(path), algorithm, tensorrt_version)
    except InputError as error:
        if str(error).startswith(str(path)):
            raise
        raise InputError(f"{path}: {error}") from error


def read_scales(path: Path) -> tuple[Mapping[str, float], str | None]:
    """The scales of a table in any of the formats, and its line 1, or None where the file does not say enough for it.

    Raises:
        InputError: unreadable or malformed.
    """
    found = scan_file(path)
    unknown = found.algorithm_problem or found.version_problem
    table = made(found, path, algorithm=found.algorithm or DEFAULT, tensorrt_version=found.tensorrt_version or "1.0.0")
    return table.scales, None if unknown else table.header


def scan_file(path: Path) -> Scan:
    """What a file in any of the formats says.

    Raises:
        InputError: unreadable, or no format at all. A malformed line of a table is in the result's ``problems``.
    """
    content = read_bytes(path)
    form = format_of(content)
    if form == "table":
        return scan(read_text(path))
    if form == "onnxruntime":
        return _ranges(_from_flatbuffers(content, str(path)), _LARGER_END)
    if form in ("ranges", "onnxruntime-cache"):
        limits = _from_lines(content.decode("utf-8-sig"), ": " if form == "ranges" else " ", str(path))
        return _ranges(limits) if form == "ranges" else _ranges(limits, _LARGER_END)
    value = _json(content, str(path))
    if form == "onnxruntime-json":
        return _ranges(_from_onnxruntime_json(value, str(path)))
    if form == "nvdla":
        scales = {name: _number(entry["scale"], name, str(path)) for name, entry in value.items()}
        return Scan(scales, {}, algorithm_problem=_NO_ALGORITHM)
    return _from_json(value, str(path))


def format_of(content: bytes) -> Format:
    """The format that a file's content looks like; ``table`` or ``json`` where it looks like none."""
    content = content.removeprefix(BOM_UTF8)
    if content.lstrip()[:1] == b"{":
        return _json_format(content)
    if content.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
        return "table"
    if b"\0" in content[:32]:
        return "onnxruntime"
    try:
        lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError:
        return "table"
    lines = [line.rstrip() for line in lines if line.strip()]
    header = not lines or lines[0].startswith("TRT-") or LEGACY_HEADER.fullmatch(lines[0])
    if header or _all(lines, ": ", _HEX.fullmatch):
        return "table"
    if _all(lines, ": ", _decimal):
        return "ranges"
    return "onnxruntime-cache" if _all(lines, " ", _decimal) else "table"


def _all(lines: list[str], separator: str, is_value: Callable[[str], object]) -> bool:
    parts = (line.rpartition(separator) for line in lines)
    return all(name and is_value(value.strip()) for name, _, value in parts)


def _decimal(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text


def _json_format(content: bytes) -> Format:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return "json"
    if not isinstance(value, dict) or not value or "scales" in value or "dynamic_ranges" in value:
        return "json"
    if value.get("CLS") == "TensorsData":
        return "onnxruntime-json"
    entries = list(value.values())
    if all(isinstance(entry, dict) and "scale" in entry for entry in entries):
        return "nvdla"
    pairs = all(isinstance(entry, dict) and {"lowest", "highest"} <= entry.keys() for entry in entries)
    return "onnxruntime-json" if pairs else "json"


def write(path: Path, table: CalibrationTable, to: Format) -> list[str]:
    """Write ``table`` to ``path`` in format ``to``, atomically.

    Returns:
        Tensors that were left out: formats other than TensorRT's and this project's JSON hold usable ranges alone.

    Raises:
        InputError: the file cannot be written, or no scale is usable where the format holds ranges alone.
    """
    if to == "table":
        table.write(path)
        return []
    if to == "json":
        write_json(path, to_json(table))
        return []
    left_out = table.unusable
    scales = {name: scale for name, scale in table.scales.items() if name not in left_out}
    if not scales:
        raise InputError(f"{path} is not written: no scale of the table can be used there")
    ranges = {name: LEVELS * scale for name, scale in scales.items()}
    if to == "onnxruntime":
        write_bytes(path, _to_flatbuffers(ranges))
    elif to == "onnxruntime-json":
        pairs = {name: {"lowest": -limit, "highest": limit, "CLS": "TensorData"} for name, limit in ranges.items()}
        write_json(path, pairs)
    elif to == "nvdla":
        write_json(path, {name: {"scale": scale, "min": 0, "max": 0, "offset": 0} for name, scale in scales.items()})
    else:
        separator = ": " if to == "ranges" else " "
        write_text(path, "".join(f"{name}{separator}{limit!r}\n" for name, limit in ranges.items()))
    return list(left_out)


def to_json(table: CalibrationTable) -> dict[str, Any]:
    """The table as JSON values; numbers read back exactly, and what is no range is hex digits, as in the table."""
    finite = {name: scale for name, scale in table.finite.items() if scale >= 0}
    legacy = {"legacy": {"cutoff": table.legacy.cutoff, "quantile": table.legacy.quantile}}
    return {
        "algorithm": table.algorithm,
        "tensorrt_version": table.tensorrt_version,
        **({} if table.has_version else legacy),
        "scales": {name: finite.get(name, scale_to_hex(scale)) for name, scale in table.scales.items()},
        "dynamic_ranges": {name: LEVELS * scale for name, scale in finite.items()},
    }


def _json(content: bytes, source: str) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(content, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source} is not valid JSON: {error}") from error
    return value


def _from_json(value: Mapping[str, Any], source: str) -> Scan:
    found: dict[str, Any] = {}
    for key in ("algorithm", "tensorrt_version"):
        if key in value:
            if not isinstance(value[key], str):
                raise InputError(f"{source}: {key} must be text, not {json.dumps(value[key])[:60]}")
            found[key] = value[key]
    if "legacy" in value:
        found["legacy"] = _legacy(value["legacy"], source)
    scales = _numbers(value, "scales", source)
    ranges = _numbers(value, "dynamic_ranges", source)
    if scales and ranges:
        finite = {name for name, scale in scales.items() if 0 <= scale < math.inf}
        for name in finite | ranges.keys():
            if not math.isclose(LEVELS * scales.get(name, -1.0), ranges.get(name, -1.0), rel_tol=1e-6):
                raise InputError(f"{source}: scales and dynamic_ranges disagree about {name!r}: remove one of the two")
    if not scales and not ranges:
        raise InputError(f"{source} has neither scales nor dynamic_ranges")
    scales = scales or {name: value / LEVELS for name, value in ranges.items()}
    if "algorithm" not in found:
        found["algorithm_problem"] = _NO_ALGORITHM
    return Scan(scales, {}, **found)


def _legacy(value: Any, source: str) -> Any:
    numbers = value if isinstance(value, dict) else {}
    if numbers.keys() != {"cutoff", "quantile"} or not all(type(item) in (int, float) for item in numbers.values()):
        raise InputError(f"{source}: legacy must hold the numbers cutoff and quantile")
    return Legacy(float(numbers["cutoff"]), float(numbers["quantile"]))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a name appears twice in one object")
    return value


def _numbers(value: Mapping[str, Any], key: str, source: str) -> dict[str, float]:
    numbers = value.get(key, {})
    if not isinstance(numbers, dict):
        raise InputError(f"{source}: {key} must map tensor names to numbers")
    return {name: _number(number, name, source) for name, number in numbers.items()}


def _number(value: Any, name: str, source: str) -> float:
    """A number >= 0 of a JSON file, or the hex digits of one that JSON cannot hold."""
    if isinstance(value, str) and len(value) == 8 and _HEX.fullmatch(value):
        return scale_from_hex(value)
    if type(value) not in (int, float):
        raise InputError(f"{source}: must map tensor names to numbers, and has {json.dumps(value)[:60]} for {name!r}")
    try:
        number = float(value)
    except OverflowError as error:
        raise InputError(f"{source}: the number of {name!r} is beyond float64") from error
    if math.isnan(number) or number < 0 or math.isinf(number):
        kind = "NaN" if math.isnan(number) else "negative" if number < 0 else "infinite"
        raise InputError(f"{source}: the number of {name!r} is {kind}")
    return number


def _ranges(limits: Mapping[str, float], *oddities: str) -> Scan:
    """What a file of dynamic ranges says; negative ones are kept, and are no range."""
    scales = {name: limit / LEVELS for name, limit in limits.items()}
    return Scan(scales, {}, algorithm_problem=_NO_ALGORITHM, oddities=oddities)


def _from_lines(text: str, separator: str, source: str) -> dict[str, float]:
    limits: dict[str, float] = {}
    for line in text.split("\n"):
        if line.strip():
            name, _, value = line.rstrip().rpartition(separator)
            if name in limits:
                raise InputError(f"{source}: tensor {name!r} appears twice")
            limits[name] = float(value)
    return limits


def _from_onnxruntime_json(value: Mapping[str, Any], source: str) -> dict[str, float]:
    """Ranges of what ``write_calibration_table`` (a pair for each tensor) or ``save_tensors_data`` wrote."""
    entries = value.get("data") if value.get("CLS") == "TensorsData" else value
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise InputError(f"{source}: data must map tensor names to lowest and highest value")
    return {
        name: max(_end(entry.get("lowest"), name, source), _end(entry.get("highest"), name, source))
        for name, entry in entries.items()
    }


def _end(value: Any, name: str, source: str) -> float:
    """Absolute value of one end of a range, which may be an array of one number."""
    if isinstance(value, dict):
        value = value.get("data")
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    if type(value) not in (int, float):
        raise InputError(f"{source}: tensor {name!r} has no numbers lowest and highest")
    try:
        return abs(float(value))
    except OverflowError as error:
        raise InputError(f"{source}: the number of {name!r} is beyond float64") from error


def _to_flatbuffers(ranges: Mapping[str, float]) -> bytes:
    """What onnxruntime.quantization writes as ``calibration.flatbuffers``."""
    import numpy as np
    from onnxruntime.quantization import write_calibration_table
    from onnxruntime.quantization.calibrate import TensorData

    data = {name: TensorData(lowest=np.float32(-limit), highest=np.float32(limit)) for name, limit in ranges.items()}
    with tempfile.TemporaryDirectory() as folder:
        write_calibration_table(data, folder)
        return (Path(folder) / "calibration.flatbuffers").read_bytes()


def _from_flatbuffers(content: bytes, source: str) -> dict[str, float]:
    from onnxruntime.quantization.CalTableFlatBuffers.TrtTable import TrtTable

    limits: dict[str, float] = {}
    try:
        table = TrtTable.GetRootAs(content, 0)
        for index in range(table.DictLength()):
            entry = table.Dict(index)
            name = entry.Key().decode("utf-8")
            if name in limits:
                raise InputError(f"{source}: tensor {name!r} appears twice")
            limits[name] = float(entry.Value())
    # FlatBuffers' reader does not verify: a damaged file shows as whatever its offsets lead to.
    except (struct.error, ValueError, TypeError, IndexError, AttributeError, OverflowError) as error:
        raise InputError(f"{source} is neither a calibration table nor ONNX Runtime's ranges") from error
    return limits
