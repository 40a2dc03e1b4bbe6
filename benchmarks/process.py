"""Processes that a benchmark starts."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from common.cli import ROOT
from common.errors import InputError


def run_process(what: str, line: Sequence[str], codes: Sequence[int] = (0,)) -> subprocess.CompletedProcess[str]:
    """Run a command line in the checkout and return what it printed.

    Args:
        what: Its name, for the message.
        line: The program and its arguments.
        codes: Exit codes that are no failure.

    Raises:
        InputError: another exit code; the message ends with the last line on its stderr.
    """
    done = subprocess.run(line, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode not in codes:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(f"{what} ended with exit code {done.returncode}: {last}")
    return done
