"""quantize.py as a user runs it, on the bundled digits."""

import dataclasses
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

import common.run
from calib.table import CalibrationTable
from common.cli import run_command
from evaluation.subject import open_subject
from models import load_checkpoint, save_checkpoint
from quantize import main
from tests.evaluation.conftest import make_config
from tests.networks import without_saturation
from tests.runs import digits_run

pytestmark = pytest.mark.e2e
Run = Callable[..., subprocess.CompletedProcess[str]]
TABLE = "CalibrationTableLeNet"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of artifacts with a checkpoint of LeNet, briefly trained on the digits."""
    return digits_run(tmp_path_factory.mktemp("trained")).artifacts


@pytest.fixture
def artifacts(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "artifacts")
    return tmp_path / "artifacts"


@pytest.fixture
def quantize(command: Run, artifacts: Path) -> Run:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return command("quantize.py", "--artifacts", artifacts, "--engine", "torch", *arguments)

    return run


def summary(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert result.returncode == 0, result.stderr
    value: dict[str, Any] = json.loads(result.stdout)
    return value


def test_it_calibrates_writes_the_table_and_reuses_it(quantize: Run, artifacts: Path) -> None:
    first = quantize()
    assert "calibrated batch 10 of 10" in first.stderr
    assert "post-processing took" in first.stderr
    assert "wrote the calibration table to" in first.stderr
    assert "LeNet is ready in int8 on torch" in first.stdout
    assert "simulated" in first.stdout
    text = (artifacts / "lenet_mnist" / TABLE).read_text()
    assert text.startswith("TRT-101200-EntropyCalibration2\ndata: 3")
    assert [line.partition(":")[0] for line in text.splitlines()[1:]] == [
        "data", "conv1", "pool1", "conv2", "pool2", "ip1", "ip2", "prob",
    ]  # fmt: skip

    again = summary(quantize("--json"))
    assert not again["table"]["calibrated"]
    assert (artifacts / "lenet_mnist" / TABLE).read_text() == text
    forced = summary(quantize("--json", "--recalibrate"))
    assert forced["table"]["calibrated"]
    assert forced["table"]["scales"] == again["table"]["scales"]


def test_what_changed_is_named_and_calibrated_again(in_process: Run) -> None:
    in_process()
    result = in_process("--json", "--algorithm", "minmax", "--batches", "8")
    assert summary(result)["table"]["algorithm"] == "minmax"
    assert "algorithm changed from entropy2 to minmax" in result.stderr
    assert "subset batches changed from 10 to 8" in result.stderr


def test_a_foreign_table_is_taken_when_named_with_a_warning(in_process: Run, artifacts: Path, tmp_path: Path) -> None:
    in_process()
    foreign = tmp_path / "elsewhere"
    shutil.copy(artifacts / "lenet_mnist" / TABLE, foreign)
    result = in_process("--json", "--cache", str(foreign))
    assert summary(result)["table"]["path"] == str(foreign)
    assert "warning: using the cached table:" in result.stderr
    assert "no side file" in result.stderr


@pytest.fixture
def in_process(artifacts: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """The same without the start of a process: for the many ways to go wrong."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        argv = ["--artifacts", str(artifacts), "--engine", "torch", *arguments]
        with pytest.raises(SystemExit) as exit_info:
            run_command(main, argv)
        captured = capsys.readouterr()
        return subprocess.CompletedProcess(argv, int(str(exit_info.value.code)), captured.out, captured.err)

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batches", "1", "--batch-size", "5"], "error: the calibration subset has no image of class"),
        (["--batches", "1000"], "error: calibration needs 50000 images"),
        (["--keep-fp", "conv7"], "error: no layer 'conv7' in LeNet: choose from conv1"),
        (["--batches", "0"], "calibration.batches must be at least 1"),
        (["--algorithm", "entropy3"], "calibration.algorithm"),
        (["--precision", "int4"], "precision"),
        (["--run", "never_trained"], "run train.py first"),
        (["--run", "../elsewhere"], "run name '../elsewhere' is not usable"),
        (["--auto-mixed", "--precision", "fp32"], "--auto-mixed goes with --precision int8"),
        (["--any-size"], "--any-size goes with --export onnx"),
        (["--compare-algorithms", "magic"], "unknown algorithm 'magic'"),
        (["--sweep-images", "many"], "--sweep-images takes numbers of images"),
        (["--skip", "1"], "goes with the subset 'first'"),
        (["--no-such-option"], "no-such-option"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_lost(
    in_process: Run, artifacts: Path, arguments: list[str], message: str
) -> None:
    table = artifacts / "lenet_mnist" / TABLE
    table.write_text("what was here before\n")
    result = in_process(*arguments, "--recalibrate")
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert table.read_text() == "what was here before\n"


def test_an_engine_that_cannot_be_used_leaves_the_table(in_process: Run, artifacts: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("Torch-TensorRT may be usable here")
    assert in_process().returncode == 0
    table = artifacts / "lenet_mnist" / TABLE
    before = table.read_bytes()
    result = in_process("--algorithm", "minmax", "--engine", "torch-tensorrt")
    assert result.returncode == 2
    assert "error: engine torch-tensorrt cannot be used here" in result.stderr
    assert table.read_bytes() == before


def test_half_of_what_torchrun_sets_is_one_clear_line(
    in_process: Run, artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    result = in_process()
    assert result.returncode == 2
    assert result.stderr == "error: WORLD_SIZE is set, but not all that torchrun sets: 'RANK'\n"
    assert not (artifacts / "lenet_mnist" / ".lock").exists()


@pytest.mark.parametrize(
    ("arguments", "warned"),
    [
        (["--keep-fp", "conv1,conv2,ip1,ip2"], True),
        (["--keep-fp", "conv1,conv2,ip1"], False),
        (["--keep-fp", "conv1,conv2,ip1,ip2", "--quantize-output", "true"], False),
    ],
)
def test_int8_without_a_layer_in_int8_is_pointed_out(in_process: Run, arguments: list[str], warned: bool) -> None:
    result = in_process("--json", *arguments)
    assert result.returncode == 0, result.stderr
    assert ("warning: no layer of LeNet is left in INT8" in result.stderr) is warned
    assert ("% of the multiply-accumulates are in INT8; in float: " in result.stderr) is not warned


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_other_precisions_need_no_calibration(in_process: Run, artifacts: Path, precision: str) -> None:
    assert summary(in_process("--json", "--precision", precision))["precision"] == precision
    assert not (artifacts / "lenet_mnist" / TABLE).exists()


def test_studies_leave_the_run_as_it_was(quantize: Run, artifacts: Path) -> None:
    before = sorted((artifacts / "lenet_mnist").iterdir())
    found = summary(quantize("--json", "--compare-algorithms", "entropy2,minmax", "--sweep-images", "50,100"))
    assert list(found["algorithms"]) == ["entropy2", "minmax"]
    assert [point["images"] for point in found["sweep"]] == [50, 100]
    assert {path.name for path in (artifacts / "lenet_mnist").iterdir()} == {path.name for path in before} | {".lock"}


def test_studies_for_people(in_process: Run) -> None:
    result = in_process("--compare-algorithms", "entropy2,minmax", "--sweep-images", "50,100")
    assert result.returncode == 0, result.stderr
    assert re.search(r"^ +minmax +\d+\.\d\d % +[+-]\d\.\d\d +\d+\.\d\d % +\d+\.\d dB", result.stdout, re.M)
    assert re.search(r"^ +100 +\d+\.\d\d % +\d+\.\d\d to \d+\.\d\d %", result.stdout, re.M)
    assert "images" in result.stdout


def test_mixed_precision_is_recorded(in_process: Run, artifacts: Path) -> None:
    """With a table that ruins conv2, it finds that conv2 has to stay in float."""
    assert summary(in_process("--json"))["keep_fp"] == []
    path = artifacts / "lenet_mnist" / TABLE
    table = CalibrationTable.read(path)
    scales = {**table.scales, "pool1": table.scales["pool1"] * 400, "conv1": table.scales["conv1"] * 400}
    named = artifacts / "ruined"
    dataclasses.replace(table, scales=scales).write(named)
    result = in_process("--json", "--cache", str(named), "--auto-mixed", "--tolerance", "2")
    assert "conv2" in summary(result)["keep_fp"]
    assert "mixed precision: " in result.stderr
    record = json.loads((artifacts / "lenet_mnist" / "quantization.json").read_text())
    assert "conv2" in record["quantization"]["keep_fp"]


def test_the_export_opens_in_onnx_runtime(quantize: Run, artifacts: Path) -> None:
    result = summary(quantize("--json", "--export", "onnx"))
    *networks, table = result["files"]
    assert [Path(file).name for file in networks] == ["LeNet_fp32.onnx", "LeNet_int8.onnx", "LeNet_int8_cpu.onnx"]
    assert Path(table).read_text().startswith("TRT-101200-EntropyCalibration2\n")
    # TensorRT's own names of what no ONNX value is: a product before its bias, a constant, the softmax.
    assert {"/ip1/Gemm_output", "ip1.bias_output", "/prob/Softmax_output"} <= CalibrationTable.read(table).scales.keys()
    images = torch.rand(3, 1, 28, 28)
    outputs = []
    for file in networks:
        options = without_saturation() if file.endswith("_int8.onnx") else None
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        outputs.append(torch.from_numpy(session.run(["prob"], {"data": images.numpy()})[0]))
    torch.testing.assert_close(outputs[0], outputs[1], atol=0.2, rtol=0)
    torch.testing.assert_close(outputs[1], outputs[2], atol=1e-3, rtol=0)


def change_weights(folder: Path) -> None:
    checkpoint = load_checkpoint(folder / "model.ckpt")
    torch.nn.init.ones_(checkpoint.network.get_parameter("ip2.bias"))
    save_checkpoint(folder / "model.ckpt", checkpoint.network, checkpoint.meta)


def test_a_table_that_another_run_replaced(in_process: Run, artifacts: Path) -> None:
    """Two runs that share a file: whoever wrote it last has it, and the other one notices."""
    shared = artifacts / "shared"
    assert in_process("--cache", str(shared)).returncode == 0
    shutil.copytree(artifacts / "lenet_mnist", artifacts / "first")
    change_weights(artifacts / "lenet_mnist")
    before = shared.read_bytes()
    refused = in_process("--cache", str(shared))
    assert refused.returncode == 2
    assert re.search("shared was made for other weights: .* --recalibrate", refused.stderr)
    assert shared.read_bytes() == before
    assert in_process("--cache", str(shared), "--recalibrate").returncode == 0
    first = open_subject(make_config(artifacts), common.run.Run("first", artifacts))
    assert "was made for other weights since" in first.int8.problem


def test_a_threshold_that_int8_never_uses(in_process: Run) -> None:
    """Only what INT8 layers read can lose accuracy, and the output where it is quantized."""
    flags = ("--algorithm=percentile", "--calibration.percentile=90", "--recalibrate")
    clips = [
        next((line for line in in_process(*flags, *more).stderr.splitlines() if "percentile clips" in line), "")
        for more in ((), ("--keep-fp=conv2",), ("--quantize-output=true",))
    ]
    named = [set(re.findall(r"% of (\w+)", line)) for line in clips]
    assert "pool1" in named[0]
    assert named[0] & {"conv1", "conv2", "ip2", "prob"} == set()
    assert named[1] == named[0] - {"pool1"}
    assert named[2] == named[0] | {"ip2", "prob"}


def test_int8_files_of_other_weights_are_pointed_out(in_process: Run, artifacts: Path) -> None:
    folder = artifacts / "lenet_mnist"
    assert in_process("--json", "--export", "onnx").returncode == 0
    assert "stale" not in in_process("--json", "--precision", "fp32", "--export", "onnx").stderr

    change_weights(folder)
    (folder / "LeNet_int8_cpu.onnx").write_bytes(b"no network")
    result = in_process("--json", "--precision", "fp32", "--export", "onnx")
    (warning,) = [line for line in result.stderr.splitlines() if "stale" in line]
    assert warning.startswith(
        f"warning: {folder / 'LeNet_int8.onnx'} and {folder / 'LeNet_int8_cpu.onnx'} are stale, exported from other"
    )
    assert result.returncode == 0
