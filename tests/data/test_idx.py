import gzip
import hashlib
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import InputError
from data.idx import read_idx
from tests.data.sets import idx_bytes

PIXELS = torch.arange(2 * 3 * 5, dtype=torch.uint8).view(2, 3, 5)


def header(*sizes: int, kind: int = 8, dimensions: int | None = None) -> bytes:
    return struct.pack(f">4B{len(sizes)}I", 0, 0, kind, len(sizes) if dimensions is None else dimensions, *sizes)


@pytest.fixture
def write(tmp_path: Path):
    def write_file(content: bytes, name: str = "file-idx3-ubyte") -> Path:
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write_file


def test_gzip_is_told_by_content_not_by_name(write):
    assert torch.equal(read_idx(write(gzip.compress(idx_bytes(PIXELS)), "plain"), 3).values, PIXELS)
    assert torch.equal(read_idx(write(idx_bytes(PIXELS), "named.gz"), 3).values, PIXELS)


def test_several_gzip_members_are_one_file(write):
    content = idx_bytes(PIXELS)
    assert torch.equal(read_idx(write(gzip.compress(content[:9]) + gzip.compress(content[9:])), 3).values, PIXELS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not an idx file (it starts with nothing)"),
        (b"\x89PNG\r\n\x1a\n" + bytes(60), "is not an idx file"),
        (b"\0\1" + header(1, 1, 1)[2:] + b"x", "is not an idx file"),
        (header(1, kind=7) + b"x", "is not an idx file"),
        (header(dimensions=0), "is not an idx file"),
        (header(1, 1, 1, kind=0x0D) + b"xxxx", "holds float32 elements; only unsigned bytes"),
        (header(5) + b"12345", "holds labels (1 dimension) where images (3 dimensions) are expected"),
        (header(1, 1, 1, 1) + b"x", "holds 4-dimensional data where images"),
        (header(1, 1, 1)[:9], "ends within its header"),
        (header(0, 28, 28), "is empty"),
        (header(2, 0, 3), "is empty"),
        (header(2, 3, 4) + bytes(23), "is truncated: 23 of 24 bytes"),
        (header(2, 3, 4) + bytes(25), "goes on after the 24 bytes"),
        (header(0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF), "more than the 1,073,741,824 allowed"),
    ],
)
@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["raw", "gzip"])
def test_wrong_content_is_named(write, compress, content, message):
    path = write(compress(content))
    with pytest.raises(InputError) as caught:
        read_idx(path, 3)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_gzip_with_a_wrong_crc_is_found(write):
    content = bytearray(gzip.compress(idx_bytes(PIXELS)))
    content[-8] ^= 1
    with pytest.raises(InputError, match="truncated or corrupt gzip file"):
        read_idx(write(bytes(content)), 3)


def bomb() -> bytes:
    """256 MiB behind the header of 1,000 bytes, gzipped."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, 31)
    parts = [compressor.compress(header(10, 10, 10))]
    parts += [compressor.compress(bytes(1 << 20)) for _ in range(256)]
    return b"".join([*parts, compressor.flush()])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bomb(), "goes on after the 1,000 bytes"),
        (header(1000, 1000, 1000) + b"x", "is truncated: 1 of 1,000,000,000 bytes"),
    ],
    ids=["bomb", "promise"],
)
def test_neither_a_gzip_bomb_nor_a_promise_takes_memory(write, content, message):
    path = write(content)
    tracemalloc.start()
    with pytest.raises(InputError, match=message):
        read_idx(path, 3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20


def test_missing_file_folder_and_pipe(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*absent: No such file"):
        read_idx(tmp_path / "absent", 3)
    with pytest.raises(InputError, match="is not a regular file"):
        read_idx(tmp_path, 3)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is not a regular file"):
        read_idx(tmp_path / "pipe", 3)


@settings(max_examples=100)
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
    compress=st.sampled_from([bytes, gzip.compress]),
)
def test_round_trip_of_any_shape(tmp_path_factory, shape, seed, compress):
    values = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    path = tmp_path_factory.getbasetemp() / "round-trip"
    path.write_bytes(compress(idx_bytes(values)))
    file = read_idx(path, len(shape))
    assert torch.equal(file.values, values)
    assert file.values.dtype == torch.uint8
    assert file.sha256 == hashlib.sha256(idx_bytes(values)).hexdigest()
