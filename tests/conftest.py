"""Fixtures that all tests share: where things lie, the data, the tools that a machine may lack."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.forking import Template

if "PYTEST_XDIST_WORKER" in os.environ:
    # One thread in each worker, and in the commands that it starts: the workers share the cores. Before torch loads.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# No test depends on the machine's speed; a fixture that all examples share is what is meant.
settings.register_profile(
    "all", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
settings.load_profile("all")

ROOT = Path(__file__).resolve().parent.parent

MNIST_STEMS = ("train-images", "train-labels", "t10k-images", "t10k-labels")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest; skip what is marked ``gpu`` where there is none.

    Each file goes to one worker (``--dist loadfile``): a long one that came last would keep one core alone busy. Torch
    is imported only if a test for a GPU was selected.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path.parent.name != "benchmarks", item.path not in slow))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU; torch finds none"))


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def mnist_dir() -> Path:
    """The folder that MNIST_DIR names, with the four idx files; skips where there is none."""
    value = os.environ.get("MNIST_DIR")
    if not value:
        pytest.skip("needs MNIST: set MNIST_DIR to the folder with its four idx files")
    folder = Path(value).resolve()
    found = {path.name for place in (folder, folder / "MNIST" / "raw") if place.is_dir() for path in place.iterdir()}
    missing = [stem for stem in MNIST_STEMS if not any(name.startswith(stem) for name in found)]
    if missing:
        pytest.skip(f"needs MNIST: MNIST_DIR is {folder}, which lacks {', '.join(missing)}")
    return folder


@pytest.fixture(scope="session")
def chromium() -> str:
    """A headless-capable Chromium; skips where there is none."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        path = shutil.which(name)
        if path:
            return path
    pytest.skip("needs Chromium (on Debian: apt-get install chromium)")


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Template | None]:
    """What starts commands without importing PyTorch each time; None where processes are not safely forked."""
    if not sys.platform.startswith("linux"):
        yield None
        return
    process = Template(tmp_path_factory.mktemp("template"))
    yield process
    process.close()


@pytest.fixture(scope="session")
def command(request: pytest.FixtureRequest) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run one of the project's commands as a user does: ``command("train.py", "--seed", "1", cwd=tmp_path)``.

    A first argument that ends in ``.py`` is a script of the checkout; any other is a module (``python -m``). It is a
    process of its own, forked from one that has imported the libraries. With ``fresh``, Python starts anew, which
    takes seconds; ``env``, which adds variables, implies it (libraries read some when they are loaded); None as a
    value removes one. It must end with the exit code ``code``; None: the caller looks at it.
    """

    def run(
        name: str,
        *arguments: str | os.PathLike[str],
        cwd: Path | None = None,
        env: dict[str, str | None] | None = None,
        fresh: bool = False,
        timeout: float = 600,
        code: int | None = 0,
    ) -> subprocess.CompletedProcess[str]:
        variables = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
        words = [os.fspath(argument) for argument in arguments]
        template = None if fresh or env else request.getfixturevalue("template")
        if template is not None:
            ended = template.start([name, *words], cwd or ROOT, variables=variables).wait(timeout)
            result = subprocess.CompletedProcess([name, *words], ended.code, ended.stdout, ended.stderr)
            assert code in (None, result.returncode), result.stderr
            return result
        for key, value in (env or {}).items():
            if value is None:
                variables.pop(key, None)
            else:
                variables[key] = value
        program = [str(ROOT / name)] if name.endswith(".py") else ["-m", name]
        result = subprocess.run(
            [sys.executable, *program, *words],
            cwd=cwd or ROOT,
            env=variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert code in (None, result.returncode), result.stderr
        return result

    return run
