"""TensorRT's calibration table: tensor names with the scales of their INT8 values.

The file is text. Line 1 is ``TRT-<version>-<algorithm>``, or the parameters of a legacy calibration; each further line
is a tensor's name, ``": "`` and the scale as the 8 hex digits of an IEEE-754 binary32. The scale is threshold / 127, so
the dynamic range that TensorRT takes for the tensor is [-127 * scale, 127 * scale].

Imports neither torch nor numpy: the table tools start at once.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from calib.algorithms import ALGORITHMS, DEFAULT
from calib.table.version import TESTED_TENSORRT, version_number, version_string
from common.errors import InputError
from common.files import read_text, write_text

LEVELS = 127
"""Largest INT8 code of a symmetric quantization: dynamic range = LEVELS * scale."""

_BY_HEADER = {algorithm.header: name for name, algorithm in ALGORITHMS.items() if algorithm.tensorrt}
_LEGACY = next(name for name, algorithm in ALGORITHMS.items() if algorithm.parameters_in_header)
_HEADER = re.compile(r"TRT-([0-9]{1,9})-([A-Za-z0-9]+)", re.ASCII)
_FOREIGN_HEADER = re.compile(r"TRT-(.*)-([A-Za-z0-9]+)", re.ASCII)
LEGACY_HEADER = re.compile(r"0 ([0-9a-fA-F]{16}) ([0-9a-fA-F]{16})", re.ASCII)
_DIGITS = 8
# TensorRT does not pad: a tensor that was zero is "0", and a scale below 2**-95 has fewer than 8 digits.
_SCALE = re.compile(r"[0-9a-fA-F]{1,8}", re.ASCII)
_ILLEGAL_IN_NAME = re.compile(r"[\n\r\0]")
_BLANKS = " \t\r"
_MARK = "\ufeff"
_UNKNOWN_LINE_1 = "TensorRT does not recognise line 1; `convert` writes the table plainly"
_SMALLEST_NORMAL = 2.0**-126
_LARGEST = struct.unpack(">f", b"\x7f\x7f\xff\xff")[0]


def scale_from_hex(digits: str) -> float:
    """The binary32 value of 8 hex digits, most significant first, as a Python float."""
    return float(struct.unpack(">f", bytes.fromhex(digits.zfill(8)))[0])


def scale_to_hex(scale: float) -> str:
    """``scale``, rounded to binary32, as 8 lower-case hex digits, most significant first."""
    return struct.pack(">f", scale).hex()


def why_unusable(scale: float) -> str | None:
    """Why a scale that a table may hold can nevertheless not quantize anything, or None if it can."""
    if math.isnan(scale):
        return "the scale is NaN"
    if scale == 0:
        return "scale 0: the tensor was zero throughout calibration"
    if scale < 0:
        return f"the scale is negative ({scale:.9g})"
    if math.isinf(scale):
        return "the scale is infinite"
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
class Legacy:
    """Parameters of IInt8LegacyCalibrator, which line 1 of its tables holds in place of version and algorithm.

    Attributes:
        cutoff: Regression cutoff.
        quantile: Share of the values that stay in range.
    """

    cutoff: float = 1.0
    quantile: float = 0.9999

    @property
    def header(self) -> str:
        """Line 1: a zero and the two as hex digits of IEEE-754 binary64."""
        return f"0 {struct.pack('>d', self.cutoff).hex()} {struct.pack('>d', self.quantile).hex()}"


@dataclass(frozen=True, eq=False)
class CalibrationTable:
    """Scales of a network's tensors. Two tables are equal if algorithm, line 1 and the bits of all scales are.

    Attributes:
        scales: Tensor name -> scale, in network order. The constructor rounds them to binary32, as the file does.
            What cannot quantize anything (zero, infinity, NaN, negative numbers) is kept: see :attr:`unusable`.
        algorithm: One of ``calib.algorithms.ALGORITHMS``; one that TensorRT does not have is read back as another.
        tensorrt_version: Three numbers; a fourth one is dropped. Line 1 of ``legacy`` does not hold it.
        legacy: Parameters that line 1 of ``legacy`` holds.
        spelling: Digits that a file had for a scale, where they are others than :func:`scale_to_hex` gives ("0").

    Raises:
        InputError: no scales, a name that the format cannot hold, a finite scale beyond binary32, an unknown algorithm,
            or a version that has no number.
    """

    scales: Mapping[str, float]
    algorithm: str = DEFAULT
    tensorrt_version: str = field(default=TESTED_TENSORRT)
    legacy: Legacy = field(default=Legacy())
    spelling: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise InputError(f"unknown algorithm {self.algorithm!r}: take one of {', '.join(ALGORITHMS)}")
        if not self.scales:
            raise InputError("a calibration table needs at least one tensor")
        rounded = {}
        for name, scale in self.scales.items():
            if problem := name_problem(name):
                raise InputError(f"tensor {name!r}: {problem}")
            try:
                rounded[name] = scale_from_hex(scale_to_hex(scale))
            except OverflowError as error:
                raise InputError(f"tensor {name!r}: the scale {scale:.9g} is beyond float32") from error
        object.__setattr__(self, "scales", rounded)
        kept = {
            name: digits
            for name, digits in self.spelling.items()
            if name in rounded and scale_to_hex(scale_from_hex(digits)) == scale_to_hex(rounded[name])
        }
        object.__setattr__(self, "spelling", kept)
        object.__setattr__(self, "tensorrt_version", version_string(version_number(self.tensorrt_version)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CalibrationTable):
            return NotImplemented
        return (self.algorithm, self.header, self.bits) == (other.algorithm, other.header, other.bits)

    def __hash__(self) -> int:
        return hash((self.algorithm, self.header, frozenset(self.bits.items())))

    @property
    def header(self) -> str:
        """Line 1, such as ``TRT-101200-EntropyCalibration2``, or ``0 3ff0000000000000 3fefff2e48e8a71e`` (legacy)."""
        if not self.has_version:
            return self.legacy.header
        return f"TRT-{version_number(self.tensorrt_version)}-{ALGORITHMS[self.algorithm].header}"

    @property
    def has_version(self) -> bool:
        """Whether line 1 holds a version; that of a legacy table holds its parameters."""
        return not ALGORITHMS[self.algorithm].parameters_in_header

    @property
    def bits(self) -> dict[str, str]:
        """Tensor name -> the 8 hex digits of its scale; unlike the scale, equal to itself for NaN."""
        return {name: scale_to_hex(scale) for name, scale in self.scales.items()}

    @property
    def dynamic_ranges(self) -> dict[str, float]:
        """Tensor name -> largest absolute value that INT8 represents (127 * scale)."""
        return {name: LEVELS * scale for name, scale in self.scales.items()}

    @property
    def finite(self) -> dict[str, float]:
        """Tensor name -> scale, of those that are finite numbers, which alone JSON can hold."""
        return {name: scale for name, scale in self.scales.items() if math.isfinite(scale)}

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

    def replaced(self, scales: Mapping[str, float]) -> CalibrationTable:
        """This table with other scales: same line 1, and what is the same is written as it was."""
        return replace(self, scales=scales)

    def dumps(self) -> str:
        """The table as TensorRT's text."""
        lines = [f"{name}: {self.spelling.get(name, digits)}" for name, digits in self.bits.items()]
        return "\n".join([self.header, *lines]) + "\n"

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
        return scan(text).table(source)

    @classmethod
    def read(cls, path: str | Path) -> CalibrationTable:
        """The table in the file ``path``.

        Raises:
            InputError: the file is missing, unreadable, too large, not UTF-8 or not a calibration table.
        """
        return cls.loads(read_text(Path(path)), source=str(path))


@dataclass(frozen=True)
class Scan:
    """What the text of a table says, and what is wrong with it.

    Attributes:
        scales: Tensor name -> scale, of the lines that can be read.
        spelling: As :attr:`CalibrationTable.spelling`.
        algorithm: That line 1 names, or None.
        tensorrt_version: That line 1 names, or None.
        legacy: Parameters in line 1 of a legacy table, or None.
        algorithm_problem: Why line 1 names no algorithm, or None.
        version_problem: Why line 1 names no version, or None.
        problems: What is wrong with the other lines.
        oddities: What other readers may stumble over.
    """

    scales: dict[str, float]
    spelling: dict[str, str]
    algorithm: str | None = None
    tensorrt_version: str | None = None
    legacy: Legacy | None = None
    algorithm_problem: Problem | None = None
    version_problem: Problem | None = None
    problems: tuple[Problem, ...] = ()
    oddities: tuple[str, ...] = ()

    def found_problems(self, algorithm: str | None = None, tensorrt_version: str | None = None) -> list[Problem]:
        """All that is wrong, apart from what the arguments replace in line 1."""
        first = [
            None if algorithm else self.algorithm_problem,
            None if tensorrt_version else self.version_problem,
        ]
        # Both are the same where line 1 is missing.
        return [*dict.fromkeys(filter(None, first)), *self.problems]

    def table(self, source: str, algorithm: str | None = None, tensorrt_version: str | None = None) -> CalibrationTable:
        """The table, of what line 1 says or the arguments say instead; ``source`` names it in errors.

        Raises:
            InputError: naming the first line that is wrong, and how many others are.
        """
        problems = self.found_problems(algorithm, tensorrt_version)
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise InputError(problems[0].text(source) + more)
        return CalibrationTable(
            self.scales,
            algorithm or self.algorithm or "",
            tensorrt_version or self.tensorrt_version or TESTED_TENSORRT,
            self.legacy or Legacy(),
            self.spelling,
        )


def parse(text: str) -> tuple[CalibrationTable | None, list[Problem]]:
    """The table in ``text`` and everything that is wrong with it; the table is None if anything is."""
    found = scan(text)
    problems = found.found_problems()
    return (None if problems else found.table("calibration table")), problems


def scan(text: str) -> Scan:
    """Read the lines of a table, also of one whose line 1 is foreign or missing.

    Lines may end in spaces or CR LF, empty lines may follow the last entry, and its line break may be missing; a byte
    order mark may begin the file, as some editors leave it. A scale
    may have fewer than 8 digits, since TensorRT does not pad; in the last line only if something follows the digits,
    which else may have been cut off.
    """
    marked, text = text.startswith(_MARK), text.removeprefix(_MARK)
    body = text.rstrip(_BLANKS + "\n")
    lines = body.split("\n")
    whole = len(body) < len(text)
    header = _scan_header(lines[0].rstrip(_BLANKS))
    scales: dict[str, float] = {}
    spelling: dict[str, str] = {}
    first_seen: dict[str, int] = {}
    problems: list[Problem] = []
    short: list[str] = []
    # Where line 1 is missing, its place is taken by the first tensor.
    begin = 0 if header is None else 1
    for number, line in enumerate(lines[begin:], start=begin + 1):
        name, separator, digits = line.rpartition(": ")
        digits = digits.strip(_BLANKS)
        if not separator:
            problems.append(Problem(number, f"expected 'name: 8 hex digits', found {_quote(line)}"))
            continue
        cut_off = number == len(lines) and not whole and digits != "0" and len(digits) < _DIGITS
        if not _SCALE.fullmatch(digits) or cut_off:
            problems.append(Problem(number, f"the scale of {_quote(name)} must be 8 hex digits, not {_quote(digits)}"))
            continue
        if name in first_seen:
            problems.append(Problem(number, f"tensor {_quote(name)} already appeared in line {first_seen[name]}"))
            continue
        first_seen[name] = number
        if problem := name_problem(name):
            problems.append(Problem(number, f"tensor {_quote(name)}: {problem}"))
            continue
        scales[name] = scale_from_hex(digits)
        if digits != scale_to_hex(scales[name]):
            spelling[name] = digits
        if len(digits) < _DIGITS and digits != "0":
            short.append(f"the scale of {_quote(name)} has {len(digits)} digits, and so is {scales[name]:.3g}")
    if len(lines) == begin:
        problems.append(Problem(0, "no tensor after line 1: the file is empty or cut off"))
    mark = [f"the file begins with a byte order mark: {_UNKNOWN_LINE_1}"] if marked else []
    oddities = [*mark, *_oddities(body, whole), *short]
    found = Scan(scales, spelling, problems=tuple(problems), oddities=tuple(oddities))
    return replace(found, **(_no_header(lines[0]) if header is None else header))


def _oddities(body: str, whole: bool) -> list[str]:
    """What of the line ends TensorRT, or another reader, may stumble over."""
    found = []
    if "\r" in body:
        found.append(f"lines end in CR LF: {_UNKNOWN_LINE_1}")
    if any(line.rstrip("\r").endswith((" ", "\t")) for line in body.split("\n")[:-1]):
        found.append("lines end in spaces: TensorRT may not recognise line 1; `convert` writes them without")
    if not whole:
        found.append("the last line has no line break: it may be cut off")
    return found


def _scan_header(line: str) -> dict[str, Any] | None:
    """What line 1 says, as fields of :class:`Scan`; None if it is a tensor's line already."""
    if match := LEGACY_HEADER.fullmatch(line):
        cutoff, quantile = (struct.unpack(">d", bytes.fromhex(digits))[0] for digits in match.groups())
        return {"algorithm": _LEGACY, "legacy": Legacy(cutoff, quantile)}
    match = _FOREIGN_HEADER.fullmatch(line)
    if not match:
        name, separator, digits = line.rpartition(": ")
        if name and separator and _SCALE.fullmatch(digits):
            return None
        return _no_header(line)
    fields: dict[str, Any] = {"algorithm": _BY_HEADER.get(match[2])}
    if fields["algorithm"] is None:
        problem = f"unknown algorithm {_quote(match[2])}: expected one of {', '.join(_BY_HEADER)}"
        fields["algorithm_problem"] = Problem(1, problem)
    try:
        known = _HEADER.fullmatch(line)
        if not known:
            raise InputError(
                f"expected 'TRT-<version>-<algorithm>', found {_quote(line)}, which names no version: `python -m calib "
                "convert` with --tensorrt-version gives it one"
            )
        fields["tensorrt_version"] = version_string(int(known[1]))
    except InputError as error:
        fields["version_problem"] = Problem(1, str(error))
    return fields


def _no_header(line: str) -> dict[str, Any]:
    """The fields of :class:`Scan` for a file without line 1, whose version then may be any."""
    return {
        "algorithm_problem": Problem(
            1,
            f"expected 'TRT-<version>-<algorithm>', found {_quote(line)}: `python -m calib convert` with --algorithm "
            "(and --tensorrt-version) writes that line",
        )
    }


def name_problem(name: str) -> str | None:
    """Why a table cannot hold a tensor of that name, or None."""
    if not name:
        return "the tensor has no name"
    if _ILLEGAL_IN_NAME.search(name):
        return "a tensor name must not contain line breaks or NUL"
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return "the tensor name is not valid Unicode"
    return None


def _quote(text: str, limit: int = 60) -> str:
    """``text`` for an error line: quoted, escaped, shortened."""
    return repr(text if len(text) <= limit else text[: limit - 3] + "...")
