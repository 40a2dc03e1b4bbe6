"""Make the environment of the contract tests: the real Torch-TensorRT wheels beside stand-ins for TensorRT itself.

    python tests/contract/environment.py .contract

installs the wheels without their dependencies into ``<folder>/site``, writes a ``tensorrt`` package that re-exports
the bindings, and compiles ``tensorrt_stand_in.c`` into ``<folder>/lib``. A complete folder is left as it is.
Nothing is installed into the running Python: only the subprocesses of the tests see the folder.

    python tests/contract/environment.py --latest .contract-latest

makes the same with the current Torch-TensorRT and the torch that it needs, in an environment of its own (several GB).

``<folder>/rtx`` gets TensorRT-RTX, the libraries and the bindings, whose builder needs no GPU.

Where the wheels or a C compiler cannot be had, the reason goes to ``<folder>/unavailable.txt``, the contract tests
skip with it, and the exit code is 0; with ``--strict`` it is 1.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
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


RTX = ("onnxruntime-ep-nv-tensorrt-rtx-cu12==0.5.0", "tensorrt-rtx-cu12-bindings==1.7.1.116")
"""The first carries TensorRT-RTX's libraries."""

PYTHON = Path("venv") / "bin" / "python"
"""Of an environment with a torch of its own, in its folder."""


class Unavailable(Exception):
    """Why the environment cannot be made here."""


def stamp(stack: Stack | None) -> dict[str, str]:
    """What a folder is made of; ``stack`` is None for whatever is current."""
    return {
        "wheels": " ".join(stack.wheels) if stack else "latest",
        "python": sys.version.split()[0],
        "source": hashlib.sha256(SOURCE.read_bytes()).hexdigest(),
    }


def make(folder: Path, stack: Stack | None = TESTED) -> bool:
    """Make the environment in ``folder``; return False if it was complete already.

    Args:
        folder: Is emptied first.
        stack: What to install; the current Torch-TensorRT, with the torch that it needs, if None.

    Raises:
        Unavailable: the wheels or a C compiler cannot be had.
    """
    marker = folder / "complete.json"
    wanted = stamp(stack)
    if marker.is_file() and wanted.items() <= json.loads(marker.read_text()).items():
        return False
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    stack = stack or install_latest(folder)
    install(folder / "site", stack.wheels)
    shim = folder / "site" / "tensorrt"
    shim.mkdir()
    (shim / "__init__.py").write_text(SHIM)
    compile_stand_ins(folder / "lib", stack)
    marker.write_text(json.dumps({**wanted, "installed": stack.wheels, "tensorrt": stack.tensorrt}))
    return True


def make_rtx(folder: Path) -> bool:
    """Make the environment with TensorRT-RTX in ``folder``; return False if it was complete already.

    Raises:
        Unavailable: the wheels cannot be had.
    """
    marker = folder / "complete.json"
    wanted = {"wheels": " ".join(RTX), "python": sys.version.split()[0]}
    if marker.is_file() and json.loads(marker.read_text()) == wanted:
        return False
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    install(folder / "site", RTX)
    marker.write_text(json.dumps(wanted))
    return True


def install_latest(folder: Path) -> Stack:
    """Find the current Torch-TensorRT and install the torch that it needs into a virtual environment."""
    probe = folder / "probe"
    install(probe, ("torch_tensorrt",))
    text = (probe / "torch_tensorrt" / "_version.py").read_text()
    version, cuda, tensorrt = (
        re.search(rf'^__{name}__ = "([^"]+)"', text, re.MULTILINE)[1]  # type: ignore[index]
        for name in ("version", "cuda_version", "tensorrt_version")
    )
    shutil.rmtree(probe)
    major, minor = version.split(".")[:2]
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    packages = (f"torch=={major}.{minor}.*", "numpy", "packaging", "typing_extensions", "psutil", "filelock")
    pip(str(folder / PYTHON), packages)
    bindings = f"tensorrt_cu{cuda.split('.')[0]}_bindings=={tensorrt}.*"
    return Stack(wheels=(f"torch_tensorrt=={version}", bindings, "dllist"), tensorrt=tensorrt)


def install(site: Path, wheels: tuple[str, ...]) -> None:
    """Install wheels without their dependencies into a folder."""
    pip(sys.executable, ("--no-deps", "--target", str(site), *wheels))


def pip(python: str, arguments: tuple[str, ...]) -> None:
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary=:all:"]
    result = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
        wanted = [item for item in arguments if not item.startswith(("-", os.sep))]
        raise Unavailable(f"{', '.join(wanted)} cannot be installed: {errors[-1]}")


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
    parser.add_argument("--latest", action="store_true", help="the current Torch-TensorRT, not the tested one")
    parser.add_argument("--strict", action="store_true", help="exit with 1 where it cannot be made")
    arguments = parser.parse_args(argv)
    folder: Path = arguments.folder.resolve()
    complete = attempt(folder, lambda: make(folder, None if arguments.latest else TESTED))
    if not arguments.latest:
        complete = attempt(folder / "rtx", lambda: make_rtx(folder / "rtx")) and complete
    return 1 if arguments.strict and not complete else 0


def attempt(folder: Path, maker: Callable[[], bool]) -> bool:
    """Run what makes ``folder``; where that cannot be, leave the reason there and return False."""
    try:
        made = maker()
    except Unavailable as error:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "unavailable.txt").write_text(f"{error}\n")
        print(f"these contract tests cannot run here: {error}", file=sys.stderr)
        return False
    print(f"contract environment {'made' if made else 'is complete'}: {folder}", file=sys.stderr)
    return True


if __name__ == "__main__":
    raise SystemExit(main())
