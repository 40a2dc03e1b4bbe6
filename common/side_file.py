"""A file and its side file: ``<file>.json``, which says what the file was made from, and holds the file's digest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from common.decode import encode
from common.errors import InputError
from common.files import write_json


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
    write_json(side_file(path), {**json.loads(encode(record)), member: digest(path)})


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
