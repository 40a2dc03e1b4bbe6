"""The same seed gives the same checkpoint, table and report on the same machine, in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[1]
OPTIONS = ("--config", str(ROOT / "configs" / "lenet_digits.yaml"))
EVALUATE = (
    *("--engine=torch", "--report", "--tolerance=100", "--batch-size=64", "--evaluation.analysis_images=32"),
    *("--latency-batch-sizes=[1]", "--evaluation.latency_seconds=0.001", "--evaluation.latency_runs=1"),
)
STEPS = (
    ("train", "--epochs", "2"),
    ("quantize", "--engine=onnxruntime", "--export=onnx"),
    ("evaluate", *EVALUATE),
)
CHAIN = """
import importlib, json, sys
for name, *arguments in json.loads(sys.argv[1]):
    assert importlib.import_module(name).main(arguments) == 0
"""
TIMES = {"created", "seconds", "latency", "run", "path", "artifacts"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, command):
    """Three runs, two of them with the same seed."""
    place = tmp_path_factory.mktemp("runs")
    for run, seed in (("one", 1), ("two", 1), ("three", 3)):
        options = (*OPTIONS, "--artifacts", str(place), "--run", run, "--seed", str(seed))
        steps = [(name, *options, *arguments) for name, *arguments in STEPS]
        if seed == 3:
            for name, *arguments in steps:
                command(f"{name}.py", *arguments, cwd=place)
            continue
        # The two that are to be equal start anew, each with hash seeds of its own, and with two threads, as on any
        # machine of today: the order of sums must not depend on which of them is first.
        line = [sys.executable, "-c", CHAIN, json.dumps(steps)]
        # Threads that wait give their core to other tests.
        threads = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
        variables = {**os.environ, **threads, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(line, cwd=place, env=variables, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
    return place


def figures(value: Any) -> Any:
    """A report without times and places."""
    if isinstance(value, dict):
        return {key: figures(item) for key, item in value.items() if key not in TIMES}
    return [figures(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    "name",
    [
        "model.ckpt",
        "checkpoints/best.ckpt",
        "CalibrationTableLeNet",
        "CalibrationTableLeNet.json",
        "LeNet_fp32.onnx",
        "LeNet_int8.onnx",
        "quantization.json",
    ],
)
def test_files_are_equal_to_the_byte(folder, name):
    one, two, three = ((folder / run / name).read_bytes() for run in ("one", "two", "three"))
    assert one == two
    assert one != three


def test_reports_have_the_same_figures(folder):
    reports = [json.loads((folder / run / "report.json").read_text()) for run in ("one", "two", "three")]
    one, two, three = (figures(report) for report in reports)
    assert one == two
    assert one["tensors"] != three["tensors"]
    assert one["analysis"] is not None
