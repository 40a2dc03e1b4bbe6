"""One template process for the session, a finished run to damage, and the counting of what was tried."""

import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from machinery import COMMANDS, Scene, shim

from tests.forking import Template


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Makes folders, in memory where there is room: hundreds of flushed files would wait for the disk."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 1 << 30
    root = Path(tempfile.mkdtemp(prefix="faults", dir=memory)) if roomy else tmp_path_factory.mktemp("faults")

    def make(name: str) -> Path:
        return Path(tempfile.mkdtemp(prefix=name, dir=root))

    yield make
    shutil.rmtree(root)


@pytest.fixture(scope="session")
def template(place: Callable[[str], Path]) -> Iterator[Template]:
    """Forks the commands, with the file-system faults preloaded."""
    if not sys.platform.startswith("linux"):
        pytest.skip("faults are injected with LD_PRELOAD, on Linux")
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler (cc) for the library that injects faults")
    scratch = place("template")
    process = Template(scratch, shim(scratch))
    yield process
    process.close()


@pytest.fixture(scope="session")
def finished(template: Template, place: Callable[[str], Path]) -> Path:
    """A folder with ``artifacts/run``: trained, quantized and evaluated."""
    folder = place("finished")
    for argv in COMMANDS.values():
        ended = template.run(argv, folder)
        assert ended.code == 0, ended.stderr
    return folder


@pytest.fixture(scope="session", params=tuple(COMMANDS))
def scene(
    request: pytest.FixtureRequest, template: Template, finished: Path, place: Callable[[str], Path]
) -> Iterator[Scene]:
    folder = place(request.param)
    yield Scene(template, finished, folder, request.param)
    shutil.rmtree(folder)


@pytest.fixture
def moments(request: pytest.FixtureRequest) -> Callable[[int, int], list[int]]:
    """Choose at which of ``total`` operations a fault comes: ``few`` of them, or ``SOAK_KILLS`` in ``make soak``."""

    def choose(total: int, few: int) -> list[int]:
        wanted = int(os.environ.get("SOAK_KILLS") or few)
        if wanted >= total:
            return list(range(1, total + 1))
        return sorted(random.Random(request.node.name).sample(range(1, total + 1), wanted))

    return choose


@pytest.fixture
def tried(request: pytest.FixtureRequest) -> Iterator[Callable[[str], None]]:
    """Count what was tried; ``SOAK_LOG`` names a file that the counts are added to."""
    counts: dict[str, int] = {}

    def count(kind: str) -> None:
        counts[kind] = counts.get(kind, 0) + 1

    yield count
    if log := os.environ.get("SOAK_LOG"):
        with open(log, "a") as stream:
            stream.write(json.dumps({"test": request.node.nodeid, "tried": counts}) + "\n")
