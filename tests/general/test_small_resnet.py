"""A residual network with batch normalisation through the three commands: the general path, on real data."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from calib import CalibrationTable, trace
from common.config import DataConfig, EngineConfig, QuantizationConfig
from data import open_splits
from engines.select import make_engine
from models import load_checkpoint

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_both_engines_agree_and_lose_nothing(
    command: Callable[..., subprocess.CompletedProcess[str]], mnist_dir: Path, tmp_path: Path
) -> None:
    """Briefly trained, to a tenth of the error that chance has, on 2,000 images; make bench does all of it."""
    common = ("--config", "configs/small_resnet_mnist.yaml", "--artifacts", tmp_path, "--data-dir", mnist_dir)
    short = ("--epochs", "1", "--trainer.limit_train_batches", "200", "--trainer.limit_test_batches", "2")
    trained = command("train.py", *common, *short)
    assert trained.returncode == 0, trained.stderr
    quantized = command("quantize.py", *common, "--precision", "int8")
    assert quantized.returncode == 0, quantized.stderr
    images = ("--batch-size", "500", "--batches", "4", "--evaluation.latency_seconds", "0.01")
    evaluated = command("evaluate.py", *common, *images, "--latency-batch-sizes", "[1]", "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    report = json.loads(evaluated.stdout)
    assert report["verdict"]["passed"]
    assert report["model"]["unsupported"] == {}

    folder = tmp_path / "small_resnet_mnist"
    checkpoint = load_checkpoint(folder / "model.ckpt")
    network = trace(checkpoint.network, "SmallResNet", (1, 28, 28))
    table = CalibrationTable.read(folder / "CalibrationTableSmallResNet")
    test = open_splits(DataConfig(dataset="mnist", dir=mnist_dir), 1).test
    found = {}
    for engine in ("torch", "onnxruntime"):
        for precision in ("fp32", "int8"):
            compiled = make_engine(engine, EngineConfig(), QuantizationConfig(), folder).compile(
                network, precision, table
            )
            batches = [test.images(slice(first, first + 500)) for first in range(0, 2000, 500)]
            found[engine, precision] = torch.cat([compiled(batch) for batch in batches]).argmax(1)
    right = {key: float((classes == test.labels[:2000]).double().mean()) for key, classes in found.items()}
    assert right["torch", "fp32"] > 0.97
    for engine in ("torch", "onnxruntime"):
        assert right[engine, "int8"] > right["torch", "fp32"] - 0.0025
    assert float((found["torch", "int8"] == found["onnxruntime", "int8"]).double().mean()) >= 0.999
