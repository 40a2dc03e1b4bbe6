"""Where words go: logs and progress to stderr, results to stdout."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, TextIO

PACKAGES = ("train", "quantize", "evaluate", "benchmarks", "common", "data", "models", "calib", "engines", "evaluation")


def printable(text: str) -> str:
    """``text`` with control characters as escapes: a name from a file must not move the cursor or rewrite a line."""
    return "".join(
        character
        if character.isprintable() or character in "\n\t"
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = printable(super().format(record))
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


def start_logging(level: int = logging.INFO) -> None:
    """Send this project's log to stderr, a line each; warnings and errors say so."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(message)s"))
    for name in PACKAGES:
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level)
        logger.propagate = False


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Send to stderr what libraries write to stdout, also from C++ and from child processes (Gloo greets its peers)."""
    with _redirected(sys.stdout, 1, 2):
        yield


@contextmanager
def stderr_to(file: IO[bytes]) -> Iterator[None]:
    """Send to a file what goes to the process's stderr, where C++ code logs."""
    with _redirected(sys.stderr, 2, file.fileno()):
        yield


@contextmanager
def _redirected(stream: TextIO, descriptor: int, to: int) -> Iterator[None]:
    """Let a file descriptor, to which ``stream`` writes, be another one for a while."""
    stream.flush()
    kept = os.dup(descriptor)
    os.dup2(to, descriptor)
    try:
        yield
    finally:
        stream.flush()
        os.dup2(kept, descriptor)
        os.close(kept)


@contextmanager
def silenced(level: int) -> Iterator[None]:
    """Hide what libraries warn of, and what is logged at ``level`` and below."""
    disabled = logging.root.manager.disable
    logging.disable(level)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table on stdout; the first column is left-aligned, the others are figures."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    # Piped output is not wrapped to a terminal that is not there.
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(Text(printable(title), style="bold"), table)
