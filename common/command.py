"""How every command ends: one line for a user's error, and the exit codes."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

from common.errors import ExitCode, InputError


def run_command(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command's ``main`` and exit: user errors are one line and 2, signals 130 and 143, defects 3."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = main(argv)
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = ExitCode.BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted; finished files are kept", file=sys.stderr)
        code = ExitCode.INTERRUPTED
    except SystemExit:
        raise
    except BrokenPipeError:
        # The reader of stdout has gone (as in `| head`): nobody is left to tell.
        sys.stderr.close()
        code = ExitCode.FAILED
    except Exception:
        traceback.print_exc()
        print("internal error: please report the lines above", file=sys.stderr)
        code = ExitCode.INTERNAL
    raise SystemExit(int(code))


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(int(ExitCode.TERMINATED))
