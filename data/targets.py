"""Numbers that images have instead of a class, from a CSV file."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

from common.errors import InputError
from common.files import read_text

_MOST_BYTES = 1 << 30


def read_targets(path: Path) -> dict[str, tuple[float, ...]]:
    """Image's path within the data's folder -> its numbers, as many for each.

    A first line whose second cell is no number is a heading.

    Raises:
        InputError: the file cannot be read, or a line is not a path and as many finite numbers as the others have.
    """
    found: dict[str, tuple[float, ...]] = {}
    width = 0
    text = read_text(path, _MOST_BYTES).removeprefix("\ufeff")  # which spreadsheets write first
    for number, row in enumerate(csv.reader(io.StringIO(text)), start=1):
        if not row:
            continue
        values = tuple(_number(cell) for cell in row[1:])
        if number == 1 and len(row) > 1 and values[0] is None:
            continue
        numbers = tuple(value for value in values if value is not None and math.isfinite(value))
        if not numbers or len(numbers) != len(values):
            raise InputError(f"{path} line {number} is not an image's path and numbers: {','.join(row):.60}")
        width = width or len(numbers)
        if len(numbers) != width:
            raise InputError(f"{path} line {number} has {len(numbers)} numbers, the lines before {width}")
        name = Path(row[0].strip()).as_posix()
        if found.setdefault(name, numbers) != numbers:
            raise InputError(f"{path} line {number} gives {name} other numbers than a line before")
    if not found:
        raise InputError(f"{path} holds no targets: a line is an image's path and its numbers")
    return found


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None
