"""A run's folder under ``artifacts/``: the names of its files, and the lock that one command holds at a time."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from common.errors import InputError

_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Run:
    """The folder ``<artifacts>/<name>/`` and what lies in it."""

    name: str
    artifacts: Path

    def __post_init__(self) -> None:
        if not _RUN_NAME.fullmatch(self.name):
            raise InputError(
                f"run name {self.name!r:.120} is not usable: take letters, digits, '.', '_' and '-', at most 100, "
                "starting with a letter or digit"
            )

    @property
    def folder(self) -> Path:
        return self.artifacts / self.name

    @property
    def checkpoint(self) -> Path:
        """The trained network with its metadata, written by ``train.py`` when training ends."""
        return self.folder / "model.ckpt"

    def table(self, network: str) -> Path:
        """Our calibration table, by the tensor names of our ONNX file."""
        return self.folder / f"CalibrationTable{network}"

    def onnx_table(self, network: str) -> Path:
        """Our table with an entry for every value of the float ONNX file, for tools that match them by name."""
        return self.folder / f"CalibrationTable{network}_onnx"

    def onnx(self, network: str, precision: str) -> Path:
        return self.folder / f"{network}_{precision}.onnx"

    @contextmanager
    def locked(self, create: bool = True) -> Iterator[None]:
        """Hold the run's lock; the kernel releases it when this process ends, however it ends.

        Args:
            create: Whether to make the run's folder where there is none.

        Raises:
            InputError: another command holds it, the folder cannot be written, or there is none.
        """
        if not create and not self.folder.is_dir():
            raise InputError(f"there is no run {self.folder}: run train.py first")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # A link in place of the lock would have its target overwritten.
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(self.folder / ".lock", flags, 0o666)
        except OSError as error:
            raise InputError(f"cannot write {self.folder}: {error.strerror or error}") from error
        except ValueError as error:
            raise InputError(f"cannot write {str(self.folder)!r}: a path must not contain NUL") from error
        try:
            self._lock(descriptor)
            yield
        finally:
            os.close(descriptor)

    def _lock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode("ascii", errors="replace").strip() or "unknown"
            raise InputError(
                f"another command (process {holder}) is working on {self.folder}: wait for it to end, "
                "or choose another --run"
            ) from None
        except OSError as error:
            raise InputError(f"cannot lock {self.folder}: {error.strerror or error}") from error
        # For the message alone: a full disk is found out by whoever writes something that counts.
        with suppress(OSError):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())
