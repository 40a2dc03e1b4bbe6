"""Where a data set's files lie: the places in their order, and a download that leaves whole files or none."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from http.client import HTTPException
from pathlib import Path

from common.errors import InputError

logger = logging.getLogger(__name__)

PROJECT = "int8-workflow"
DOWNLOAD_TIMEOUT = 10.0
"""Seconds without an answer after which a download is given up."""

_ABSENT = "is not a folder"


class NotAvailableError(InputError):
    """A data set was found nowhere and could not be, or must not be, downloaded."""


def default_folder(name: str) -> Path:
    """Folder of data set ``name`` under the user's cache folder: where it is looked for last and downloaded to.

    Raises:
        NotAvailableError: the user has no home folder, as in some containers.
    """
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG base directory specification: a relative path is to be ignored.
    if os.path.isabs(cache):
        return Path(cache) / PROJECT / name
    try:
        return Path.home() / ".cache" / PROJECT / name
    except RuntimeError as error:
        raise NotAvailableError(f"no folder for {name}: this user has no home folder; set XDG_CACHE_HOME") from error


def expanded(folder: Path) -> Path:
    """``folder`` with ``~`` replaced. Raises InputError where that user is unknown."""
    try:
        return folder.expanduser()
    except RuntimeError as error:
        raise InputError(f"{folder}: {error}") from error


def is_folder(path: Path) -> bool:
    """Whether ``path`` is a folder. Raises InputError where that cannot be told, as without permission."""
    try:
        return path.is_dir()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


def locate(
    name: str,
    directory: Path | None,
    variable: str,
    missing: Callable[[Path], Sequence[str]],
    implicit: Sequence[Path] = (),
) -> Path | None:
    """The first folder that holds the data set; None if there is none.

    In this order: ``directory``; the folder that environment ``variable`` names; ``implicit``; the default folder.

    Args:
        name: The data set's, and that of its subfolder in the cache.
        directory: Named by the user, or None.
        variable: Environment variable that may name a folder; unset and empty are the same.
        missing: Names the files that a folder lacks.
        implicit: Folders that nobody named for this data set.

    Raises:
        InputError: a folder that was named, by ``directory`` or ``variable``, lacks files: it is never passed over.
    """
    named = directory or (Path(value) if (value := os.environ.get(variable)) else None)
    if named is not None:
        folder = expanded(named)
        if fault := _fault(folder, missing):
            raise InputError(f"{folder} ({'data.dir' if directory else f'environment variable {variable}'}) {fault}")
        return folder
    for folder in (*implicit, default_folder(name)):
        if not (fault := _fault(folder, missing)):
            return folder
        log = logger.debug if fault == _ABSENT else logger.warning
        log("%s is passed over: it %s", folder, fault)
    return None


def _fault(folder: Path, missing: Callable[[Path], Sequence[str]]) -> str | None:
    """Why the data set cannot be read from ``folder``, as the end of a sentence; None if it can."""
    try:
        if not folder.is_dir():
            return _ABSENT
        lacking = missing(folder)
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    return f"lacks {', '.join(lacking)}" if lacking else None


def not_found(title: str, name: str, variable: str) -> NotAvailableError:
    """The error for a data set that is nowhere and must not be downloaded, which says what to do."""
    return NotAvailableError(
        f"{title} was not found, and data.download is off: name its folder with data.dir or {variable}, "
        f"or put it into {default_folder(name)}"
    )


@contextlib.contextmanager
def downloading(title: str, target: Path) -> Iterator[Path]:
    """A temporary folder beside ``target`` to download into, with a short time-out on the network.

    What torchvision prints goes to stderr. The caller checks the files and moves them to ``target`` with
    :func:`move_into`; what is left is removed.

    Raises:
        NotAvailableError: the download failed.
    """
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent) as folder,
            contextlib.redirect_stdout(sys.stderr),
        ):
            logger.info("downloading %s to %s", title, target)
            yield Path(folder)
    except (OSError, RuntimeError, HTTPException) as error:
        # torchvision's message lists each mirror; its last line has the system's reason.
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise NotAvailableError(
            f"{title} could not be downloaded to {target} ({reason}): check the network and that folder, or name "
            "the one where it lies with data.dir"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


def move_into(target: Path, files: Sequence[Path]) -> None:
    """Rename ``files`` into ``target``, one by one: an incomplete set counts as absent the next time."""
    target.mkdir(parents=True, exist_ok=True)
    for path in files:
        os.replace(path, target / path.name)
