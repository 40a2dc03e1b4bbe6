"""Networks and images of a user's own go through the three commands."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from safetensors.torch import save_file

from calib import CalibrationTable
from tests.data.sets import write_part

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).resolve().parents[2]
Command = Callable[..., subprocess.CompletedProcess[str]]

NETWORKS = '''
"""A user's module."""

from torch import nn


class Net(nn.Module):
    def __init__(self, width, num_classes):
        super().__init__()
        self.conv = nn.Conv2d(1, width, 5, stride=2)
        self.norm = nn.BatchNorm2d(width)
        self.act = nn.SiLU()
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.fc = nn.Linear(4 * width, num_classes)

    def forward(self, x):
        return self.fc(self.pool(self.act(self.norm(self.conv(x)))).flatten(1))


class Branching(Net):
    def forward(self, x):
        if x.mean() > 0.5:
            x = 1 - x
        return super().forward(x)
'''
CONFIG = """
run: own
data: {dataset: digits}
model:
  class_path: shop.networks:Net
  init_args: {width: 8}
evaluation: {latency_batch_sizes: [1], latency_seconds: 0.01, latency_runs: 1, analysis_images: 16, tolerance: 100}
trainer: {max_epochs: 1, precision: 32-true}
"""


@pytest.mark.slow
def test_a_folder_of_images(tmp_path: Path, command: Command) -> None:
    run, images = "mobilenet_v3_small_imagefolder", tmp_path / "images"
    for part, count in (("train", 16), ("val", 4)):
        write_part(images, part, count, ("bolt", "nut", "washer"))
    common: tuple[Any, ...] = (
        *("--config", ROOT / "configs" / f"{run}.yaml", "--artifacts", tmp_path, "--data-dir", images),
        *("--data.image_size", "32", "--data.resize", "36", "--data.batch_size", "8"),
    )
    command("train.py", *common, "--epochs", "1", "--trainer.precision", "32-true")
    calibration = ("--calibration.batches", "2", "--calibration.batch_size", "12")
    command("quantize.py", *common, *calibration, "--export", "onnx")
    quick = (
        *("--latency-batch-sizes", "[1]", "--evaluation.latency_seconds", "0.01", "--evaluation.latency_runs", "1"),
        *("--evaluation.analysis_images", "2", "--tolerance", "100", "--agreement", "0"),
    )
    result = command("evaluate.py", *common, *quick, "--report", "--json")

    report = json.loads(result.stdout)
    folder = tmp_path / run
    assert report["data"]["images"] == 12
    assert set(report["model"]["unsupported"].values()) == {"Hardsigmoid", "mul"}
    assert (folder / "report.html").stat().st_size > 10_000
    table = CalibrationTable.read(folder / "CalibrationTablemobilenet_v3_small")
    assert {tensor["name"] for tensor in report["tensors"]} == set(table.scales)
    session = onnxruntime.InferenceSession(folder / "mobilenet_v3_small_int8.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"data": torch.rand(3, 3, 32, 32).numpy()})
    assert found.shape == (3, 3)


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A user's folder: a package with networks, a configuration, weights in both formats."""
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "__init__.py").touch()
    (tmp_path / "shop" / "networks.py").write_text(NETWORKS, encoding="utf-8")
    (tmp_path / "own.yaml").write_text(CONFIG, encoding="utf-8")
    scope: dict[str, Any] = {}
    exec(NETWORKS, scope)
    torch.manual_seed(5)
    state = scope["Net"](8, 10).state_dict()
    torch.save(state, tmp_path / "weights.pt")
    save_file(state, tmp_path / "weights.safetensors")
    return tmp_path


@pytest.mark.slow
def test_a_class_of_the_users_own(shop: Path, command: Command) -> None:
    command("train.py", "--config", "own.yaml", cwd=shop)
    command("quantize.py", "--config", "own.yaml", "--export", "onnx", cwd=shop)
    result = command("evaluate.py", "--config", "own.yaml", "--report", "--json", cwd=shop)

    assert [row["precision"] for row in json.loads(result.stdout)["rows"]] == ["fp32", "fp16", "int8"]
    lines = (shop / "artifacts" / "own" / "CalibrationTableNet").read_text(encoding="ascii").splitlines()
    assert [line.partition(":")[0] for line in lines[1:]] == ["data", "conv", "act", "pool", "fc"]


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_trained_weights_are_taken_as_they_are(name: str, shop: Path, command: Command) -> None:
    """No epoch of training: the checkpoint is the user's weights, with what later commands need to know."""
    command("train.py", "--config", "own.yaml", "--model.weights", name, "--epochs", "0", cwd=shop)

    content = torch.load(shop / "artifacts" / "own" / "model.ckpt", weights_only=True)
    expected = torch.load(shop / "weights.pt", weights_only=True)
    assert all(torch.equal(content["state_dict"][key], value) for key, value in expected.items())


def test_a_network_that_cannot_be_traced_is_one_line_before_training(shop: Path, command: Command) -> None:
    """Also of quantize.py, where the network's source changed since the training."""
    own = ("--config", "own.yaml", "--model.class_path")
    refused = command("train.py", *own, "shop.networks.Branching", cwd=shop, code=2)
    assert not (shop / "artifacts" / "own" / "logs").exists()
    command("train.py", *own, "shop.networks:Net", "--epochs", "0", cwd=shop)
    changed = NETWORKS.replace("class Net(", "class Plain(").replace("Branching(Net)", "Net(Plain)")
    (shop / "shop" / "networks.py").write_text(changed, encoding="utf-8")
    results = {"Branching": refused, "Net": command("quantize.py", *own, "shop.networks:Net", cwd=shop, code=2)}

    for name, result in results.items():
        (line,) = (line for line in result.stderr.splitlines() if line.startswith("error"))
        assert line.startswith(f"error: network {name} cannot be traced: ")
        assert "branches on a value that depends on the images (networks.py:22: if x.mean() > 0.5:)" in line
        assert len(line) < 220
        assert "epoch" not in result.stderr
