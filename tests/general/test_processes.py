"""Several processes train and evaluate with the figures of one."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from calib.table import CalibrationTable
from common.config import EngineConfig
from common.errors import InputError
from common.processes import Processes
from tests.data.sets import write_part
from tests.forking import Template

ROOT = Path(__file__).resolve().parents[2]
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("batches", [7, 8, 100])
def test_shares_are_all_batches_in_order(count: int, batches: int) -> None:
    shares = [Processes(rank, count).share(batches) for rank in range(count)]

    assert [batch for share in shares for batch in share] == list(range(batches))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_fewer_batches_than_processes_are_refused() -> None:
    with pytest.raises(InputError, match="2 batches cannot be shared by 3 processes: lower --batch-size"):
        Processes(0, 3).share(2)


def in_turn(rank: int, folder: Path, fails: bool) -> None:
    """A process of two: writes what it found where it came, or which error it got."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        with Processes(rank, 2).first_ahead():
            if rank == 0:
                time.sleep(0.2)
                (folder / "engine").touch()
                if fails:
                    raise InputError("no engine")
            (folder / str(rank)).write_text(str((folder / "engine").exists()))
    except InputError as error:
        (folder / str(rank)).write_text(str(error))


@pytest.mark.parametrize(
    ("fails", "found"), [(False, ["True", "True"]), (True, ["no engine", "another process ended; see its error above"])]
)
def test_the_first_process_goes_ahead(tmp_path: Path, fails: bool, found: list[str]) -> None:
    fork = multiprocessing.get_context("fork")
    started = [fork.Process(target=in_turn, args=(rank, tmp_path, fails)) for rank in (0, 1)]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == found


def test_processes_of_a_machine_share_its_cores() -> None:
    engine, given = EngineConfig(), EngineConfig(threads=3)
    for config in (engine, given):
        Processes(1, 4, 1, 2).divide(config)

    assert engine.threads == max(1, len(os.sched_getaffinity(0)) // 2)
    assert given.threads == 3


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def torchrun(count: int, program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command in several processes."""
    launcher = ["torch.distributed.run", "--nproc_per_node", str(count), "--master_port", str(free_port()), "--"]
    return subprocess.run(
        [sys.executable, "-m", *launcher, str(ROOT / program), *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture
def together(template: Template | None) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command in several processes, forked with the variables that ``torchrun`` sets where that can be."""

    def run(count: int, program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        if template is None:
            return torchrun(count, program, *arguments)
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        common |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        running = []
        for rank in map(str, range(count)):
            variables = {**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank}
            running.append(template.start([program, *map(str, arguments)], ROOT, variables=variables))
        ended = [one.wait() for one in running]
        assert [one.stdout for one in ended[1:]] == [""] * (count - 1)
        errors = "".join(one.stderr for one in ended)
        return subprocess.CompletedProcess(program, max(one.code for one in ended), ended[0].stdout, errors)

    return run


def figures(result: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    """Everything that a report says of accuracy; the verdict may be negative (1), as it is without INT8."""
    assert result.returncode in (0, 1), result.stderr
    report = json.loads(result.stdout)
    return [{key: row[key] for key in ("precision", "accuracy", "paired", "skipped")} for row in report["rows"]]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory, command: Command) -> tuple[Path, dict[str, Any]]:
    """Runs that two processes and one trained, the first calibrated, and what training printed of it."""
    artifacts = tmp_path_factory.mktemp("artifacts")
    common = ("--config", ROOT / "configs/lenet_digits.yaml", "--artifacts", artifacts)
    short = ("--epochs", "2", "--trainer.precision", "32-true", "--trainer.accelerator", "cpu", "--json")
    ddp = ("--batch-size", "32", "--trainer.strategy", "ddp", "--trainer.devices", "2")
    trained = command("train.py", *common, *short, "--data.augment=false", *ddp)
    assert trained.stderr.count("epoch 1/2") == 1
    command("train.py", *common, *short, "--data.augment=false", "--batch-size", "64", "--run", "alone")
    command("quantize.py", *common, "--engine", "torch")
    return artifacts, json.loads(trained.stdout)


@pytest.mark.e2e
@pytest.mark.slow
def test_two_processes_train_as_one_does(digits: tuple[Path, dict[str, Any]]) -> None:
    """On the same global batches, so that the gradients differ by rounding alone; the figures are of all images."""
    from models.checkpoint import load_checkpoint
    from models.reopen import reopen_data

    artifacts, summary = digits
    checkpoint, alone = (load_checkpoint(artifacts / run / "model.ckpt") for run in ("lenet_digits", "alone"))
    for name, value in alone.network.state_dict().items():
        torch.testing.assert_close(checkpoint.network.state_dict()[name], value, atol=1e-3, rtol=1e-2)

    data = reopen_data(checkpoint.meta, checkpoint.meta.data)
    images, labels = data.test.images(slice(None)), data.test.labels
    with torch.no_grad():
        logits = checkpoint.network.logits(images)  # type: ignore[operator]

    metrics = summary["metrics"]
    assert metrics["test_top1"] == pytest.approx(float((logits.argmax(1) == labels).double().mean()), abs=1e-6)
    assert metrics["test_loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), abs=1e-5)
    with torch.no_grad():
        predicted = checkpoint.network(data.validation.images(slice(None))).argmax(1)
    top1 = float((predicted == data.validation.labels).double().mean())
    assert metrics["val_top1"] == pytest.approx(top1, abs=1e-6)
    assert metrics["test_top1"] > 0.5


@pytest.mark.e2e
@pytest.mark.slow
def test_processes_evaluate_with_the_figures_of_one(
    digits: tuple[Path, dict[str, Any]], command: Command, together: Command
) -> None:
    options = (
        *("--config", ROOT / "configs/lenet_digits.yaml", "--artifacts", digits[0], "--json", "--batch-size", "64"),
        *("--threads", "1", "--latency-batch-sizes", "[1]", "--evaluation.latency_seconds", "0.01"),
    )
    alone = figures(command("evaluate.py", *options, code=None))

    assert [row["precision"] for row in alone] == ["fp32", "fp16", "int8"]
    for count in (2, 3):
        assert figures(together(count, "evaluate.py", *options)) == alone


def write_images(folder: Path) -> Path:
    """16 images to train with, 18 to test; returns the last of these."""
    for part, count in (("train", 8), ("test", 9)):
        write_part(folder, part, count)
    return folder / "test" / "dog" / "8.png"


@pytest.mark.e2e
@pytest.mark.slow
def test_an_error_of_one_process_ends_the_training_of_all_in_one_line_each(tmp_path: Path, command: Command) -> None:
    # The last images are the second process's.
    broken = write_images(tmp_path / "images")
    broken.write_bytes(bytes(broken.stat().st_size))
    result = command(
        "train.py",
        *("--artifacts", tmp_path, "--data.dataset", "imagefolder", "--data-dir", tmp_path / "images"),
        *("--data.image_size", "28", "--data.resize", "28", "--data.validation", "2", "--batch-size", "4"),
        *("--model.class_path", "models.SmallResNet", "--epochs", "1", "--trainer.precision", "32-true"),
        *("--trainer.strategy", "ddp", "--trainer.devices", "2", "--trainer.accelerator", "cpu"),
        code=2,
    )

    errors = sorted(line for line in result.stderr.splitlines() if "error" in line.lower())
    assert len(errors) == 2, result.stderr
    assert errors[0].startswith(f"error: {broken} is not a readable image")
    assert errors[1] == "error: another process ended; see its error above"
    assert "Traceback" not in result.stderr


@pytest.mark.e2e
@pytest.mark.slow
def test_processes_evaluate_a_folder_and_the_first_tells_what_another_finds(
    tmp_path: Path, command: Command, together: Command
) -> None:
    from common.config import DataConfig
    from data import open_data
    from models import CheckpointMeta, SmallResNet, save_checkpoint

    broken = write_images(tmp_path / "images")
    config = DataConfig(dataset="imagefolder", dir=tmp_path / "images", image_size=28, resize=28, validation=2)
    data = open_data(config, seed=1)
    torch.manual_seed(0)
    arguments = {"num_classes": 2, "in_channels": 3}
    meta = CheckpointMeta("SmallResNet", "models.SmallResNet", arguments, data.info, config, seed=1)
    save_checkpoint(tmp_path / "lenet_mnist" / "model.ckpt", SmallResNet(2, 3), meta)
    options = (
        *("--artifacts", tmp_path, "--data-dir", tmp_path / "images", "--json", "--batch-size", "4"),
        *("--threads", "1", "--latency-batch-sizes", "[1]", "--evaluation.latency_seconds", "0.01"),
        *("--engine", "torch"),
    )

    assert figures(together(2, "evaluate.py", *options)) == figures(command("evaluate.py", *options, code=None))

    # The last images are the second process's.
    broken.write_bytes(bytes(broken.stat().st_size))
    result = together(2, "evaluate.py", *options)
    assert result.returncode != 0
    assert f"error: {broken} is not a readable image" in result.stderr
    assert "internal error" not in result.stderr


@pytest.mark.e2e
@pytest.mark.slow
def test_processes_calibrate_with_the_table_of_one(
    digits: tuple[Path, dict[str, Any]], command: Command, together: Command
) -> None:
    artifacts = digits[0]
    common = ("--config", ROOT / "configs/lenet_digits.yaml", "--artifacts", artifacts, "--engine", "torch")
    table = artifacts / "lenet_digits" / "CalibrationTableLeNet"
    # 5 batches leave the second process one fewer.
    options = (*common, "--batches", "5", "--batch-size", "60", "--json", "--recalibrate")
    alone = command("quantize.py", *options)
    expected = CalibrationTable.read(table)
    table.unlink()

    shared = together(2, "quantize.py", *options)

    assert shared.returncode == 0, shared.stderr
    # Matrix products of two processes can differ in the last bit (seen on a Xeon); a neighbouring bin is 2.4e-4 away.
    found = CalibrationTable.read(table)
    assert (found.header, found.scales) == (expected.header, pytest.approx(expected.scales, rel=1e-6))
    ours, theirs = json.loads(shared.stdout), json.loads(alone.stdout)
    assert ours["calibration"]["tensors"].keys() == theirs["calibration"]["tensors"].keys()
    for name, tensor in theirs["calibration"]["tensors"].items():
        assert ours["calibration"]["tensors"][name] == pytest.approx(tensor, rel=1e-6, abs=1e-4)
    assert ours["calibration"]["images"] == 300
    assert len(ours["calibration"]["batch_seconds"]) == 3
    # The cached table serves, and the other process is not needed.
    again = together(2, "quantize.py", *options[:-1])
    assert again.returncode == 0, again.stderr
    assert not json.loads(again.stdout)["table"]["calibrated"]


@pytest.mark.e2e
@pytest.mark.slow
def test_what_one_process_cannot_do_ends_the_others(digits: tuple[Path, dict[str, Any]]) -> None:
    common = ("--config", ROOT / "configs/lenet_digits.yaml", "--artifacts", digits[0], "--engine", "torch")
    # torchrun would take --run for an option of its own, but for the -- in front of the command.
    result = torchrun(2, "quantize.py", *common, "--recalibrate", "--batches", "1000", "--run", "lenet_digits")

    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert 1 <= len(errors) <= 2, result.stderr
    assert "internal error" not in result.stderr
    assert "exitcode  : 2" in result.stderr
