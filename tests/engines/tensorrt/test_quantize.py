"""quantize.py with Torch-TensorRT as its engine, over a stand-in, from the command line to the files."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from calib.table import CalibrationTable
from common.errors import InputError
from evaluate import main as evaluate
from quantize import main
from tests.runs import digits_run
from tests.upstream import INSTALLED, Upstream

THEIRS = CalibrationTable(
    {
        "input_0": 0.0078,
        "(Unnamed Layer* 0) [Convolution]_output": 0.0105,
        "(Unnamed Layer* 1) [Pooling]_output": 0.0105,
        "(Unnamed Layer* 5) [Shuffle]_output": 0.05,
        "output_0": 0.008,
    }
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return digits_run(tmp_path_factory.mktemp("trained"), steps=0).artifacts


@pytest.fixture
def artifacts(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path, dirs_exist_ok=True))


@pytest.fixture
def machine(machine):
    """As the others' machine, with a TensorRT that writes THEIRS."""
    return lambda upstream=None, **others: machine(upstream or Upstream(table=THEIRS), **others)


@pytest.fixture
def quantize(artifacts, capsys):
    """Run the command: its JSON."""

    def run(*arguments):
        small = ["--batches", "2", "--batch-size", "20"]
        assert main(["--artifacts", str(artifacts), "--json", *small, *arguments]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_another_minimum_of_the_search_is_called_that(machine, quantize):
    machine()
    convolution = quantize()["calibration"]["tensors"]["conv1"]
    candidate = round(convolution["threshold"] / convolution["range"] * 2048 - 0.5) - 3
    scale = (candidate + 0.5) * convolution["range"] / 2048 / 127
    name = "(Unnamed Layer* 0) [Convolution]_output"
    machine(Upstream(table=CalibrationTable({**THEIRS.scales, name: scale})))
    pairs = {pair["reference"]: pair for pair in quantize("--recalibrate")["tensorrt"]["tensors"]}
    assert re.fullmatch(r"another candidate of the search: .* is \d+\.\d\d % larger", pairs["conv1"]["note"])
    assert pairs["pool1"]["note"] == ""  # no candidate's scale


def test_tensorrt_calibrates_and_both_tables_are_shown(machine, quantize, artifacts):
    upstream = machine()
    summary = quantize()
    assert summary["engine"]["name"] == "torch-tensorrt"
    assert summary["engine"]["device"] == "NVIDIA H200"
    assert "the first that can run here" in summary["engine"]["reason"]
    assert summary["tensorrt"]["calibrated"]
    folder = artifacts / "lenet_mnist"
    assert (folder / "tensorrt" / "CalibrationTableLeNet").read_text() == THEIRS.dumps()
    assert (folder / "CalibrationTableLeNet").read_text().splitlines()[1].startswith("data: ")
    pairs = {pair["reference"]: pair for pair in summary["tensorrt"]["tensors"]}
    assert pairs["data"]["tensorrt"] == "input_0"
    assert pairs["prob"]["tensorrt"] == "output_0"
    assert pairs["ip2"]["tensorrt"] is None
    assert pairs[None]["tensorrt"] == "(Unnamed Layer* 5) [Shuffle]_output"
    # Once to calibrate, with data; once to build from the table, without.
    calibrators = [arguments["calibrator"] for _, arguments in upstream.calls]
    assert [calibrator.use_cache for calibrator in calibrators] == [False, True]
    assert upstream.calls[0][1]["inputs"][0][0][0] == 20


def test_a_second_run_reuses_both_tables_and_the_engine_unless_asked_to_recalibrate(machine, quantize):
    machine()
    quantize()
    upstream = machine()
    for arguments, calibrated in (((), False), (("--recalibrate",), True)):
        summary = quantize(*arguments)
        assert summary["tensorrt"]["calibrated"] is calibrated
        assert summary["table"]["calibrated"] is calibrated
        assert bool(upstream.calls) is calibrated


def test_another_algorithm_calibrates_both(machine, quantize):
    machine()
    quantize()
    machine(Upstream(table=CalibrationTable(THEIRS.scales, "minmax")))
    summary = quantize("--algorithm", "minmax")
    assert summary["tensorrt"]["header"] == "TRT-101200-MinMaxCalibration"
    assert summary["tensorrt"]["calibrated"]


@pytest.mark.parametrize(
    "arguments", [["--quantization", "explicit"], ["--keep-fp", "conv1"], ["--algorithm", "percentile"]]
)
def test_explicit_needs_no_calibration_by_tensorrt(machine, quantize, artifacts, arguments):
    upstream = machine()
    summary = quantize(*arguments)
    assert "tensorrt" not in summary
    assert summary["engine"]["quantization"].startswith("explicit")
    assert not (artifacts / "lenet_mnist" / "tensorrt").exists()
    assert ["calibrator" in arguments for _, arguments in upstream.calls] == [False]


def test_a_build_error_ends_the_command_in_one_line(machine, artifacts):
    machine(Upstream(error=RuntimeError("[Error thrown at a.cpp:1] no kernel image")))
    with pytest.raises(InputError, match="TensorRT could not build the engine: no kernel image") as caught:
        main(["--artifacts", str(artifacts)])
    assert "\n" not in str(caught.value)
    assert not (artifacts / "lenet_mnist" / "tensorrt" / "CalibrationTableLeNet").exists()


QUICK = [
    *("--precisions", "[int8]", "--latency-batch-sizes", "[]"),
    *("--no-analysis", "--tolerance", "100", "--agreement", "0", "--json"),
]


def test_what_stops_one_precision_is_exit_code_2_and_the_others_run(machine, quantize, artifacts, capsys):
    machine()
    quantize()
    machine(installed=replace(INSTALLED, tensorrt="10.6.0"))
    evaluation = ["--artifacts", str(artifacts), "--latency-batch-sizes", "[]", "--no-analysis", "--json"]

    assert evaluate([*evaluation, "--engine", "torch-tensorrt"]) == 2
    out, err = capsys.readouterr()
    rows = {row["precision"]: row for row in json.loads(out)["rows"] if row["role"] != "baseline"}
    assert {precision for precision, row in rows.items() if row["accuracy"]} == {"fp32", "fp16"}
    (line,) = [line for line in err.splitlines() if "INT8" in line]
    assert "INT8 is skipped: TensorRT has to calibrate LeNet again (its table is of TensorRT 10.12.0, and" in line

    # Where the engine was not asked for by name, another one runs it.
    assert evaluate([*evaluation, "--tolerance", "100", "--agreement", "0"]) == 0


class TestNamedTable:
    """``--cache`` with a table that no calibration made, where TensorRT has calibrated before."""

    @pytest.fixture
    def by_hand(self, machine, quantize, artifacts, tmp_path):
        machine()
        quantize()
        table = CalibrationTable.read(artifacts / "lenet_mnist" / "CalibrationTableLeNet")

        def write(algorithm="entropy2"):
            path = tmp_path / "by_hand"
            CalibrationTable({**table.scales, "ip1": 5.0}, algorithm).write(path)
            return str(path)

        return write

    @pytest.fixture
    def evaluated(self, artifacts, capsys):
        """Run evaluate.py: its row of INT8."""

        def run(*arguments):
            capsys.readouterr()
            assert evaluate(["--artifacts", str(artifacts), *QUICK, *arguments]) == 0
            (row,) = [row for row in json.loads(capsys.readouterr().out)["rows"] if row["precision"] == "int8"]
            return row

        return run

    @staticmethod
    def scales(upstream):
        """The scales in the last module that TensorRT was given; its calibrator must not come along."""
        module, arguments = upstream.calls[-1]
        assert "calibrator" not in arguments
        return {float(text) for text in re.findall(r"value=([0-9.e-]+)\]", str(module.inlined_graph))}

    @pytest.mark.parametrize("algorithm", ["entropy2", "minmax"])
    def test_is_what_the_engine_runs_from(self, machine, quantize, by_hand, algorithm):
        upstream = machine()
        summary = quantize("--cache", by_hand(algorithm))
        assert summary["engine"]["quantization"].startswith("explicit")
        assert "tensorrt" not in summary
        assert 5.0 in self.scales(upstream)

    def test_is_recorded_for_the_evaluation(self, machine, quantize, by_hand, evaluated):
        machine()
        quantize("--cache", by_hand())
        upstream = machine()
        assert evaluated()["details"]["quantization"].startswith("explicit")
        assert 5.0 in self.scales(upstream)

    def test_may_be_named_for_the_evaluation_alone(self, machine, by_hand, evaluated):
        upstream = machine()
        assert evaluated("--cache", by_hand())["details"]["quantization"].startswith("explicit")
        assert 5.0 in self.scales(upstream)

    def test_without_it_tensorrts_own_is_back(self, machine, quantize, by_hand):
        machine()
        quantize("--cache", by_hand())
        assert quantize()["engine"]["quantization"].startswith("implicit")

    @pytest.mark.parametrize("command", [main, evaluate])
    def test_is_refused_where_implicit_is_asked_for(self, machine, by_hand, artifacts, command):
        upstream = machine()
        arguments = ["--artifacts", str(artifacts), "--cache", by_hand(), "--quantization.mode", "implicit"]
        with pytest.raises(InputError, match="take --quantization explicit, or leave --cache out"):
            command(arguments)
        assert upstream.calls == []
