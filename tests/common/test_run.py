import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import common.run
from common.errors import InputError
from common.run import Run

ROOT = Path(common.run.__file__).parents[1]


@pytest.mark.parametrize("name", ["a", "A1", "0", "lenet_mnist", "v1.2-rc_3", "x" * 100])
def test_names(name):
    assert Run(name, Path("artifacts")).folder == Path("artifacts") / name


@pytest.mark.parametrize(
    "name",
    # Last: markup, patterns, the right-to-left override, a digit that is none of ASCII's.
    [
        *("", ".", "..", "../x", "a/b", "/etc", "a\\b", ".hidden", "-x", "_x", "a b", "a\n", "a\0b", "x" * 101),
        *("~", "$HOME", "<script>", "a:b", "a*", "\u202etxt", "\u0661"),
    ],
)
def test_names_that_could_lead_elsewhere(name):
    with pytest.raises(InputError, match="is not usable: take letters, digits") as caught:
        Run(name, Path("artifacts"))
    assert len(str(caught.value)) < 400


@given(st.text(max_size=20))
def test_any_name_stays_in_its_folder_or_is_refused(name):
    try:
        run = Run(name, Path("/artifacts"))
    except InputError:
        return
    paths = [run.checkpoint, run.table("N"), run.onnx("N", "fp32"), run.onnx_table("N")]
    for path in paths:
        assert os.path.normpath(path) == str(path)
        assert path.is_relative_to(Path("/artifacts") / name)


def test_the_lock_holds_its_process(tmp_path):
    run = Run("run", tmp_path)
    with run.locked():
        assert (run.folder / ".lock").read_text() == f"{os.getpid()}\n"
        message = rf"another command \(process {os.getpid()}\) is working on .*run: wait"
        with pytest.raises(InputError, match=message), run.locked():
            pytest.fail("locked twice")
    with run.locked():
        pass


def test_the_lock_is_released_by_an_exception(tmp_path):
    run = Run("run", tmp_path)
    with pytest.raises(KeyboardInterrupt), run.locked():
        raise KeyboardInterrupt
    with run.locked():
        pass


HOLDER = """
import sys, time; sys.path.insert(0, sys.argv[1])
from pathlib import Path
from common.run import Run
with Run("run", Path(sys.argv[2])).locked():
    print("locked", flush=True)
    time.sleep(100)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_lock_dies_with_its_holder(tmp_path, number):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(ROOT), str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"locked\n"
    run = Run("run", tmp_path)
    with pytest.raises(InputError, match=rf"process {holder.pid}\)"), run.locked():
        pytest.fail("locked twice")
    holder.send_signal(number)
    holder.wait()
    with run.locked():
        assert (run.folder / ".lock").read_text() == f"{os.getpid()}\n"


def test_a_longer_old_number_is_overwritten_and_nonsense_is_not_shown(tmp_path):
    run = Run("run", tmp_path)
    run.folder.mkdir()
    (run.folder / ".lock").write_bytes(b"\xff" * 1000)
    with run.locked():
        assert (run.folder / ".lock").read_text() == f"{os.getpid()}\n"
        (run.folder / ".lock").write_bytes(b"")
        with pytest.raises(InputError, match=r"\(process unknown\)"), run.locked():
            pytest.fail("locked twice")


def test_no_folder_is_made_for_a_run_that_there_is_not(tmp_path):
    run = Run("typo", tmp_path)
    with pytest.raises(InputError, match=r"there is no run .*typo: run train.py first"), run.locked(create=False):
        pytest.fail("locked")
    assert not list(tmp_path.iterdir())


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    target = tmp_path / "precious"
    target.write_text("content")
    run = Run("run", tmp_path)
    run.folder.mkdir()
    (run.folder / ".lock").symlink_to(target)
    with pytest.raises(InputError, match="cannot write"), run.locked():
        pytest.fail("locked")
    assert target.read_text() == "content"


def test_folders_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "run").write_text("x")
    for run in (Run("run", tmp_path / "file"), Run("run", tmp_path)):
        with pytest.raises(InputError, match="cannot write"), run.locked():
            pytest.fail("locked")
    with pytest.raises(InputError, match="must not contain NUL"), Run("run", Path("a\0b")).locked():
        pytest.fail("locked")


def test_a_full_disk_does_not_keep_a_command_from_reading(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with Run("run", tmp_path).locked():
        assert (tmp_path / "run" / ".lock").read_text() == ""


def test_a_file_system_without_locks_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(37, "No locks available")))
    with pytest.raises(InputError, match=r"^cannot lock .*: No locks available$"), Run("run", tmp_path).locked():
        pytest.fail("locked")
