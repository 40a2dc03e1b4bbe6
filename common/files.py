"""Files that are either old or new, never torn, and reads that are bounded."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import tempfile
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from common.errors import InputError

MAX_TEXT_BYTES = 16 * 1024 * 1024
"""Upper bound for text files from elsewhere (tables, side files): far above any real one."""

_SUFFIX = ".tmp"
_TOKEN_LENGTH = 16


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in ``path``'s folder; on success flush it to disk and rename it to ``path``.

    On any exception the temporary file is removed and an existing ``path`` stays as it was. A process that is killed
    leaves its temporary file ``.<name>.<16 characters>.tmp`` behind; whoever writes ``path`` next removes it.

    Raises:
        InputError: the folder cannot be created or written, or the disk is full.
    """
    path = Path(path)
    temporary = _temporary_name(path)
    # From here on the file is removed, also when a signal's exception comes right after its creation.
    try:
        with _reporting(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(path)
            while (lock := _create_locked(temporary)) is None:
                temporary = _temporary_name(path)
            try:
                yield temporary
                with open(temporary, "rb") as stream:
                    os.fsync(stream.fileno())
                temporary.chmod(0o666 & ~_umask())
                os.replace(temporary, path)
            finally:
                os.close(lock)
    finally:
        with suppress(OSError, ValueError):
            temporary.unlink(missing_ok=True)


@contextmanager
def _reporting(path: Path) -> Iterator[None]:
    """Turn what the operating system refuses into one line."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    except ValueError as error:
        if "null byte" not in str(error):
            raise
        raise InputError(f"cannot write {str(path)!r}: a path must not contain NUL") from error


def _temporary_name(path: Path) -> Path:
    return path.parent / f".{path.name}.{secrets.token_hex(_TOKEN_LENGTH // 2)}{_SUFFIX}"


def _create_locked(temporary: Path) -> int | None:
    """Create a file, and return the descriptor whose lock says that its writer lives; None if it is gone already."""
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    # File systems without locks keep their leftovers.
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    if os.fstat(descriptor).st_nlink:
        return descriptor
    # Another process took it for a leftover before it was locked.
    os.close(descriptor)
    return None


def _remove_leftovers(path: Path) -> None:
    """Remove temporary files for ``path`` whose writer was killed: nobody holds their lock any more."""
    prefix = f".{path.name}."
    length = len(prefix) + _TOKEN_LENGTH + len(_SUFFIX)
    for name in os.listdir(path.parent):
        if name.startswith(prefix) and name.endswith(_SUFFIX) and len(name) == length:
            with suppress(OSError):
                _remove_if_unlocked(path.parent / name)


def _remove_if_unlocked(leftover: Path) -> None:
    descriptor = os.open(leftover, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        leftover.unlink()
    finally:
        os.close(descriptor)


def _umask() -> int:
    # It can only be read by setting it; meanwhile another thread's files are private rather than open to all.
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write ``content`` to ``path`` atomically. Raises InputError as :func:`atomic_path` does."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 to ``path`` atomically. Raises InputError as :func:`atomic_path` does.

    What UTF-8 cannot hold (a file name that is not text, as Python represents it) is written as an escape.
    """
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON to ``path`` atomically; NaN and infinity are refused (ValueError)."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def check_writable(folder: Path, what: str) -> None:
    """Make ``folder`` and try it, before work is done whose result goes there.

    Args:
        folder: To be made, or there.
        what: That will be written there, for the message.

    Raises:
        InputError: the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"cannot write {what} into {folder}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"cannot write {what} into {str(folder)!r}: a path must not contain NUL") from error


def read_bytes(path: Path, limit: int = MAX_TEXT_BYTES) -> bytes:
    """Read a file of at most ``limit`` bytes.

    Raises:
        InputError: the file is missing, unreadable or too large.
    """
    try:
        with open(path, "rb") as stream:
            content = stream.read(limit + 1)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"cannot read {str(path)!r}: a path must not contain NUL") from error
    if len(content) > limit:
        raise InputError(f"{path} is larger than {limit} bytes: this is not the expected file")
    return content


def read_text(path: Path, limit: int = MAX_TEXT_BYTES) -> str:
    """Read a UTF-8 text file of at most ``limit`` bytes.

    Raises:
        InputError: the file is missing, unreadable, too large or not UTF-8.
    """
    content = read_bytes(path, limit)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        if content.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
            raise InputError(
                f"{path} is not UTF-8 text but UTF-16, as PowerShell writes it: save it as UTF-8"
            ) from error
        raise InputError(f"{path} is not UTF-8 text (byte {error.start})") from error


def read_json(path: Path, limit: int = MAX_TEXT_BYTES) -> Any:
    """Read a JSON file of at most ``limit`` bytes.

    Raises:
        InputError: missing, too large or not JSON, which has neither NaN nor infinity.
    """
    return parse_json(read_text(path, limit), str(path))


def parse_json(text: str, source: str) -> Any:
    """``json.loads`` without Python's extensions; ``source`` names the text in errors.

    Raises:
        InputError: not JSON, which has neither NaN nor infinity.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source} is not valid JSON: {error}") from error


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number in JSON")
