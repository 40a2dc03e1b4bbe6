"""Errors a user can act on, and the exit codes of every command."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit status of ``train.py``, ``quantize.py``, ``evaluate.py`` and the ``python -m`` tools."""

    PASSED = 0
    FAILED = 1
    """The command ran and its verdict is negative."""
    BAD_INPUT = 2
    """Bad input or a missing requirement; nothing was overwritten, but for a report of what ran all the same."""
    INTERNAL = 3
    """A defect of this program."""
    INTERRUPTED = 130
    """SIGINT (Ctrl-C): finished files are kept."""
    NO_READER = 141
    """Whoever read the output has gone, as in ``| head``."""
    TERMINATED = 143
    """SIGTERM: finished files are kept."""


class InputError(Exception):
    """Bad input or a missing requirement: one line that says what is wrong and what to do.

    The commands print it as ``error: <line>`` on stderr and exit with 2, without a traceback.
    """


def some(names: Sequence[str]) -> str:
    """The first three of many names, and how many more there are, for a message of one line."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def first_line(error: BaseException) -> str:
    """What an exception says first, for a message of one line; its type if it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0].rstrip() if text else type(error).__name__


def out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, in Python, in PyTorch (which is not imported here) or in CUDA."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    said = ("can't allocate memory", "out of memory", "_STATUS_ALLOC_FAILED")  # the last by cuBLAS and cuDNN
    return isinstance(error, RuntimeError) and any(words in first_line(error) for words in said)
