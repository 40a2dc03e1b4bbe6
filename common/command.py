"""How every command ends: one line for a user's error, and the exit codes."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from common.console import printable
from common.errors import ExitCode, InputError, first_line, out_of_memory
from common.threads import share_cores

_OUTSIDE = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE}
)
"""What the operating system refuses for reasons outside this program: disk full, no permission, a failing disk."""


def run_command(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command's ``main`` and exit: user errors are one line and 2, signals 130 and 143, defects 3."""
    share_cores()
    interrupted = False

    def interrupt(signum: int, frame: FrameType | None) -> NoReturn:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, _terminate)
    # A shell starts background jobs with SIGINT ignored: it stays so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    threading.excepthook = _thread_failed
    # A name from elsewhere may hold what the terminal's encoding lacks.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        code = main(argv)
        sys.stdout.flush()
    except InputError as error:
        code = fail(str(error))
    except KeyboardInterrupt:
        code = _interrupted()
    except SystemExit as stop:
        # Lightning turns an interrupt into exit code 1, which here would mean a verdict.
        if interrupted:
            code = _interrupted()
        elif stop.code in (None, ExitCode.PASSED, ExitCode.BAD_INPUT, ExitCode.TERMINATED):
            raise
        else:
            code = fail(f"code that was imported or called ended the program: sys.exit({stop.code!r})")
    except BrokenPipeError:
        # The reader of stdout has gone (as in `| head`): nobody is left to tell.
        _discard_output()
        code = ExitCode.NO_READER
    except Exception as error:
        refused = _refusal(error)
        if isinstance(error, ModuleNotFoundError) and is_foreign(error):
            code = fail(missing(error))
        elif refused is not None:
            code = fail(f"{refused.filename or 'cannot write the output'}: {refused.strerror}")
            if refused.filename is None:
                _discard_output()
        elif out_of_memory(error):
            code = fail(f"not enough memory: {first_line(error)}" if str(error) else "not enough memory")
        else:
            code = _defect()
    finally:
        # All is done; libraries take a while to unload, and a signal then ends that without a word.
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) in (interrupt, _terminate):
                signal.signal(number, signal.SIG_DFL)
    raise SystemExit(int(code))


class ToolParser(argparse.ArgumentParser):
    """argparse's parser, with an error that is one line, for the ``python -m`` tools."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(int(ExitCode.BAD_INPUT))


def is_foreign(error: ModuleNotFoundError) -> bool:
    """Whether what is not installed is a dependency, not a part of this project."""
    top = (error.name or "").partition(".")[0]
    root = Path(__file__).resolve().parents[1]
    return bool(top) and not any((root / name).exists() for name in (top, f"{top}.py"))


def missing(error: ModuleNotFoundError) -> str:
    """The line for a dependency that is not installed."""
    package = (error.name or "").partition(".")[0]
    return f"Python package {package} is not installed: pip install -c constraints.txt -e . (or make demo)"


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    """What an exception in another thread (TensorBoard's writer) prints."""
    error = failure.exc_value
    if isinstance(error, OSError) and error.errno in _OUTSIDE:
        _say(f"warning: writing in the background failed: {printable(str(error))}")
    else:
        threading.__excepthook__(failure)


def fail(message: str) -> ExitCode:
    """Print the line of an error on stderr; the exit code that goes with it."""
    _say(f"error: {printable(' '.join(message.split()))}")
    return ExitCode.BAD_INPUT


def _say(line: str) -> None:
    """Print a line on stderr in one piece: another thread may print at the same time."""
    sys.stderr.write(f"{line}\n")


def _interrupted() -> ExitCode:
    _say("interrupted; finished files are kept")
    return ExitCode.INTERRUPTED


def _defect() -> ExitCode:
    traceback.print_exc()
    print("internal error: please report the lines above", file=sys.stderr)
    return ExitCode.INTERNAL


def _refusal(error: BaseException | None) -> OSError | None:
    """What the operating system refused, also where a library (Lightning's TensorBoard logger) made its own of it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _OUTSIDE:
            return error
        error = error.__cause__
    return None


def _discard_output() -> None:
    """Let what is left in stdout's buffer go nowhere, so that Python does not fail again when it exits."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(int(ExitCode.TERMINATED))
