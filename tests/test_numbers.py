"""Numbers that lie: what is broken or means nothing is an error in one line or a warning that names it.

Each case goes through the commands. What a single function must refuse is tested beside that function: labels out of
range and files of another image size in tests/data, checkpoints of another architecture in tests/models, malformed
tables in tests/calib.
"""

import dataclasses
import json
import logging
import math
import re
import shutil
from typing import Any

import pytest
import torch

import evaluate
import quantize
from calib.table import CalibrationTable
from common.config import DataConfig
from common.decode import encode
from common.errors import InputError
from data import open_data
from models import LeNet
from models.checkpoint import FORMAT, CheckpointMeta, write_torch
from tests.runs import digits_lenet

QUICK = (
    "--engine=torch",
    "--batch-size=64",
    "--batches=2",
    "--latency-batch-sizes=[1]",
    "--evaluation.latency_seconds=0.001",
    "--evaluation.latency_runs=1",
    "--json",
)
TABLE = "CalibrationTableLeNet"


@pytest.fixture(scope="module")
def meta():
    config = DataConfig(dataset="digits", augment=False)
    info = open_data(config, 1).info
    return CheckpointMeta("LeNet", "models.LeNet", {"num_classes": 10}, info, config, seed=1, epochs=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, meta):
    """A LeNet that tells some digits apart."""
    return digits_lenet(open_data(meta.data, 1), steps=20).eval()


class Commands:
    """Runs the commands in this process, on a run of its own."""

    def __init__(self, folder, meta, trained, capsys):
        self.folder, self.meta, self.capsys = folder, meta, capsys
        self.run = folder / "artifacts" / "run"
        self.network = LeNet()
        self.network.load_state_dict(trained.state_dict())

    def save(self, meta=None):
        """Write the checkpoint without a look at its weights, as another program would."""
        state = {"format": FORMAT, "meta": encode(meta or self.meta), "state_dict": self.network.state_dict()}
        write_torch(self.run / "model.ckpt", state)

    def __call__(self, command, *arguments) -> tuple[int, dict[str, Any], str]:
        code = command.main(["--run=run", f"--artifacts={self.folder / 'artifacts'}", *arguments])
        out, err = self.capsys.readouterr()
        return code, json.loads(out), err

    def quantize(self, *arguments):
        return self(quantize, "--engine=torch", "--json", *arguments)

    def evaluate(self, *arguments):
        return self(evaluate, *QUICK, *arguments)

    def edit_table(self, **scales):
        """A copy of the run's table with other scales, without a side file; None removes a tensor."""
        table = CalibrationTable.read(self.run / TABLE)
        changed = {**table.scales, **scales}
        path = self.folder / "edited"
        CalibrationTable({name: scale for name, scale in changed.items() if scale is not None}).write(path)
        return f"--cache={path}"


@pytest.fixture
def commands(tmp_path, meta, trained, capsys):
    yield Commands(tmp_path, meta, trained, capsys)
    for name in ("train", "quantize", "evaluate", "calib", "data", "models", "engines", "evaluation"):
        logging.getLogger(name).propagate = True


def test_weights_that_overflow_in_fp16_alone(commands):
    """FP32 is fine, FP16 gives NaN: counted, named, and no PASSED."""
    with torch.no_grad():
        commands.network.conv1.weight.mul_(1e6)
        commands.network.conv1.bias.mul_(1e6)
        commands.network.conv2.weight.mul_(1e-6)
    commands.save()
    commands.quantize()
    code, report, _ = commands.evaluate()
    half = next(row for row in report["rows"] if row["precision"] == "fp16")
    assert half["accuracy"]["non_finite"] > 0
    assert code == 1
    assert not report["verdict"]["passed"]
    assert any("NaN or infinity" in reason for reason in report["verdict"]["reasons"])


def test_a_threshold_that_int8_never_uses(commands):
    """Only what INT8 layers read can lose accuracy, and the output where it is quantized."""
    commands.save()
    flags = ("--algorithm=percentile", "--calibration.percentile=90", "--recalibrate")
    clips = [
        next((line for line in commands.quantize(*flags, *more)[2].splitlines() if "percentile clips" in line), "")
        for more in ((), ("--keep-fp=conv2",), ("--quantize-output=true",))
    ]
    named = [set(re.findall(r"% of (\w+)", line)) for line in clips]
    assert "pool1" in named[0]
    assert named[0] & {"conv1", "conv2", "ip2", "prob"} == set()
    assert named[1] == named[0] - {"pool1"}
    assert named[2] == named[0] | {"ip2", "prob"}


@pytest.mark.parametrize("scale", [0.0, 1e-45, 3e38, math.nan, -0.01])
def test_scales_that_cannot_quantize(commands, scale):
    """Zero, subnormal, beyond float32, no positive number: the tensor is named, and what reads it stays in float."""
    commands.save()
    commands.quantize()
    code, report, err = commands.evaluate(commands.edit_table(pool1=scale), "--tolerance=100")
    assert code == 0
    assert "warning: conv2 stays in float" in err
    assert "what it was made from is not known" in err
    int8 = next(row for row in report["rows"] if row["precision"] == "int8")
    assert "conv2" not in int8["details"]["int8 layers"].split(", ")


def test_a_table_that_another_run_replaced(commands):
    """Two runs that share a file: whoever wrote it last has it, and the other one notices."""
    commands.save()
    shared = f"--cache={commands.folder / 'shared'}"
    commands.quantize(shared)
    shutil.copytree(commands.run, commands.folder / "artifacts" / "first")
    with torch.no_grad():
        commands.network.ip2.bias[0] += 1
    commands.save()
    before = (commands.folder / "shared").read_bytes()
    with pytest.raises(InputError, match=r"shared was made for other weights: .* --recalibrate"):
        commands.quantize(shared)
    assert (commands.folder / "shared").read_bytes() == before
    commands.quantize(shared, "--recalibrate")
    code, report, _ = commands(evaluate, *QUICK, "--run=first")
    assert code == 1
    assert "was made for other weights since" in str(report["rows"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": "0" * 64}, "is not what the network was trained on"),
        ({"classes": tuple("ABCDEFGHIJ")}, "prepared differently, or have other classes"),
        ({"classes": tuple("01234")}, "not a classifier of this data set"),
        ({"preprocessing": {"scale": 1 / 256}}, "prepared differently, or have other classes"),
        ({"preprocessing": {"mean": (0.1307,), "std": (0.3081,)}}, "prepared differently, or have other classes"),
        ({"preprocessing": {"height": 32, "width": 32}}, "does not take images|prepared differently"),
        ({"preprocessing": {"height": 29, "width": 29}}, "prepared differently, or have other classes"),
    ],
)
def test_other_images_than_the_network_was_trained_on(commands, change, message):
    dataset = commands.meta.dataset
    if "preprocessing" in change:
        change = {"preprocessing": dataclasses.replace(dataset.preprocessing, **change["preprocessing"])}
    commands.save(dataclasses.replace(commands.meta, dataset=dataclasses.replace(dataset, **change)))
    for command in (commands.quantize, commands.evaluate):
        with pytest.raises(InputError, match=message):
            command()
