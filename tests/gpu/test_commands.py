"""The three commands end to end on a GPU with TensorRT: INT8 through TensorRT's own calibrator, engines kept.

Then once more with a table of another version, which stops INT8 alone.
"""

import json
import re
from dataclasses import replace

import pytest

from calib.table import CalibrationTable
from evaluate import main as evaluate
from quantize import main as quantize
from train import main as train

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("calibrator")]

SMALL = ("--engine.timing_iterations", "1", "--evaluation.batch_size", "32", "--evaluation.latency_batch_sizes", "[32]")
QUICK = ("--no-analysis", "--evaluation.latency_seconds", "0.05", "--evaluation.agreement", "0")
TENSORRT = ("--engine", "torch-tensorrt")


def compared(capsys):
    """Precision -> its row in the JSON report on stdout, without the baselines."""
    rows = json.loads(capsys.readouterr().out)["rows"]
    return {row["precision"]: row for row in rows if row["role"] != "baseline"}


def test_lenet_on_digits(tmp_path, capsys):
    here = ("--config", "configs/lenet_digits.yaml", "--artifacts", str(tmp_path), *SMALL)
    assert train([*here, "--trainer.max_epochs", "2"]) == 0
    capsys.readouterr()

    assert quantize([*here, *TENSORRT, "--precision", "int8", "--batches", "2", "--batch-size", "20", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["engine"]["quantization"].startswith("implicit")
    pairs = made["tensorrt"]["tensors"]
    assert made["tensorrt"]["calibrated"]
    assert all(pair["ratio"] is not None for pair in pairs if pair["reference"] is not None)
    assert {layer["layer"] for layer in made["macs"]["layers"]} <= {"conv1", "conv2", "ip1", "ip2"}
    assert re.fullmatch(r"as TensorRT's engine of batch \d+ executes it", made["macs"]["source"])

    evaluate([*here, *TENSORRT, *QUICK, "--json"])
    rows = compared(capsys)
    for precision in ("fp32", "fp16", "int8"):
        assert rows[precision]["skipped"] is None
        assert rows[precision]["accuracy"]["top1"] > 50

    engines = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.ts")}
    assert {path.name.split("_")[1] for path in engines} == {"fp32", "fp16", "int8-implicit"}
    evaluate([*here, *TENSORRT, *QUICK, "--report", str(tmp_path / "report")])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.ts")} == engines
    capsys.readouterr()

    (table,) = tmp_path.rglob("tensorrt/CalibrationTableLeNet")
    replace(CalibrationTable.read(table), tensorrt_version="10.5.0").write(table)
    assert evaluate([*here, *TENSORRT, *QUICK, "--json"]) == 2
    rows = compared(capsys)
    assert "its table is of TensorRT 10.5.0" in rows["int8"]["skipped"]
    assert rows["fp32"]["accuracy"]["top1"] > 50
    assert rows["fp16"]["accuracy"]["top1"] > 50
