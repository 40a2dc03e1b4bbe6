import errno
import fcntl
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from common import files
from common.errors import InputError
from common.files import (
    atomic_path,
    read_bytes,
    read_json,
    read_text,
    write_bytes,
    write_json,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_round_trips(tmp_path):
    write_text(tmp_path / "a.txt", "grün\n")
    write_bytes(tmp_path / "b.bin", memoryview(b"\0\xff"))
    write_json(tmp_path / "new" / "folder" / "c.json", {"a": [1, None, 0.1]})
    assert read_text(tmp_path / "a.txt") == "grün\n"
    assert read_bytes(tmp_path / "b.bin") == b"\0\xff"
    assert read_json(tmp_path / "new" / "folder" / "c.json") == {"a": [1, None, 0.1]}
    assert names(tmp_path) == ["a.txt", "b.bin", "new"]


class Oops(Exception):
    pass


@pytest.mark.parametrize("raised", [Oops, KeyboardInterrupt, SystemExit])
def test_a_failing_writer_leaves_the_old_file_and_nothing_else(tmp_path, raised):
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(raised), atomic_path(path) as temporary:
        temporary.write_text("half of the ne")
        raise raised
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES, errno.EDQUOT])
@pytest.mark.parametrize("where", ["open", "fsync", "replace", "chmod"])
def test_what_the_system_refuses_is_one_line(tmp_path, monkeypatch, where, number):
    path = tmp_path / "file"
    write_text(path, "old")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(*((Path, "chmod") if where == "chmod" else (os, where)), refuse)
    with pytest.raises(InputError) as caught:
        write_text(path, "new")
    monkeypatch.undo()
    assert str(caught.value) == f"cannot write {path}: {os.strerror(number)}"
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_write_cut_short_by_a_full_disk(tmp_path):
    """A real limit: the kernel lets a file grow to 1,000 bytes and not beyond."""
    code = (
        "import resource, signal, sys; sys.path.insert(0, sys.argv[2])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from pathlib import Path\n"
        "from common.files import write_text\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: write_text(Path(sys.argv[1]), 'x' * 5000)\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    path = tmp_path / "file"
    path.write_text("old")
    root = str(Path(files.__file__).parents[1])
    ended = subprocess.run([sys.executable, "-c", code, str(path), root], capture_output=True, text=True, check=True)
    assert ended.stdout == f"InputError cannot write {path}: File too large\n"
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_folders_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "inside", tmp_path / "folder", tmp_path / ("x" * 300), Path("/"), Path(".")):
        with pytest.raises(InputError, match=r"^cannot write "):
            write_text(path, "new")
    assert names(tmp_path) == ["file", "folder"]


def test_a_name_with_nul_is_bad_input(tmp_path):
    for act in (read_text, lambda path: write_text(path, "x")):
        with pytest.raises(InputError, match="must not contain NUL"):
            act(tmp_path / "a\0b")
        with pytest.raises(InputError, match="must not contain NUL"):
            act(tmp_path / "a\0b" / "c")


def test_other_value_errors_of_the_writer_pass(tmp_path):
    with pytest.raises(ValueError, match="not JSON"):
        write_json(tmp_path / "file", float("nan"))
    with pytest.raises(ValueError, match="mine"), atomic_path(tmp_path / "file"):
        raise ValueError("mine")
    assert names(tmp_path) == []


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        with atomic_path(tmp_path / "file") as temporary:
            assert stat.S_IMODE(temporary.stat().st_mode) == 0o600
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask


def test_a_link_is_replaced_and_its_target_kept(tmp_path):
    target = tmp_path / "target"
    target.write_text("precious")
    (tmp_path / "link").symlink_to(target)
    write_text(tmp_path / "link", "new")
    assert target.read_text() == "precious"
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "link").read_text() == "new"


def test_a_linked_folder_is_written_through(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "artifacts").symlink_to(tmp_path / "elsewhere")
    write_text(tmp_path / "artifacts" / "file", "new")
    assert (tmp_path / "elsewhere" / "file").read_text() == "new"


def test_a_planted_link_in_place_of_the_temporary_file_is_not_followed(tmp_path, monkeypatch):
    target = tmp_path / "target"
    target.write_text("precious")
    monkeypatch.setattr(files.secrets, "token_hex", lambda count: "0" * (2 * count))
    (tmp_path / ".file.0000000000000000.tmp").symlink_to(target)
    with pytest.raises(InputError, match="File exists"):
        write_text(tmp_path / "file", "new")
    assert target.read_text() == "precious"


LEFTOVER = ".file.0123456789abcdef.tmp"


def test_leftovers_of_killed_writers_are_removed_by_the_next(tmp_path):
    kept = [".file.tmp", ".file.0123456789abcde.tmp", ".other.0123456789abcdef.tmp", ".file.0123456789abcdef.tm"]
    for name in (LEFTOVER, ".file.fedcba9876543210.tmp", *kept):
        (tmp_path / name).write_text("half")
    write_text(tmp_path / "file", "new")
    assert names(tmp_path) == sorted(["file", *kept])


def test_what_looks_like_a_leftover_and_is_none_stays(tmp_path):
    (tmp_path / LEFTOVER).mkdir()
    (tmp_path / "precious").write_text("x")
    (tmp_path / ".file.fedcba9876543210.tmp").symlink_to(tmp_path / "precious")
    os.mkfifo(tmp_path / ".file.ffffffffffffffff.tmp")
    write_text(tmp_path / "file", "new")
    assert (tmp_path / "precious").read_text() == "x"
    assert (tmp_path / LEFTOVER).is_dir()


def test_a_living_writers_file_is_not_taken_for_a_leftover(tmp_path):
    with atomic_path(tmp_path / "file") as first:
        first.write_text("first")
        write_text(tmp_path / "file", "second")
        assert (tmp_path / "file").read_text() == "second"
        assert first.exists()
    assert (tmp_path / "file").read_text() == "first"
    assert names(tmp_path) == ["file"]


def test_a_file_that_is_taken_for_a_leftover_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    real, removed = fcntl.flock, []

    def race(descriptor, operation):
        if not removed:
            removed.extend(tmp_path.glob(".file.*.tmp"))
            removed[0].unlink()
        real(descriptor, operation)

    monkeypatch.setattr(files.fcntl, "flock", race)
    write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"
    assert len(removed) == 1
    assert names(tmp_path) == ["file"]


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(files.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks")))
    (tmp_path / LEFTOVER).write_text("half")
    write_text(tmp_path / "file", "new")
    assert names(tmp_path) == [LEFTOVER, "file"]


def test_many_writers_at_once(tmp_path):
    """Whoever is last wins; what can be read is always whole."""
    path, texts = tmp_path / "file", [f"{index}" * 5000 for index in range(8)]
    write_text(path, texts[0])
    failures: list[str] = []

    def write(text: str) -> None:
        for _ in range(20):
            write_text(path, text)
            if (found := read_text(path)) not in texts:
                failures.append(found)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert names(tmp_path) == ["file"]


def test_reading_is_bounded(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 11)
    assert read_bytes(path, 11) == b"x" * 11
    for read in (read_bytes, read_text, read_json):
        with pytest.raises(InputError, match="larger than 10 bytes"):
            read(path, 10)
    with pytest.raises(InputError, match="larger than"):
        read_bytes(Path("/dev/zero"), 1000)


def test_what_cannot_be_read_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"^cannot read .*missing: No such file or directory$"):
        read_bytes(tmp_path / "missing")
    with pytest.raises(InputError, match="Is a directory"):
        read_bytes(tmp_path)
    (tmp_path / "binary").write_bytes(b"ab\xff")
    with pytest.raises(InputError, match=r"is not UTF-8 text \(byte 2\)$"):
        read_text(tmp_path / "binary")
    (tmp_path / "windows").write_text("TRT-8501-EntropyCalibration2", encoding="utf-16")
    with pytest.raises(InputError, match="is not UTF-8 text but UTF-16, as PowerShell writes it"):
        read_text(tmp_path / "windows")


@pytest.mark.parametrize(
    "text", ["", "{", "NaN", "[Infinity]", '{"a": -Infinity}', "[" * 100_000, "1" * 5000, "'a'", "{'a': 1}", "\ufeff{}"]
)
def test_what_is_not_json_is_one_line(tmp_path, text):
    (tmp_path / "file").write_text(text)
    with pytest.raises(InputError, match=r"file is not valid JSON: ") as caught:
        read_json(tmp_path / "file")
    assert "\n" not in str(caught.value)


def test_a_name_that_is_not_text_does_not_stop_a_report(tmp_path):
    write_text(tmp_path / "file", "artifacts/\udcff/run")
    assert (tmp_path / "file").read_text() == "artifacts/\\udcff/run"
