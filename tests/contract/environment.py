"""Make the environment of the contract tests: the real Torch-TensorRT wheels beside stand-ins for TensorRT itself.

    python tests/contract/environment.py .contract

installs the wheels without their dependencies into ``<folder>/site``, writes a ``tensorrt`` package that re-exports
the bindings, and compiles ``tensorrt_stand_in.c`` into ``<folder>/lib``. A complete folder is left as it is.
Nothing is installed into the running Python: only the subprocesses of the tests see the folder.

Where the wheels or a C compiler cannot be had, the reason goes to ``<folder>/unavailable.txt``, the contract tests
skip with it, and the exit code is 0; with ``--strict`` it is 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("tensorrt_stand_in.c")
SHIM = "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n"


@dataclass(frozen=True)
class Stack:
    """A set of wheels that belong together."""

    wheels: tuple[str, ...]
    tensorrt: str

    @property
    def major(self) -> str:
        return self.tensorrt.split(".")[0]

    @property
    def number(self) -> int:
        major, minor, patch = (int(part) for part in self.tensorrt.split(".")[:3])
        return major * 10000 + minor * 100 + patch


TESTED = Stack(
    wheels=("torch_tensorrt==2.8.0", "tensorrt_cu12_bindings==10.12.0.36", "dllist==2.0.0"), tensorrt="10.12.0"
)


class Unavailable(Exception):
    """Why the environment cannot be made here."""


def stamp(stack: Stack) -> str:
    """What a complete folder was made of."""
    return json.dumps(
        {
            "wheels": stack.wheels,
            "tensorrt": stack.tensorrt,
            "python": sys.version.split()[0],
            "source": hashlib.sha256(SOURCE.read_bytes()).hexdigest(),
        }
    )


def make(folder: Path, stack: Stack = TESTED) -> bool:
    """Make the environment in ``folder``; return False if it was complete already.

    Raises:
        Unavailable: the wheels or a C compiler cannot be had.
    """
    marker = folder / "complete.json"
    if marker.is_file() and marker.read_text() == stamp(stack):
        return False
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    install(folder / "site", stack)
    compile_stand_ins(folder / "lib", stack)
    marker.write_text(stamp(stack))
    return True


def install(site: Path, stack: Stack) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--target", str(site), *stack.wheels]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
        raise Unavailable(f"the wheels {', '.join(stack.wheels)} cannot be installed: {errors[-1]}")
    shim = site / "tensorrt"
    shim.mkdir()
    (shim / "__init__.py").write_text(SHIM)


def compile_stand_ins(lib: Path, stack: Stack) -> None:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        raise Unavailable("no C compiler: install one, or name it in CC")
    lib.mkdir()
    for part, name in (("NVINFER", "nvinfer"), ("PLUGIN", "nvinfer_plugin"), ("PARSER", "nvonnxparser")):
        library = f"lib{name}.so.{stack.major}"
        command = [*compiler.split(), "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-fvisibility=hidden"]
        command += [f"-DPART_{part}", f"-DTENSORRT_VERSION={stack.number}", f"-Wl,-soname,{library}"]
        command += ["-o", str(lib / library), str(SOURCE)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise Unavailable(f"{library} cannot be compiled with {compiler}: {result.stderr.strip()[:500]}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="make the environment of the contract tests")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--strict", action="store_true", help="exit with 1 where it cannot be made")
    arguments = parser.parse_args(argv)
    folder: Path = arguments.folder.resolve()
    reason = folder / "unavailable.txt"
    try:
        made = make(folder)
    except Unavailable as error:
        folder.mkdir(parents=True, exist_ok=True)
        reason.write_text(f"{error}\n")
        print(f"the contract tests cannot run here: {error}", file=sys.stderr)
        return 1 if arguments.strict else 0
    print(f"contract environment {'made' if made else 'is complete'}: {folder}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
