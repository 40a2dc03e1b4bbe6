"""Commands as processes of their own that start in milliseconds: forked from one that has imported everything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 120.0


@dataclass(frozen=True)
class Fault:
    """What happens at which operation on files under ``folder``.

    Attributes:
        folder: Operations elsewhere do not count.
        at: Number of the operation, from 1.
        action: ``count`` (nothing), ``kill``, ``tear`` (kill in the middle of a write), ``fail`` (that operation, with
            errno ``detail``), ``full`` (the disk, from there on), ``raise`` (signal ``detail``).
    """

    folder: Path
    at: int = 0
    action: str = "count"
    detail: int = 0


@dataclass(frozen=True)
class Ended:
    """How a command ended; ``code`` is negative for a signal that killed it."""

    code: int
    stdout: str
    stderr: str
    operations: int
    seconds: float


class Template:
    """The process that forks commands; see ``template.py``.

    Args:
        scratch: Folder for what the commands print.
        shim: Library that injects faults, to be preloaded.
    """

    def __init__(self, scratch: Path, shim: Path | None = None) -> None:
        self.scratch = scratch
        self._started = 0
        variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
        if shim is not None:
            variables |= {"LD_PRELOAD": str(shim), "FAULT_SHIM": str(shim)}
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "template.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=variables,
        )
        assert self._answer() == {"ready": True}

    def start(
        self,
        argv: Sequence[str],
        cwd: Path,
        fault: Fault | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> Running:
        """Fork a command.

        Args:
            argv: A script of the checkout or the name of a module, and its arguments.
            cwd: Its working folder.
            fault: What happens to its operations on files.
            variables: Its whole environment; None: the template's. What libraries read when they are loaded (threads
                of OpenMP, preloaded libraries) stays the template's in any case.
        """
        self._started += 1
        outputs = [self.scratch / f"{self._started}.{name}" for name in ("out", "err")]
        request: dict[str, Any] = {
            "do": "start",
            "argv": [str(ROOT / argv[0]) if argv[0].endswith(".py") else argv[0], *argv[1:]],
            "cwd": str(cwd),
            "stdout": str(outputs[0]),
            "stderr": str(outputs[1]),
            "variables": None if variables is None else dict(variables),
        }
        if fault is not None:
            request["fault"] = {**vars(fault), "folder": str(fault.folder)}
        return Running(self, self.ask(request)["pid"], outputs[0], outputs[1], time.monotonic())

    def run(self, argv: Sequence[str], cwd: Path, fault: Fault | None = None) -> Ended:
        """Run a command to its end."""
        return self.start(argv, cwd, fault).wait()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(TIMEOUT)


@dataclass(frozen=True)
class Running:
    """A command that was started."""

    template: Template
    pid: int
    stdout: Path
    stderr: Path
    began: float

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def state(self) -> str:
        """Of the process, as the kernel abbreviates it: ``T`` is stopped."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]

    def alive(self) -> bool:
        return self.state() not in "XZ"

    def wait(self, timeout: float = TIMEOUT) -> Ended:
        """How it ends; it is killed after ``timeout`` seconds."""
        answer = self.template.ask({"do": "wait", "pid": self.pid, "timeout": timeout})
        texts = [path.read_text(errors="replace") for path in (self.stdout, self.stderr)]
        assert not answer["late"], f"the command did not end within {timeout} s: {texts}"
        return Ended(answer["code"], texts[0], texts[1], answer["operations"], time.monotonic() - self.began)
