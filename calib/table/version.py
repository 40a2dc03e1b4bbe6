"""TensorRT's version, as a table's line 1 writes it: an integer."""

from __future__ import annotations

import re

from common.errors import InputError

TESTED_TENSORRT = "10.12.0"
"""TensorRT version that a table carries when none is installed and none is asked for."""

_VERSION = re.compile(r"([0-9]{1,3})\.([0-9]{1,3})\.([0-9]{1,3})(?:\.[0-9]{1,6})?", re.ASCII)


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
