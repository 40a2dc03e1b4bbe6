"""Reader of idx files, the format of MNIST, strict and bounded: the files may come from anywhere.

An idx file is big-endian: two zero bytes, a type code, the number of dimensions, one uint32 per dimension, then the
elements, and nothing after them. Definition: the MNIST page of Yann LeCun, "the IDX file format".
"""

from __future__ import annotations

import gzip
import hashlib
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from common.errors import InputError

MAX_BYTES = 1 << 30
"""No file is read beyond this, whatever its header promises; EMNIST's largest file has 547 MB."""

_UINT8 = 0x08
_TYPE_NAMES = {0x09: "int8", 0x0B: "int16", 0x0C: "int32", 0x0D: "float32", 0x0E: "float64"}
_GZIP_MAGIC = b"\x1f\x8b"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class IdxFile:
    """The content of one idx file.

    Attributes:
        values: uint8, of the shape in the header.
        sha256: Hex digest of the whole decompressed file, header included, so that raw and gzipped copies agree.
    """

    values: Tensor
    sha256: str


def read_idx(path: Path, dimensions: int) -> IdxFile:
    """Read an idx file of unsigned bytes, raw or gzipped (told by its content, not by its name).

    Memory is bounded by what the file holds, by what its header promises and by ``MAX_BYTES``: a gzip bomb is left
    one byte after the promised end.

    Args:
        path: The file.
        dimensions: How many it must have: 3 for images, 1 for labels.

    Raises:
        InputError: the file cannot be read, is no idx file of unsigned bytes with that many dimensions, is empty,
            truncated, corrupt, too large, or goes on after the promised end. The message names the file.
    """
    try:
        with _opened(path) as stream:
            return _parse(path, stream, dimensions)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is a truncated or corrupt gzip file ({error}): fetch it again") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


class _Stream(Protocol):
    def read(self, size: int, /) -> bytes: ...


@contextmanager
def _opened(path: Path) -> Iterator[_Stream]:
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is not a regular file")
    with open(path, "rb") as stream:
        magic = stream.read(len(_GZIP_MAGIC))
        stream.seek(0)
        if magic == _GZIP_MAGIC:
            with gzip.GzipFile(fileobj=stream, mode="rb") as decompressed:
                yield decompressed
        else:
            yield stream


def _parse(path: Path, stream: _Stream, dimensions: int) -> IdxFile:
    header = stream.read(4)
    if len(header) < 4 or header[:2] != b"\0\0" or header[2] not in (_UINT8, *_TYPE_NAMES) or header[3] == 0:
        raise InputError(f"{path} is not an idx file (it starts with {header.hex(' ') or 'nothing'})")
    if header[2] != _UINT8:
        raise InputError(f"{path} holds {_TYPE_NAMES[header[2]]} elements; only unsigned bytes are supported")
    if header[3] != dimensions:
        raise InputError(
            f"{path} holds {_content(header[3])} where {_content(dimensions)} are expected: are two files swapped?"
        )
    sizes = stream.read(4 * dimensions)
    if len(sizes) < 4 * dimensions:
        raise InputError(f"{path} is truncated: it ends within its header")
    shape = struct.unpack(f">{dimensions}I", sizes)
    length = prod(shape)
    if length == 0:
        raise InputError(f"{path} is empty: its header gives the shape {_times(shape)}")
    if length > MAX_BYTES:
        raise InputError(f"{path} promises {length:,} bytes ({_times(shape)}), more than the {MAX_BYTES:,} allowed")

    content = bytearray()
    digest = hashlib.sha256(header + sizes)
    while len(content) < length:
        chunk = stream.read(min(_CHUNK, length - len(content)))
        if not chunk:
            raise InputError(f"{path} is truncated: {len(content):,} of {length:,} bytes ({_times(shape)})")
        digest.update(chunk)
        content += chunk
    # Reading on also makes gzip check its CRC.
    if stream.read(1):
        raise InputError(f"{path} goes on after the {length:,} bytes ({_times(shape)}) that its header promises")
    return IdxFile(torch.frombuffer(content, dtype=torch.uint8).view(shape), digest.hexdigest())


def _content(dimensions: int) -> str:
    return {1: "labels (1 dimension)", 3: "images (3 dimensions)"}.get(dimensions, f"{dimensions}-dimensional data")


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(f"{size:,}" for size in shape)
