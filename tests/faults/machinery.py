"""Starting the commands with faults, and telling whether what they leave is whole."""

import hashlib
import shutil
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

from tests.forking import ROOT, Fault, Template

SMALL = (
    *("--config", str(ROOT / "configs" / "lenet_digits.yaml"), "--run=run", "--trainer.precision=32-true"),
    *("--trainer.limit_train_batches=3", "--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1"),
)
COMMANDS: Mapping[str, tuple[str, ...]] = {
    "train": ("train.py", *SMALL, "--epochs=2"),
    "quantize": ("quantize.py", *SMALL, "--engine=torch", "--batches=2", "--recalibrate", "--export=onnx"),
    "evaluate": (
        *("evaluate.py", *SMALL, "--engine=torch", "--batch-size=64", "--batches=2", "--latency-batch-sizes=[1]"),
        *("--evaluation.latency_seconds=0.001", "--evaluation.latency_runs=1", "--evaluation.analysis_images=32"),
        *("--tolerance=100", "--report"),
    ),
}
"""Each command in its shortest real form, on the digits."""


def leftovers(folder: Path) -> list[Path]:
    """Temporary files that nobody removed."""
    return sorted(path for path in folder.rglob(".*.tmp*"))


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every result under ``folder``; logs, which grow line by line, and the lock are no results."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock" and "logs" not in path.parts and not path.name.endswith(".tmp")
    }


def check_whole(folder: Path) -> int:
    """Read every result under ``folder`` as the project does; returns how many there are."""
    from calib.cache import read_provenance
    from calib.record import read_record
    from calib.table import CalibrationTable
    from evaluation.results import read_report
    from models.archive import load_archive
    from models.checkpoint import load_checkpoint

    checked = 0
    for name in digests(folder):
        path = folder / name
        checked += 1
        if name == "model.ckpt":
            load_checkpoint(path)
        elif path.suffix == ".ckpt":
            assert "state_dict" in load_archive(path)
        elif name == "quantization.json":
            read_record(folder)
        elif name == "report.json":
            read_report(path)
        elif name.startswith("CalibrationTable") and path.suffix == ".json":
            assert read_provenance(path.with_suffix("")) is not None
        elif name.startswith("CalibrationTable"):
            CalibrationTable.read(path)
        elif path.suffix == ".onnx":
            import onnx

            onnx.checker.check_model(onnx.load(path), full_check=True)
        elif path.suffix == ".svg":
            ElementTree.parse(path)
        elif path.suffix == ".html":
            assert path.read_text().rstrip().endswith("</html>")
        elif path.suffix == ".md":
            assert path.read_text().endswith("\n")
        else:
            raise AssertionError(f"what is {name}?")
    return checked


class Scene:
    """A copy of the finished run, a command that would change it, and what it would make of it.

    Attributes:
        folder: Working folder of the commands.
        run: ``artifacts/run`` in it.
        old: Digests before.
        new: Digests after the command, undisturbed.
        operations: How many operations on files the command makes.
        seconds: How long it takes.
    """

    def __init__(self, template: Template, finished: Path, folder: Path, command: str) -> None:
        self.template = template
        self.command = command
        self.folder = folder
        self.run = folder / "artifacts" / "run"
        self._finished = finished
        changed = {"train": ("--seed=2",), "quantize": ("--algorithm=minmax",), "evaluate": ("--tolerance=99",)}
        self.argv = (*COMMANDS[command], *changed[command])
        self.old = digests(finished / "artifacts" / "run")
        self.reset()
        ended = template.run(self.argv, folder, Fault(folder / "artifacts"))
        assert ended.code == 0, ended.stderr
        self.new = digests(self.run)
        self.operations, self.seconds = ended.operations, ended.seconds

    def reset(self) -> None:
        """Put the finished run back."""
        shutil.rmtree(self.folder / "artifacts", ignore_errors=True)
        shutil.copytree(self._finished / "artifacts", self.folder / "artifacts")

    def settled(self, name: str) -> bool:
        """Whether a result is the same whenever the command is run: reports hold times."""
        return not name.startswith(("report.", "figures/"))


def shim(folder: Path) -> Path:
    """The preloaded library, compiled into ``folder`` with the system's C compiler."""
    library = folder / "shim.so"
    source = ROOT / "tests" / "faults" / "shim.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    return library


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
CODES: Mapping[int, int] = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}
"""How a command ends that such a signal reached while it worked."""


def assert_old_or_new(scene: Scene, note: str) -> None:
    """Every result is what it was, or what the command makes of it; none is missing that must not be."""
    assert check_whole(scene.run) > 0
    found = digests(scene.run)
    for name, digest in found.items():
        # Checkpoints of the epochs in between are whole, and neither the old nor the final ones.
        if scene.settled(name) and not name.startswith("checkpoints/"):
            assert digest in (scene.old.get(name), scene.new.get(name)), f"{note}: {name} is neither old nor new"
    # A new training removes the old one's checkpoints before its first, so that they cannot be mixed up.
    expected = {name for name in scene.old if not name.startswith("checkpoints/")}
    assert expected <= found.keys(), f"{note}: {sorted(expected - found.keys())} got lost"


def assert_next_run_works(scene: Scene, note: str) -> None:
    """The same command, undisturbed, makes what it always makes, and clears up."""
    ended = scene.template.run(scene.argv, scene.folder)
    assert ended.code == 0, f"{note}, then: {ended.stderr}"
    found = digests(scene.run)
    assert found.keys() == scene.new.keys(), note
    for name, digest in found.items():
        if scene.settled(name):
            assert digest == scene.new[name], f"{note}: {name} is another one"
    check_whole(scene.run)
    assert not leftovers(scene.run), note
