import os
import socket
import sys
from http.client import IncompleteRead
from pathlib import Path
from unittest.mock import Mock
from urllib.error import URLError

import pytest

from common.errors import InputError
from data.locate import NotAvailableError, default_folder, downloading, is_folder, locate, move_into


def missing(folder: Path) -> list[str]:
    return [name for name in ("a", "b") if not (folder / name).exists()]


@pytest.fixture
def make(tmp_path: Path):
    def make_folder(name: str, files: str = "ab") -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        for file in files:
            (folder / file).touch()
        return folder

    return make_folder


def test_places_are_searched_in_order(make, isolated, monkeypatch):
    named, from_variable, implicit = make("named"), make("variable"), make("implicit")
    default = make("cache/int8-workflow/thing")
    monkeypatch.setenv("THING_DIR", str(from_variable))
    assert locate("thing", named, "THING_DIR", missing, [implicit]) == named
    assert locate("thing", None, "THING_DIR", missing, [implicit]) == from_variable
    monkeypatch.setenv("THING_DIR", "")
    assert locate("thing", None, "THING_DIR", missing, [implicit]) == implicit
    assert locate("thing", None, "THING_DIR", missing) == default
    assert locate("other", None, "THING_DIR", missing) is None


def test_a_named_folder_is_never_passed_over(make, isolated, monkeypatch):
    complete, partial = make("complete"), make("partial", "a")
    make("cache/int8-workflow/thing")
    monkeypatch.setenv("THING_DIR", str(complete))
    with pytest.raises(InputError, match=r"partial \(data\.dir\) lacks b"):
        locate("thing", partial, "THING_DIR", missing)
    with pytest.raises(InputError, match=r"absent \(data\.dir\) is not a folder"):
        locate("thing", partial.parent / "absent", "THING_DIR", missing)
    monkeypatch.setenv("THING_DIR", str(partial))
    with pytest.raises(InputError, match=r"partial \(environment variable THING_DIR\) lacks b"):
        locate("thing", None, "THING_DIR", missing)


def test_an_incomplete_place_that_nobody_named_is_passed_over_with_a_warning(make, isolated, caplog):
    partial, default = make("partial", "a"), make("cache/int8-workflow/thing")
    assert locate("thing", None, "THING_DIR", missing, [partial]) == default
    assert f"{partial} is passed over: it lacks b" in caplog.text


def test_home_is_expanded(make, isolated, monkeypatch):
    folder = make("home/images")
    monkeypatch.setenv("HOME", str(folder.parent))
    assert locate("thing", Path("~/images"), "THING_DIR", missing) == folder


def test_what_cannot_be_read_is_an_error_if_named_and_passed_over_if_not(make, isolated, caplog):
    named = make("named")

    def denied(folder: Path) -> list[str]:
        raise PermissionError(13, "Permission denied")

    with pytest.raises(InputError, match=r"named \(data\.dir\) cannot be read \(Permission denied\)"):
        locate("thing", named, "THING_DIR", denied)
    assert locate("thing", None, "THING_DIR", denied, [named]) is None
    assert "named is passed over: it cannot be read" in caplog.text
    with pytest.raises(InputError, match="nobody-of-that-name"):
        locate("thing", Path("~nobody-of-that-name/images"), "THING_DIR", missing)
    with pytest.raises(InputError, match=r"cannot read .*File name too long"):
        is_folder(Path("x" * 5000))


def test_a_user_without_a_home_has_no_default_folder(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError("Could not determine home directory.")))
    with pytest.raises(NotAvailableError, match="has no home folder; set XDG_CACHE_HOME"):
        locate("thing", None, "THING_DIR", missing)


def test_default_folder_follows_the_xdg_specification(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_folder("mnist") == tmp_path / ".cache/int8-workflow/mnist"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_folder("mnist") == tmp_path / ".cache/int8-workflow/mnist"
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert default_folder("mnist") == Path("/elsewhere/int8-workflow/mnist")


def test_download_goes_beside_the_target_and_is_moved(tmp_path, capsys):
    target = tmp_path / "cache" / "thing"
    before = socket.getdefaulttimeout()
    with downloading("Thing", target) as folder:
        assert folder.parent == target.parent
        assert socket.getdefaulttimeout() is not None
        print("progress")
        (folder / "a").write_text("new")
        move_into(target, [folder / "a"])
    assert (target / "a").read_text() == "new"
    assert os.listdir(target.parent) == ["thing"]
    assert socket.getdefaulttimeout() == before
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith("progress\n")
    assert sys.stdout is not sys.stderr


@pytest.mark.parametrize(
    "error",
    [
        URLError("no route"),
        TimeoutError("timed out"),
        RuntimeError("Error downloading\nTried one\nno route"),
        IncompleteRead(b""),
    ],
)
def test_a_failed_download_is_one_line_and_leaves_nothing(tmp_path, error):
    target = tmp_path / "thing"
    with (
        pytest.raises(NotAvailableError, match=r"Thing could not be downloaded to \S+ \(") as caught,
        downloading("Thing", target),
    ):
        raise error
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(NotAvailableError, match="could not be downloaded"),
        downloading("T", tmp_path / "file" / "thing"),
    ):
        pass
