"""evaluate.py as a user runs it, on the bundled digits."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from common.errors import InputError
from evaluate import main
from evaluation.results import read_report
from models import load_checkpoint, save_checkpoint
from tests.evaluation.conftest import calibrate
from tests.runs import digits_run

pytestmark = pytest.mark.e2e
Command = Callable[..., subprocess.CompletedProcess[str]]
QUICK = ("--evaluation.latency_seconds", "0.001", "--evaluation.latency_runs", "5", "--latency-batch-sizes", "[1,4]")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artifacts of a trained and calibrated run."""
    artifacts = tmp_path_factory.mktemp("artifacts")
    digits_run(artifacts, "digits", steps=150, validation=200)
    calibrate(artifacts)
    return artifacts


@pytest.fixture
def artifacts(prepared: Path, tmp_path: Path) -> Path:
    shutil.copytree(prepared, tmp_path / "artifacts")
    return tmp_path / "artifacts"


@pytest.fixture
def flags(artifacts: Path) -> list[str]:
    return ["--run", "digits", "--artifacts", str(artifacts), "--engine", "torch", *QUICK]


def test_the_whole_command(command: Command, flags: list[str], artifacts: Path) -> None:
    result = command("evaluate.py", *flags, "--report")

    assert "PASSED: FP16 and INT8 each lose at most 1 point and agree with FP32 on at least 90 %" in result.stdout
    assert "engine torch: asked for" in result.stderr
    report = read_report(artifacts / "digits" / "report.json")
    assert report.verdict.passed
    assert report.analysis is not None
    assert (artifacts / "digits" / "report.html").exists()
    assert (artifacts / "digits" / "report.md").exists()
    assert (artifacts / "digits" / "figures" / "accuracy_latency.svg").exists()
    assert list((artifacts / "digits" / "logs").rglob("events.out.*"))
    assert "scikit-learn's 1,797 digits" in result.stdout


def test_json_alone_on_stdout(command: Command, flags: list[str], artifacts: Path) -> None:
    result = command("evaluate.py", *flags, "--json")

    report = json.loads(result.stdout)
    assert report["verdict"]["passed"]
    assert not (artifacts / "digits" / "report.json").exists()


def test_the_report_goes_where_it_is_told(flags: list[str], artifacts: Path, tmp_path: Path) -> None:
    assert main([*flags, "--report", str(tmp_path / "elsewhere"), "--no-analysis"]) == 0

    report = read_report(tmp_path / "elsewhere" / "report.json")
    assert report.analysis is None
    assert report.tensors
    assert report.config["evaluation"]["analysis"] is False
    assert not (artifacts / "digits" / "report.json").exists()


def test_a_failed_verdict_is_exit_code_1(flags: list[str], artifacts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = artifacts / "digits" / "CalibrationTableLeNet"
    broken = table.read_text().splitlines()
    broken = [f"{line.split(': ')[0]}: 3a000000" if line.startswith(("pool", "ip1")) else line for line in broken]
    (artifacts / "broken").write_text("\n".join(broken) + "\n")

    assert main([*flags, "--cache", str(artifacts / "broken")]) == 1
    assert "FAILED: INT8 top-1" in capsys.readouterr().out


def test_weights_that_overflow_in_fp16_alone_are_counted_and_do_not_pass(
    flags: list[str], artifacts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = load_checkpoint(artifacts / "digits" / "model.ckpt")
    with torch.no_grad():
        for name, factor in (("conv1.weight", 1e6), ("conv1.bias", 1e6), ("conv2.weight", 1e-6)):
            checkpoint.network.get_parameter(name).mul_(factor)
    save_checkpoint(artifacts / "digits" / "model.ckpt", checkpoint.network, checkpoint.meta)
    calibrate(artifacts)
    capsys.readouterr()

    assert main([*flags, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["rows"][1]["accuracy"]["non_finite"] > 0
    assert any("FP16 gave NaN or infinity" in reason for reason in report["verdict"]["reasons"])


def test_without_a_table_int8_is_skipped_and_nothing_passes(
    flags: list[str], artifacts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (artifacts / "digits" / "quantization.json").unlink()

    assert main([*flags, "--report"]) == 1

    out = capsys.readouterr().out
    assert "INT8 skipped: there is no calibration table yet: run quantize.py --precision int8" in out
    assert "FAILED: INT8 did not run" in out
    report = read_report(artifacts / "digits" / "report.json")
    assert report.analysis is None
    assert report.tensors[0].scale is None


def test_a_precision_that_was_not_asked_for(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*flags, "--precisions", "[int8]"]) == 0
    assert "FP16 skipped: it was not asked for" in capsys.readouterr().out
    assert main([*flags, "--precisions", "[fp32,fp16]"]) == 1


def test_a_part_of_the_training_file(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    part = ("--split", "train", "--batch-size", "32", "--start", "2", "--batches", "10")

    assert main([*flags, *part, "--tolerance", "100", "--agreement", "0", "--json"]) == 0

    report = json.loads(capsys.readouterr().out)
    assert report["data"] == report["data"] | {"split": "train", "images": 320, "start": 2, "batches": 10}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "nothing"], "no checkpoint .* run train.py first"),
        (["--data.dataset", "mnist"], "trained on digits"),
        (["--cache", "missing"], "cannot read missing"),
        (["--run", "../up"], "run name"),
    ],
)
def test_bad_input_is_one_line(flags: list[str], artifacts: Path, arguments: list[str], message: str) -> None:
    (artifacts / "digits" / "report.json").write_text("earlier")

    with pytest.raises(InputError, match=message) as error:
        main([*flags, *arguments, "--report"])

    assert "\n" not in str(error.value)
    assert (artifacts / "digits" / "report.json").read_text() == "earlier"
    assert not (artifacts / "nothing").exists()


def test_a_start_beyond_the_images_is_noticed_before_anything_is_measured(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="skips all"):
        main([*flags, "--start", "99"])
    assert "engine torch" not in capsys.readouterr().err


def test_a_report_that_cannot_be_written_is_noticed_before_anything_is_measured(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("kept")
    for path in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/report"), Path("a\0b")):
        with pytest.raises(InputError, match="cannot write the report into"):
            main([*flags, "--report", str(path)])
    assert "engine torch" not in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "kept"


def test_a_report_that_fails_in_the_end_is_still_printed(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(InputError, match=r"cannot write .*report\.html"):
        main([*flags, "--report", str(tmp_path), "--no-analysis"])
    assert "PASSED: FP16 and INT8 each lose at most" in capsys.readouterr().out


def test_more_threads_than_cores_are_pointed_out(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    cores = len(os.sched_getaffinity(0))
    for threads in (cores, cores + 1):
        with pytest.raises(InputError, match="skips all"):
            main([*flags, "--threads", str(threads), "--start", "99"])
        warned = (
            f"warning: engine.threads {threads} is more than the {cores} cores there are" in capsys.readouterr().err
        )
        assert warned is (threads > cores)
