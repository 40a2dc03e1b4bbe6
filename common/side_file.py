"""A file and its side file: ``<file>.json``, which says what the file was made from, and holds the file's digest.

Whether the file still serves is asked of the two: :func:`changes` tells what is made from something else now, and the
digest whether the file is the one that was written.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from common.decode import decode, plain
from common.errors import InputError
from common.files import read_json, write_json

T = TypeVar("T")


def side_file(path: Path) -> Path:
    """The side file that belongs to the file ``path``."""
    return path.with_name(f"{path.name}.json")


def write_side_file(path: Path, record: Any, member: str) -> None:
    """Write ``record`` beside ``path``, which has been written before.

    If that is cut off in between, the digest in the old side file does not fit, so that the file is made again: it is
    never taken for something that it is not.

    Args:
        path: The file.
        record: A dataclass that says what it was made from.
        member: Of the record, which gets the file's digest.

    Raises:
        InputError: the file cannot be read, or the side file cannot be written.
    """
    write_json(side_file(path), {**plain(record), member: digest(path)})


def read_record(
    kind: type[T], path: Path, version: int, advice: str, missing: Mapping[str, Any] | None = None
) -> T | None:
    """Read what was recorded in a JSON file.

    Args:
        kind: A dataclass with a member ``format``.
        path: The file, a side file or another.
        version: What its ``format`` must be.
        advice: What to do where it is damaged or of another version, for the error.
        missing: Members that older files lack, and what they had.

    Returns:
        None where there is no such file.

    Raises:
        InputError: the file is damaged or of another version.
    """
    if not path.exists():
        return None
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != version:
        raise InputError(f"{path} is not a record of format {version}: {advice}")
    return decode(kind, {**(missing or {}), **content}, str(path))


def changes(recorded: Any, wanted: Any, apart: Collection[str]) -> dict[str, tuple[Any, Any]]:
    """What differs between two records of one kind: member -> what was recorded, and what would be recorded now.

    Args:
        recorded: A dataclass; one within it gives its own members (``subset seed``).
        wanted: Likewise.
        apart: Members that may differ.
    """
    before, after = dict(_members(recorded, apart)), dict(_members(wanted, apart))
    return {name: (old, after[name]) for name, old in before.items() if old != after[name]}


def _members(record: Any, apart: Collection[str]) -> Iterator[tuple[str, Any]]:
    for name in (field.name for field in dataclasses.fields(record) if field.name not in apart):
        value = getattr(record, name)
        if dataclasses.is_dataclass(value):
            yield from ((f"{name} {inner}", item) for inner, item in _members(value, ()))
        else:
            yield name, plain(value)


def digest(path: Path) -> str:
    """SHA-256 of a file, in hex. Raises InputError if it cannot be read."""
    if not path.is_file():
        raise InputError(f"cannot read {path}: it is no file")
    result = hashlib.sha256()
    try:
        with open(path, "rb") as stream:
            for block in iter(lambda: stream.read(1 << 20), b""):
                result.update(block)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    return result.hexdigest()
