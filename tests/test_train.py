"""train.py as a user runs it, on the bundled digits and on MNIST."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch

import train
from common.errors import InputError
from models import load_checkpoint

DIGITS = ("--config", "configs/lenet_digits.yaml", "--trainer.accelerator=cpu", "--trainer.precision=32-true")


@pytest.fixture
def trained(tmp_path, monkeypatch, capsys, root):
    """Runs the command in this process, on the digits, and gives what it prints."""
    monkeypatch.chdir(root)

    def run(*arguments: str) -> dict:
        capsys.readouterr()
        code = train.main([*DIGITS, "--artifacts", str(tmp_path), "--json", *arguments])
        assert code == 0
        summary: dict = json.loads(capsys.readouterr().out)
        return summary

    return run


def test_trains_tests_and_keeps_what_later_commands_need(trained, tmp_path):
    summary = trained("--epochs=6")
    assert summary["metrics"]["test_top1"] > 0.9
    assert summary["metrics"]["val_top1"] > 0.9
    assert summary["dataset"] == "digits"
    assert any("not MNIST" in note for note in summary["notes"])
    assert {path.name for path in (tmp_path / "lenet_digits").iterdir()} == {
        *(".lock", "checkpoints", "logs", "model.ckpt"),
    }
    checkpoint = load_checkpoint(tmp_path / "lenet_digits" / "model.ckpt")
    meta = checkpoint.meta
    assert (meta.network, meta.class_path, meta.init_args) == ("LeNet", "models.LeNet", {"num_classes": 10})
    assert (meta.data.dataset, meta.seed, meta.epochs) == ("digits", 1, summary["epochs"])
    assert meta.metrics == summary["metrics"]
    assert meta.versions.keys() == {"torch", "torchvision", "lightning"}

    from models.reopen import reopen_data

    test = reopen_data(meta, meta.data).test
    with torch.no_grad():
        found = checkpoint.network(test.images(slice(None))).argmax(1)
    assert (found == test.labels).float().mean().item() == pytest.approx(summary["metrics"]["test_top1"], abs=1e-6)


def test_shown_to_people(tmp_path, monkeypatch, capsys, root):
    monkeypatch.chdir(root)
    assert train.main([*DIGITS, "--artifacts", str(tmp_path), "--epochs=1"]) == 0
    shown = capsys.readouterr()
    assert "test top-1" in shown.out
    assert "model.ckpt" in shown.out
    assert "epoch 1/1: loss" in shown.err
    assert "not MNIST" in shown.err
    assert "epoch" not in shown.out.partition("LeNet on digits")[0]


@pytest.mark.parametrize("seed", [1, 3])
def test_default_configuration_without_mnist(monkeypatch, tmp_path, capsys, seed):
    """Goes on with the digits, says so, and does not diverge in the few steps that they make."""
    for name in ("MNIST_DIR", "TRT_DATADIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arguments = ("--data.download=false", "--trainer.accelerator=cpu", f"--artifacts={tmp_path}", f"--seed={seed}")
    assert train.main([*arguments, "--json"]) == 0
    shown = capsys.readouterr()
    summary = json.loads(shown.out)
    assert summary["dataset"] == "digits"
    assert any("stand in for MNIST" in note for note in summary["notes"])
    assert "stand in for MNIST" in shown.err
    assert summary["metrics"]["test_top1"] > 0.94


def test_caffes_solver(trained, tmp_path, root):
    """The policy and the validations between epochs of lenet_caffe.yaml, shortened."""
    summary = trained(
        *("--config=configs/lenet_caffe.yaml", "--run=caffe", "--data.dataset=digits"),
        *("--trainer.max_steps=40", "--trainer.val_check_interval=20", "--trainer.log_every_n_steps=10"),
    )
    assert summary["metrics"]["test_top1"] > 0.3
    (log,) = (tmp_path / "caffe" / "logs").glob("version_0/metrics.csv")
    with open(log, newline="") as stream:
        rows = list(csv.DictReader(stream))
    rates = {int(row["step"]): float(row["lr"]) for row in rows if row["lr"]}
    assert rates == {step: pytest.approx(0.01 * (1 + 1e-4 * step) ** -0.75) for step in (9, 19, 29, 39)}
    assert [int(row["step"]) for row in rows if row["val_top1"]] == [19, 39]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--trainer.accelerator=abacus",), "abacus"),
        (("--resume",), "there is no checkpoint to resume from"),
        (("--model.class_path=models.LeNot",), "has no 'LeNot'"),
        (("--model.class_path=torchvision.models.resnet18",), "resnet18 does not take images of 1x28x28"),
        (("--model.weights=no-such-file.pt",), "there is no file no-such-file.pt"),
        (("--batch-size=5000",), "do not fill one batch"),
        (("--trainer.devices=0",), "devices"),
        (("--trainer.max_epochs=-1",), "needs an end"),
        (("--optimizer.lr=1e9", "--optimizer.schedule=constant"), "the training loss became"),
        (("--run=../elsewhere",), "run name"),
        (("--data.dataset=mnist", "--data-dir=no-such-folder"), "no-such-folder"),
    ],
)
def test_bad_input_is_one_line_and_leaves_the_earlier_training(trained, tmp_path, arguments, message):
    earlier = [tmp_path / "lenet_digits" / name for name in ("model.ckpt", "checkpoints/best.ckpt", "logs/version_0/x")]
    for path in earlier:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"earlier")
    with pytest.raises(InputError, match=message) as caught:
        trained(*arguments)
    assert len(str(caught.value).splitlines()) == 1
    assert [path.read_bytes() for path in earlier] == [b"earlier"] * 3


def test_a_trial_writes_nothing(trained, tmp_path, capsys):
    trained("--epochs=1")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert trained("--trainer.fast_dev_run=true")["checkpoint"] is None
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert train.main([*DIGITS, "--artifacts", str(tmp_path), "--trainer.fast_dev_run=2"]) == 0
    shown = capsys.readouterr()
    assert shown.err.count("trainer.fast_dev_run: a trial, which writes nothing") == 1
    assert "model.ckpt" not in shown.out


def test_first_process(monkeypatch):
    for name in ("RANK", "NODE_RANK", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    assert train.is_first_process()
    monkeypatch.setenv("RANK", "0")
    assert train.is_first_process()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not train.is_first_process()


def test_help_of_the_trainer(capsys):
    assert train.main(["--trainer.help"]) == 0
    assert "--trainer.max_epochs" in capsys.readouterr().out


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.usefixtures("mnist_dir")
def test_mnist(command, tmp_path):
    """A third of an epoch of the default configuration, which finds MNIST by MNIST_DIR."""
    short = ("--epochs=1", "--trainer.limit_train_batches=150")
    result = command("train.py", "--artifacts", tmp_path, *short, "--json")
    assert re.search(r"training in (32-true|bf16-mixed): .* bfloat16", result.stderr)
    summary = json.loads(result.stdout)
    assert summary["dataset"] == "mnist"
    assert summary["notes"] == []
    assert summary["metrics"]["test_top1"] > 0.97
    assert Path(summary["checkpoint"]) == tmp_path / "lenet_mnist" / "model.ckpt"
