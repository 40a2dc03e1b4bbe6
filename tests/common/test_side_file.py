"""What differs between two records of what a file was made from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from common.errors import InputError
from common.side_file import changes, read_record, side_file, write_side_file


@dataclass(frozen=True)
class Inner:
    seed: int


@dataclass(frozen=True)
class Record:
    inner: Inner
    sizes: tuple[int, ...]
    source: Path
    digest: str = ""
    format: int = 3


RECORD = Record(Inner(1), (1, 2), Path("images"))


def test_a_record_reads_back_without_changes(tmp_path: Path) -> None:
    path = tmp_path / "made"
    path.write_text("content")
    write_side_file(path, RECORD, "digest")
    found = read_record(Record, side_file(path), 3, "make it again")
    assert found is not None
    assert len(found.digest) == 64
    assert changes(found, RECORD, apart=("digest",)) == {}
    assert changes(found, RECORD, apart=()) == {"digest": (found.digest, "")}


def test_members_of_a_record_within_are_named() -> None:
    now = replace(RECORD, inner=Inner(2), sizes=(1, 3))
    assert changes(RECORD, now, apart=()) == {"inner seed": (1, 2), "sizes": ([1, 2], [1, 3])}


def test_another_version_is_refused_and_none_is_none(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    assert read_record(Record, path, 3, "make it again") is None
    path.write_text('{"format": 2}')
    with pytest.raises(InputError, match="record of format 3: make it again"):
        read_record(Record, path, 3, "make it again")
