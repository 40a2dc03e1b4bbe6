"""TensorRT's calibration table: tensor names with the scales of their INT8 values.

The file is text. Line 1 is ``TRT-<version>-<algorithm>``; each further line is a tensor's name, ``": "`` and the
scale as the 8 hex digits of an IEEE-754 binary32. The scale is threshold / 127, so the dynamic range that TensorRT
takes for the tensor is [-127 * scale, 127 * scale].

Imports neither torch nor numpy: the table tools start at once.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from common.errors import InputError
from common.files import read_text, write_text

TESTED_TENSORRT = "10.12.0"
"""TensorRT version that a table carries when none is installed and none is asked for."""

LEVELS = 127
"""Largest INT8 code of a symmetric quantization: dynamic range = LEVELS * scale."""

HEADER_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "entropy2": "EntropyCalibration2",
        "entropy": "EntropyCalibration",
        "minmax": "MinMaxCalibration",
        "percentile": "MinMaxCalibration",
        "legacy": "LegacyCalibration",
    }
)
"""How line 1 calls each algorithm. TensorRT knows no ``percentile``: such a table reads back as ``minmax``."""

_ALGORITHMS: Mapping[str, str] = {
    header: algorithm for algorithm, header in HEADER_NAMES.items() if algorithm != "percentile"
}
_HEADER = re.compile(r"TRT-([0-9]{1,9})-([A-Za-z0-9]+)", re.ASCII)
_VERSION = re.compile(r"([0-9]{1,3})\.([0-9]{1,3})\.([0-9]{1,3})(?:\.[0-9]{1,6})?", re.ASCII)
# TensorRT does not pad: a tensor that was zero throughout is written as "0". Any other real scale has 8 digits,
# so that a shorter number is a line that lost its end.
_SCALE = re.compile(r"[0-9a-fA-F]{8}|0", re.ASCII)
_ILLEGAL_IN_NAME = re.compile(r"[\n\r\0]")
_SMALLEST_NORMAL = 2.0**-126
_LARGEST = struct.unpack(">f", b"\x7f\x7f\xff\xff")[0]


def version_number(version: str) -> int:
    """The integer that stands for a TensorRT version in line 1: 101200 for "10.12.0", 7202 for "7.2.2".

    major * 1000 + minor * 100 + patch up to TensorRT 8, major * 10000 + minor * 100 + patch from 10 on. A fourth
    number (the build, as in "10.12.0.36") is not part of it.

    Raises:
        InputError: not three or four numbers, a version that the formula cannot tell from another one, or
            TensorRT 9, for which neither formula is established.
    """
    match = _VERSION.fullmatch(version)
    if not match:
        raise InputError(f"{version!r} is not a TensorRT version: write three numbers, such as {TESTED_TENSORRT}")
    major, minor, patch = (int(part) for part in match.groups())
    if 1 <= major <= 8 and minor <= 9 and patch <= 99:
        return major * 1000 + minor * 100 + patch
    if 10 <= major <= 99 and minor <= 99 and patch <= 99:
        return major * 10000 + minor * 100 + patch
    if major == 9:
        raise InputError(f"TensorRT {version}: how TensorRT 9 numbers its tables is not known; write another version")
    raise InputError(f"TensorRT {version} has no number of its own in a calibration table")


def version_string(number: int) -> str:
    """The TensorRT version that line 1's integer stands for: "10.12.0" for 101200, "7.2.2" for 7202.

    Raises:
        InputError: no TensorRT version has this number.
    """
    if 1000 <= number <= 8999:
        return f"{number // 1000}.{number // 100 % 10}.{number % 100}"
    if 100000 <= number <= 999999:
        return f"{number // 10000}.{number // 100 % 100}.{number % 100}"
    raise InputError(f"{number} is not the number of a TensorRT version (7202 is 7.2.2, 101200 is 10.12.0)")


def scale_from_hex(digits: str) -> float:
    """The binary32 value of 8 hex digits, most significant first, as a Python float."""
    return float(struct.unpack(">f", bytes.fromhex(digits.zfill(8)))[0])


def scale_to_hex(scale: float) -> str:
    """``scale``, rounded to binary32, as 8 lower-case hex digits, most significant first."""
    return struct.pack(">f", scale).hex()


def why_unusable(scale: float) -> str | None:
    """Why a scale that a table may hold can nevertheless not quantize anything, or None if it can."""
    if scale == 0:
        return "scale 0: the tensor was zero throughout calibration"
    if scale < _SMALLEST_NORMAL:
        return f"scale {scale:.3g} is subnormal: its inverse is not a number that GPUs compute with"
    if scale > _LARGEST / LEVELS:
        return f"scale {scale:.3g} gives a dynamic range beyond float32"
    return None


@dataclass(frozen=True)
class Problem:
    """What is wrong with one line of a table. ``line`` counts from 1; 0 stands for the file as a whole."""

    line: int
    message: str

    def text(self, source: str) -> str:
        return f"{source} line {self.line}: {self.message}" if self.line else f"{source}: {self.message}"


@dataclass(frozen=True)
class CalibrationTable:
    """Scales of a network's tensors.

    Attributes:
        scales: Tensor name -> scale, in network order. The constructor rounds them to binary32, as the file does.
            Zero (a tensor that was zero throughout calibration) is kept: see :attr:`unusable`.
        algorithm: ``entropy2``, ``entropy``, ``minmax``, ``percentile`` (read back as ``minmax``) or ``legacy``.
        tensorrt_version: Three numbers; a fourth one is dropped.

    Raises:
        InputError: no scales, a name that the format cannot hold, a scale that is not a finite number >= 0, an
            unknown algorithm, or a version that has no number.
    """

    scales: Mapping[str, float]
    algorithm: str = "entropy2"
    tensorrt_version: str = field(default=TESTED_TENSORRT)

    def __post_init__(self) -> None:
        if self.algorithm not in HEADER_NAMES:
            raise InputError(f"unknown algorithm {self.algorithm!r}: take one of {', '.join(HEADER_NAMES)}")
        if not self.scales:
            raise InputError("a calibration table needs at least one tensor")
        rounded = {}
        for name, scale in self.scales.items():
            problem = _name_problem(name) or _scale_problem(scale)
            if problem:
                raise InputError(f"tensor {name!r}: {problem}")
            rounded[name] = scale_from_hex(scale_to_hex(scale))
        object.__setattr__(self, "scales", rounded)
        object.__setattr__(self, "tensorrt_version", version_string(version_number(self.tensorrt_version)))

    @property
    def header(self) -> str:
        """Line 1, such as ``TRT-101200-EntropyCalibration2``."""
        return f"TRT-{version_number(self.tensorrt_version)}-{HEADER_NAMES[self.algorithm]}"

    @property
    def dynamic_ranges(self) -> dict[str, float]:
        """Tensor name -> largest absolute value that INT8 represents (127 * scale)."""
        return {name: LEVELS * scale for name, scale in self.scales.items()}

    @property
    def unusable(self) -> dict[str, str]:
        """Tensors whose scale cannot quantize anything -> why (see :func:`why_unusable`)."""
        reasons = ((name, why_unusable(scale)) for name, scale in self.scales.items())
        return {name: reason for name, reason in reasons if reason}

    def scale(self, name: str) -> float:
        """The scale of ``name``.

        Raises:
            InputError: the table has no such tensor, or its scale is unusable.
        """
        if name not in self.scales:
            raise InputError(f"the calibration table has no tensor {name!r}: calibrate this network again")
        scale = self.scales[name]
        reason = why_unusable(scale)
        if reason:
            raise InputError(f"the calibration table cannot quantize tensor {name!r}: {reason}")
        return scale

    def dumps(self) -> str:
        """The table as TensorRT's text."""
        lines = [self.header, *(f"{name}: {scale_to_hex(scale)}" for name, scale in self.scales.items())]
        return "\n".join(lines) + "\n"

    def write(self, path: str | Path) -> None:
        """Write the table to ``path`` atomically.

        Raises:
            InputError: the file cannot be written.
        """
        write_text(Path(path), self.dumps())

    @classmethod
    def loads(cls, text: str, source: str = "calibration table") -> CalibrationTable:
        """The table in ``text``; ``source`` names it in errors.

        Raises:
            InputError: naming the first line that is wrong, and how many others are.
        """
        table, problems = parse(text)
        if table is None:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise InputError(problems[0].text(source) + more)
        return table

    @classmethod
    def read(cls, path: str | Path) -> CalibrationTable:
        """The table in the file ``path``.

        Raises:
            InputError: the file is missing, unreadable, too large, not UTF-8 or not a calibration table.
        """
        return cls.loads(read_text(Path(path)), source=str(path))


def parse(text: str) -> tuple[CalibrationTable | None, list[Problem]]:
    """The table in ``text`` and everything that is wrong with it; the table is None if anything is.

    Lines may end in CR LF, and empty lines may follow the last entry.
    """
    lines = text.rstrip("\r\n").split("\n")
    header, problems = _parse_header(lines[0].removesuffix("\r"))
    scales: dict[str, float] = {}
    first_seen: dict[str, int] = {}
    for number, line in enumerate(lines[1:], start=2):
        name, separator, digits = line.removesuffix("\r").rpartition(": ")
        if not separator:
            problems.append(Problem(number, f"expected 'name: 8 hex digits', found {_quote(line)}"))
            continue
        if not _SCALE.fullmatch(digits):
            problems.append(Problem(number, f"the scale of {_quote(name)} must be 8 hex digits, not {_quote(digits)}"))
            continue
        if name in first_seen:
            problems.append(Problem(number, f"tensor {_quote(name)} already appeared in line {first_seen[name]}"))
            continue
        first_seen[name] = number
        scale = scale_from_hex(digits)
        problem = _name_problem(name) or _scale_problem(scale)
        if problem:
            problems.append(Problem(number, f"tensor {_quote(name)}: {problem}"))
        else:
            scales[name] = scale
    if len(lines) == 1:
        problems.append(Problem(0, "no tensor after line 1: the file is empty or cut off"))
    if problems or header is None:
        return None, problems
    algorithm, version = header
    return CalibrationTable(scales, algorithm, version), []


def _parse_header(line: str) -> tuple[tuple[str, str] | None, list[Problem]]:
    match = _HEADER.fullmatch(line)
    if not match:
        return None, [Problem(1, f"expected 'TRT-<version>-<algorithm>', found {_quote(line)}")]
    problems = []
    version = ""
    try:
        version = version_string(int(match[1]))
    except InputError as error:
        problems.append(Problem(1, str(error)))
    algorithm = _ALGORITHMS.get(match[2])
    if algorithm is None:
        problems.append(Problem(1, f"unknown algorithm {match[2]!r}: expected one of {', '.join(_ALGORITHMS)}"))
    return ((algorithm, version), []) if algorithm and not problems else (None, problems)


def _name_problem(name: str) -> str | None:
    if not name:
        return "the tensor has no name"
    if _ILLEGAL_IN_NAME.search(name):
        return "a tensor name must not contain line breaks or NUL"
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return "the tensor name is not valid Unicode"
    return None


def _scale_problem(scale: float) -> str | None:
    if math.isnan(scale):
        return "the scale is NaN"
    if math.isinf(scale):
        return "the scale is infinite"
    if math.copysign(1.0, scale) < 0:
        return f"the scale is negative ({scale:.9g})"
    try:
        struct.pack(">f", scale)
    except OverflowError:
        return f"the scale {scale:.9g} is beyond float32"
    return None


def _quote(text: str, limit: int = 60) -> str:
    """``text`` for an error line: quoted, escaped, shortened."""
    return repr(text if len(text) <= limit else text[: limit - 3] + "...")
