"""How commands end, each in a process of its own."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import common.command
from common.errors import ExitCode

ROOT = Path(common.command.__file__).parents[1]
START = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom common.command import run_command\n"


def end(body: str, **options) -> subprocess.CompletedProcess[str]:
    """Run a command whose main has this body (indented lines)."""
    code = f"{START}import errno, os, signal, threading, time\nfrom common.errors import InputError\n"
    code += "def main(argv):\n" + "".join(f"    {line}\n" for line in body.splitlines()) + "run_command(main)\n"
    options = {"capture_output": True, **options}
    return subprocess.run([sys.executable, "-c", code], text=True, timeout=60, check=False, **options)


@pytest.mark.parametrize(
    ("body", "code", "error"),
    [
        ("return 0", 0, ""),
        ("return 1", 1, ""),
        ("from common.errors import ExitCode; return ExitCode.FAILED", 1, ""),
        ("raise InputError('what is wrong:\\n  do this')", 2, "error: what is wrong: do this\n"),
        ("raise InputError('name \\x1b[2J\\r\\u202e\\udcff')", 2, "error: name \\x1b[2J \\u202e\\udcff\n"),
        ("raise OSError(errno.ENOSPC, 'No space left', 'a/b')", 2, "error: a/b: No space left\n"),
        ("raise PermissionError(errno.EACCES, 'Permission denied', 'a')", 2, "error: a: Permission denied\n"),
        (
            "try: raise OSError(errno.EIO, 'Input/output error', 'a')\nexcept OSError as e: raise ValueError(1) from e",
            2,
            "error: a: Input/output error\n",
        ),
        (
            "raise ModuleNotFoundError(name='torch.cuda')",
            2,
            "error: Python package torch is not installed: pip install -c constraints.txt -e . (or make demo)\n",
        ),
        ("raise MemoryError('array of 8 TB')", 2, "error: not enough memory: array of 8 TB\n"),
        ("raise MemoryError", 2, "error: not enough memory\n"),
        (
            "raise RuntimeError('[enforce fail] DefaultCPUAllocator: can\\'t allocate memory: you tried 9 bytes')",
            2,
            "error: not enough memory: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes\n",
        ),
        (
            "raise RuntimeError('CUDA error: out of memory\\nCUDA kernel errors might be reported elsewhere')",
            2,
            "error: not enough memory: CUDA error: out of memory\n",
        ),
        ("raise KeyboardInterrupt", 130, "interrupted; finished files are kept\n"),
        ("os.kill(os.getpid(), signal.SIGINT); time.sleep(9)", 130, "interrupted; finished files are kept\n"),
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)", 143, ""),
        ("raise SystemExit(2)", 2, ""),
        ("sys.exit('bye')", 2, "error: code that was imported or called ended the program: sys.exit('bye')\n"),
    ],
)
def test_codes_and_words(body, code, error):
    ended = end(body)
    assert (ended.returncode, ended.stderr, ended.stdout) == (code, error, "")


@pytest.mark.parametrize(
    "raised",
    [
        *("ValueError(1)", "OSError(1)", "FileNotFoundError(2, 'x')"),
        *("ModuleNotFoundError(name='calib.x')", "RuntimeError(1)"),
    ],
)
def test_a_defect_shows_its_traceback(raised):
    ended = end(f"raise {raised}")
    assert ended.returncode == 3
    assert ended.stderr.startswith("Traceback")
    assert ended.stderr.endswith("internal error: please report the lines above\n")


@pytest.mark.parametrize("command", ["train.py", "quantize.py", "evaluate.py"])
def test_nothing_is_installed(command):
    """-S leaves the installed packages out."""
    line = [sys.executable, "-S", command]
    ended = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert re.fullmatch(r"error: Python package \w+ is not installed: .*\n", ended.stderr), ended.stderr


def test_lightnings_exit_after_an_interrupt_is_no_verdict():
    """Lightning catches KeyboardInterrupt and calls sys.exit(1)."""
    ended = end("try: os.kill(os.getpid(), signal.SIGINT); time.sleep(9)\nexcept KeyboardInterrupt: sys.exit(1)")
    assert ended.returncode == 130


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_interpreter_ends_is_silent(number):
    ended = end(f"import atexit; atexit.register(os.kill, os.getpid(), {int(number)}); return 0")
    assert (ended.returncode, ended.stderr) == (-number, "")


def test_what_a_signal_interrupts_is_cleared_up(tmp_path):
    body = (
        "from pathlib import Path; from common.files import atomic_path\n"
        f"with atomic_path(Path({str(tmp_path)!r}) / 'file') as temporary:\n"
        "    temporary.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)\n"
    )
    assert end(body).returncode == 143
    assert not list(tmp_path.iterdir())


def test_an_ignored_interrupt_stays_ignored():
    """As in a background job of a shell."""
    code = f"{START}import os, signal\nrun_command(lambda argv: os.kill(os.getpid(), signal.SIGINT) or 0)"
    ended = subprocess.run(
        [sys.executable, "-c", code],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        capture_output=True,
        check=False,
    )
    assert ended.returncode == 0


def test_a_reader_that_has_gone_is_no_verdict():
    reader, writer = os.pipe()
    os.close(reader)
    for body in ("print('x' * 1_000_000); return 0", "print('x'); return 0"):
        ended = end(body, capture_output=False, stdout=writer, stderr=subprocess.PIPE)
        assert (ended.returncode, ended.stderr) == (ExitCode.NO_READER, "")
    os.close(writer)


def test_output_that_cannot_be_written_is_one_line():
    with open("/dev/full", "w") as full:
        ended = end("print('x'); return 0", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert (ended.returncode, ended.stderr) == (2, "error: cannot write the output: No space left on device\n")


def test_a_terminal_that_lacks_a_character_gets_an_escape():
    ended = end("print('\\u2500 \\udcff'); return 0", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (ended.returncode, ended.stdout) == (0, "\\u2500 \\udcff\n")


def test_a_background_writer_that_fails_is_one_line():
    body = "def write(): {}\nthread = threading.Thread(target=write); thread.start(); thread.join(); return 0"
    ended = end(body.format("raise OSError(errno.ENOSPC, 'No space left on device')"))
    assert (ended.returncode, ended.stdout) == (0, "")
    assert ended.stderr == "warning: writing in the background failed: [Errno 28] No space left on device\n"
    assert "ZeroDivisionError" in end(body.format("1 / 0")).stderr
