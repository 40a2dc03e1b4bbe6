"""A run's folder under ``artifacts/``: the names of its files, and the lock that one command holds at a time."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
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
                f"run name {self.name!r} is not usable: take letters, digits, '.', '_' and '-', at most 100, "
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

    def tensorrt_table(self, network: str) -> Path:
        """The table that TensorRT itself writes, by its own tensor names."""
        return self.folder / "tensorrt" / f"CalibrationTable{network}"

    def onnx_table(self, network: str) -> Path:
        """Our table with an entry for every value of the float ONNX file, for tools that match them by name."""
        return self.folder / f"CalibrationTable{network}_onnx"

    def onnx(self, network: str, precision: str) -> Path:
        return self.folder / f"{network}_{precision}.onnx"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run's lock; the kernel releases it when this process ends, however it ends.

        Raises:
            InputError: another command holds it, or the folder cannot be written.
        """
        path = self.folder / ".lock"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            stream = open(path, "a+")  # noqa: SIM115 - closed below, after the body
        except OSError as error:
            raise InputError(f"cannot write {self.folder}: {error.strerror or error}") from error
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                stream.seek(0)
                holder = stream.read(32).strip() or "unknown"
                raise InputError(
                    f"another command (process {holder}) is working on {self.folder}: wait for it to end, "
                    "or choose another --run"
                ) from None
            stream.truncate(0)
            stream.write(f"{os.getpid()}\n")
            stream.flush()
            yield
