import dataclasses
import json
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from benchmarks import hardware
from common.config import DataConfig
from common.errors import InputError
from data import open_splits
from evaluation.measures import Accuracy, Interval, Latency, Paired, Row, Timing
from evaluation.results import Report
from tests.records import REPORT

EVERYWHERE = Interval(0.0, 0.0)


def timing(median: float) -> Timing:
    return Timing(100, median, median, median, median, 1000 / median)


def row(precision, top1=None, **others) -> Row:
    if top1 is None:
        return Row(precision, "torch-tensorrt", "compared", **others)
    accuracy = Accuracy(100, 99, 100, top1, 100.0, EVERYWHERE, 100.0, None, 0, 0.0, [], [])
    paired = None if precision == "fp32" else Paired(1, 0, top1 - 99.0, EVERYWHERE, 0.0, 1.0, 1.0)
    role = "reference" if precision == "fp32" else "compared"
    latency = [Latency(1, timing(0.025), timing(0.055)), Latency(256, timing(0.09))]
    details = {"TensorRT": "10.6.0", "TF32": "off"}
    return Row(precision, "torch-tensorrt", role, "a GPU", None, 3_250_000, None, accuracy, paired, latency, details)


def report() -> Report:
    return dataclasses.replace(
        REPORT,
        run="lenet",
        data=dataclasses.replace(REPORT.data, name="mnist", title="MNIST"),
        seconds={"compile": 61.5},
        rows=[row("fp32", 99.0), row("fp16", skipped="no fast FP16"), row("int8", 98.5)],
        environment=dataclasses.replace(REPORT.environment, gpu="a GPU", gpu_details={"driver_version": "5"}),
    )


PAIRS = [
    {"reference": "data", "tensorrt": "input_0", "ratio": 1.0},
    {"reference": "conv1", "tensorrt": "x", "ratio": 1.01},
    {"reference": None, "tensorrt": "[Freeze Tensor]", "ratio": None},
]
PREPARED = {
    "run": "lenet",
    "calibration": {"images": 500, "batch_seconds": [0.1, 0.1], "post_seconds": 0.05},
    "tensorrt": {"seconds": 21.0, "tensors": PAIRS},
}


def test_the_table_shows_graph_and_call_and_why_a_precision_did_not_run():
    page = hardware.markdown([hardware.MeasuredRun("lenet.yaml", {"train": 9.0}, PREPARED, report(), 0)])
    assert "| GPU | a GPU, driver 5 |" in page
    assert "torch 2.8.0, TensorRT 10.6.0" in page
    assert "| LeNet on MNIST | top-1 | points | engine | batch 1 | batch 256 |" in page
    assert "| FP32 | 99.00 % |  | 3.25 MB | 0.0250 (0.0550) | 0.0900 |" in page
    assert "| FP16 | skipped: no fast FP16 |" in page
    assert "| INT8 | 98.50 % | -0.50 |" in page
    assert "of 500 images took 0.25 s" in page
    assert "Of 2 tensors, 2 have a counterpart in its table, 1 of them with our scale" in page
    assert "a second run built 0 engines" in page


def test_the_commands_run_as_a_user_starts_them(tmp_path, monkeypatch):
    lines: list[list[str]] = []

    def run(what, line, codes):
        lines.append(list(line[1:]))
        output = ""
        if "quantize.py" in line[1]:
            output = json.dumps(PREPARED)
        if what == "evaluate":
            folder = tmp_path / "lenet" / "report"
            folder.mkdir(parents=True)
            (folder / "report.json").write_text(json.dumps(dataclasses.asdict(report())))
        log = "building LeNet_fp32_b1.ts: changed\n  built in 1.0 s\nusing the engine x\n" if "again" in what else ""
        return subprocess.CompletedProcess(line, 0, output, log)

    monkeypatch.setattr(hardware, "run_process", run)
    found = hardware.measure("configs/lenet_mnist.yaml", tmp_path, 3, ["--seed", "2"])
    programs = [line[0].rpartition("/")[2] for line in lines]
    assert programs == ["train.py", "quantize.py", "evaluate.py", "evaluate.py"]
    common = ["--config", "configs/lenet_mnist.yaml", "--artifacts", str(tmp_path), "--seed", "2"]
    assert all(line[1:7] == common for line in lines)
    assert lines[0][-2:] == ["--trainer.max_epochs", "3"]
    assert [tuple(line[7:9]) == ("--engine", "torch-tensorrt") for line in lines] == [False, True, True, True]
    assert found.rebuilt == 1
    assert found.report == report()
    assert set(found.seconds) == {"train", "quantize", "evaluate", "evaluate again"}


def test_a_command_that_fails_is_one_line(tmp_path):
    with pytest.raises(InputError, match="train ended with exit code 2"):
        hardware.measure("configs/none.yaml", tmp_path, None, [])


def test_options_that_it_does_not_know_are_the_commands():
    options, others = hardware.parser().parse_known_args(["--epochs", "3", "--engine.timing_iterations", "1"])
    assert options.epochs == 3
    assert others == ["--engine.timing_iterations", "1"]


def test_digits_as_a_folder_of_images(tmp_path):
    digits = open_splits(DataConfig(dataset="digits"), 1)
    folder = hardware.digit_folder(tmp_path / "digits", digits, train=2, test=1)
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*.png")}
    numbers = {"train": (0, 1), "test": (0,)}
    assert found == {f"{part}/{digit}/{at}.png" for part in numbers for digit in range(10) for at in numbers[part]}
    first = digits.test.images((digits.test.labels == 3).nonzero()[:1, 0])
    enlarged = functional.interpolate(first, size=(224, 224), mode="bilinear")[0]
    written = torch.from_numpy(np.asarray(Image.open(folder / "test" / "3" / "0.png")).copy()).permute(2, 0, 1)
    torch.testing.assert_close(written / 255, enlarged.expand(3, -1, -1), atol=0.01, rtol=0)


def test_files_of_an_unknown_network():
    with pytest.raises(InputError, match="unknown network vgg1: take some of lenet, "):
        hardware.main(["--configs", "--files", "lenet", "vgg1"])
