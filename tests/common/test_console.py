import logging
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.console import PACKAGES, print_table, printable, start_logging


@pytest.fixture(autouse=True)
def _loggers_as_they_were():
    loggers = [logging.getLogger(name) for name in PACKAGES]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers[:], logger.level, logger.propagate = handlers, level, propagate


def test_logs_go_to_stderr_and_warnings_say_so(capsys):
    start_logging()
    start_logging()
    logging.getLogger("train").info("hello %d", 1)
    logging.getLogger("calib.plan").warning("careful")
    logging.getLogger("data").error("bad \x1b[31m")
    logging.getLogger("models").debug("quiet")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "hello 1\nwarning: careful\nerror: bad \\x1b[31m\n"


def test_tables_go_to_stdout_without_markup(capsys):
    print_table("scales \x1b[2J", ("tensor", "scale"), [("[bold]conv1[/bold]\x1b]0;owned\x07", "0.5")])
    out, err = capsys.readouterr()
    assert err == ""
    assert "[bold]conv1[/bold]\\x1b]0;owned\\x07" in out
    assert "\x1b" not in out
    assert "\x07" not in out


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ä 漢\n\t", "plain ä 漢\n\t"),
        ("\x1b[2J\r\x00\x9b", "\\x1b[2J\\r\\x00\\x9b"),
        ("\u202etxt.exe", "\\u202etxt.exe"),
        ("\udcff", "\\udcff"),
    ],
)
def test_control_characters_are_shown_as_escapes(text, shown):
    assert printable(text) == shown


@given(st.text())
def test_any_text_becomes_printable(text):
    assert all(character.isprintable() or character in "\n\t" for character in printable(text))


def test_what_libraries_print_goes_to_stderr(root):
    script = (
        "import os\n"
        "from common.console import stdout_to_stderr\n"
        "print('before')\n"
        "with stdout_to_stderr():\n"
        "    print('from Python')\n"
        "    os.write(1, b'from C\\n')\n"
        "    os.system('echo from a child')\n"
        "print('after')\n"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout == "before\nafter\n"
    assert sorted(result.stderr.splitlines()) == ["from C", "from Python", "from a child"]
