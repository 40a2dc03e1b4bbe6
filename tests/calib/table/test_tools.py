"""``python -m calib``: the tools for tables; their formats, messages and exit codes."""

import itertools
import json
import math
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import ValueInfoProto
from onnx.helper import make_graph, make_node

from calib.__main__ import main
from calib.table import CalibrationTable, formats
from common.command import run_command
from common.errors import InputError
from tests.calib.onnx.networks import model, save

TABLE = CalibrationTable({"data": 0.01, "conv1": 0.5, "a: b=c": 3.0}, "entropy2", "8.6.1")
NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r\0"), min_size=1)
SCALES = st.floats(0, exclude_min=True, allow_nan=False, allow_infinity=False, width=32)


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "CalibrationTableLeNet"
    TABLE.write(path)
    return path


def run(*arguments):
    return main([str(argument) for argument in arguments])


# show


def test_show(table, capsys):
    assert run("show", table) == 0
    out = capsys.readouterr().out
    assert "entropy2, TensorRT 8.6.1, 3 tensors" in out
    assert [line.split()[0] for line in out.splitlines()[2:]] == ["data", "conv1", "a:"]
    assert "63.5" in out
    assert "3f000000" in out


def test_show_json_reads_back(table, tmp_path, capsys):
    assert run("show", table, "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["scales"] == TABLE.scales
    assert content["dynamic_ranges"]["conv1"] == 63.5
    copy = tmp_path / "copy.json"
    copy.write_text(json.dumps(content))
    assert formats.read(copy) == TABLE


# diff


def test_diff_shows_what_is_missing_and_what_changed(table, tmp_path, capsys):
    other = tmp_path / "other"
    CalibrationTable({"data": 0.01, "conv1": 0.25, "new": 1.0}, "minmax", "10.12.0").write(other)
    assert run("diff", table, other) == 1
    out = capsys.readouterr().out
    assert "line 1 differs: TRT-8601-EntropyCalibration2 and TRT-101200-MinMaxCalibration" in out
    assert f"not in {table}: new" in out
    assert f"not in {other}: a: b=c" in out
    assert "0.500000" in out
    assert "1 of 2 tensors in both tables" in out
    assert run("diff", table, other, "--json") == 1
    content = json.loads(capsys.readouterr().out)
    assert content["missing"] == {str(table): ["new"], str(other): ["a: b=c"]}
    assert content["changed"]["conv1"]["ratio"] == 0.5
    assert content["equal"] is False


def test_diff_tolerance_and_line_1(table, tmp_path, capsys):
    other = tmp_path / "other"
    CalibrationTable({name: scale * 1.01 for name, scale in TABLE.scales.items()}, "minmax").write(other)
    assert run("diff", table, other) == 1
    assert run("diff", table, other, "--tolerance", "0.009") == 1
    assert run("diff", table, other, "--tolerance", "0.02") == 0
    assert "line 1 differs" in capsys.readouterr().out


def test_diff_with_a_scale_of_zero(table, tmp_path, capsys):
    other = tmp_path / "other"
    CalibrationTable({**TABLE.scales, "data": 0.0}, "entropy2", "8.6.1").write(other)
    assert run("diff", other, table) == 1
    assert run("diff", other, table, "--json") == 1
    assert '"ratio": null' in capsys.readouterr().out


def test_diff_compares_what_holds_scales_alone(table, tmp_path, capsys):
    ranges, json_file = tmp_path / "x.flatbuffers", tmp_path / "x.json"
    run("convert", table, ranges)
    json_file.write_text(json.dumps({"scales": {**TABLE.scales, "data": 0.02}}))
    capsys.readouterr()
    assert run("diff", table, ranges, "--tolerance", "1e-6") == 0
    assert run("diff", json_file, ranges, "--tolerance", "1e-6") == 1
    assert "line 1" not in capsys.readouterr().out
    assert run("diff", table, json_file, "--json") == 1
    content = json.loads(capsys.readouterr().out)
    assert content["headers"] == [TABLE.header, None]
    assert list(content["changed"]) == ["data"]


# check


def test_tools_for_text_refuse_other_formats_in_one_line(table, tmp_path):
    for name, what in (("x.json", "JSON"), ("x.flatbuffers", "no text")):
        run("convert", table, tmp_path / name)
        before = (tmp_path / name).read_bytes()
        for arguments in (["check", tmp_path / name], ["set", tmp_path / name, "data=1"]):
            with pytest.raises(InputError, match=f"^.*{name} is {what}, .*convert.*$"):
                run(*arguments)
        assert (tmp_path / name).read_bytes() == before


def test_check_lists_every_bad_line(tmp_path, capsys):
    path = tmp_path / "bad"
    path.write_text("TRT-9001-Magic\ndata: 3c008912\nconv1 3c88edfc\ndata: 3c008912\nx: 7fc00000\nend: 3c0089123\n")
    assert run("check", path) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "tensor 'x': the scale is NaN" in lines.pop(-2)
    assert [line.split(" line ")[1].split(":")[0] for line in lines[:-1]] == ["1", "1", "3", "4", "6"]
    assert lines[-1] == f"{path}: 5 problems"


def test_check_as_json(table, tmp_path, capsys):
    assert run("check", table, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {
        "table": str(table),
        "valid": True,
        "header": TABLE.header,
        "tensors": len(TABLE.scales),
        "problems": [],
        "warnings": [],
    }
    bad = tmp_path / "bad"
    bad.write_text("TRT-8601-EntropyCalibration2\ndata: 3c008912\nconv1 3c88edfc\nx: 7fc00000\n")
    assert run("check", bad, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["valid"], found["header"], found["tensors"]) == (False, None, 2)
    assert "line 3" in found["problems"][0]
    assert found["warnings"] == ["tensor 'x': the scale is NaN"]


def test_merge_names_what_it_takes_and_nothing_can_use(table, tmp_path, capsys):
    CalibrationTable({"data": math.inf, "conv1": 0.25}).write(tmp_path / "other")
    assert run("merge", table, tmp_path / "other", "--take", "*") == 0
    assert capsys.readouterr().err == "warning: tensor 'data' cannot be quantized: the scale is infinite\n"


def test_a_table_in_utf16_is_named_so(table, tmp_path):
    other = tmp_path / "windows"
    other.write_text(table.read_text(encoding="utf-8"), encoding="utf-16")
    for line in (["show", other], ["check", other], ["convert", other, tmp_path / "out"]):
        with pytest.raises(InputError, match="UTF-16, as PowerShell writes it: save it as UTF-8"):
            run(*line)


def test_check_warns_of_scales_and_line_ends(tmp_path, capsys):
    path = tmp_path / "table"
    path.write_bytes(b"TRT-8601-EntropyCalibration2\r\ndata: 3c008912\r\ndead: 00000000\r\ntiny: 00000001\r\n")
    assert run("check", path) == 0
    out = capsys.readouterr().out
    assert "CR LF" in out
    assert "'dead': scale 0" in out
    assert "'tiny'" in out
    assert "subnormal" in out


def network(path, *nodes, weights=()):
    zeros = dict.fromkeys(weights, np.zeros((1, 1, 1, 1), np.float32))
    return save(model([make_node(*one) for one in nodes], {"data": None}, {"prob": None}, zeros), path)


@pytest.fixture
def lenet_like(tmp_path):
    return network(
        tmp_path / "network.onnx",
        ("Transpose", ["w0"], ["w"]),
        ("Conv", ["data", "w"], ["conv1"]),
        ("MaxPool", ["conv1"], ["pool1"]),
        ("Reshape", ["pool1", "shape"], ["flat"]),
        ("Gemm", ["flat", "w"], ["ip1_before"]),
        ("Relu", ["ip1_before"], ["ip1"]),
        ("Softmax", ["ip1"], ["prob"]),
        weights=("w0", "shape"),
    )


def test_check_against_a_network(lenet_like, tmp_path, capsys):
    path = tmp_path / "table"
    moved = ["pool1", "flat", "ip1_before"]
    for lacking in ([], moved):
        names = [name for name in ["data", "conv1", *moved, "ip1", "prob"] if name not in lacking]
        CalibrationTable(dict.fromkeys(names, 1.0)).write(path)
        assert run("check", path, "--onnx", lenet_like) == 0
        assert ("warning: " in capsys.readouterr().out) == bool(lacking)
    CalibrationTable(dict.fromkeys(["data", "conv1", "conv2", "prob", "w"], 1.0)).write(path)
    capsys.readouterr()
    assert run("check", path, "--onnx", lenet_like) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"the network {lenet_like} has no tensors 'conv2', 'w'"
    assert [line.split("'")[1] for line in lines[1:-2]] == ["ip1"]
    assert lines[-2] == (
        f"warning: {path}: without a scale for tensors 'pool1', 'flat', 'ip1_before' of the network {lenet_like}, "
        "TensorRT may run what reads or writes them in float (MaxPool, Reshape, Gemm, Relu)"
    )


def test_a_warning_names_a_few_tensors(tmp_path, capsys):
    chain = ["data", *(f"t{number}" for number in range(8))]
    nodes = [("Transpose", [a], [b]) for a, b in itertools.pairwise(chain)]
    path = network(tmp_path / "network.onnx", *nodes, ("Softmax", ["t7"], ["prob"]))
    CalibrationTable({"data": 1.0, "prob": 1.0}).write(tmp_path / "table")
    assert run("check", tmp_path / "table", "--onnx", path) == 0
    assert "for tensors 't0', 't1', 't2', 't3', 't4' and 3 more (8 in all) of the network" in capsys.readouterr().out


def test_sizes_need_no_scale(tmp_path, capsys):
    path = network(
        tmp_path / "network.onnx",
        ("Conv", ["data", "w"], ["conv1"]),
        ("Shape", ["conv1"], ["shape"]),
        ("Div", ["shape", "w"], ["half"]),
        ("Concat", ["half", "w"], ["sizes"]),
        ("Relu", ["conv1"], ["relu1"]),
        ("Reshape", ["relu1", "sizes"], ["prob"]),
        weights=("w",),
    )
    CalibrationTable(dict.fromkeys(["data", "conv1", "relu1", "prob"], 1.0)).write(tmp_path / "table")
    assert run("check", tmp_path / "table", "--onnx", path) == 0
    assert "warning" not in capsys.readouterr().out


def test_what_only_the_branches_of_an_if_read_is_no_constant(tmp_path, capsys):
    branch = make_graph([make_node("Relu", ["conv1"], ["inside"])], "branch", [], [ValueInfoProto(name="inside")])
    nodes = [
        make_node("Conv", ["data", "w"], ["conv1"]),
        make_node("If", ["flag"], ["prob"], then_branch=branch, else_branch=branch),
    ]
    made = model(nodes, {"data": None}, {"prob": None}, {"w": np.zeros((1, 1, 1, 1)), "flag": np.array(True)})
    CalibrationTable(dict.fromkeys(["data", "conv1", "prob"], 1.0)).write(tmp_path / "table")
    assert run("check", tmp_path / "table", "--onnx", save(made, tmp_path / "network.onnx")) == 0
    assert "no tensor" not in capsys.readouterr().out


def test_check_against_what_is_no_float_network(table, tmp_path):
    quantized = network(tmp_path / "q.onnx", ("QuantizeLinear", ["data", "s"], ["prob"]), weights=("s",))
    with pytest.raises(InputError, match="takes no table"):
        run("check", table, "--onnx", quantized)
    garbage = tmp_path / "garbage.onnx"
    for content in (b"", b"\x00" * 100, b"garbage " * 100, os.urandom(1000)):
        garbage.write_bytes(content)
        with pytest.raises(InputError, match="not an ONNX file"):
            run("check", table, "--onnx", garbage)
    with pytest.raises(InputError, match="cannot read"):
        run("check", table, "--onnx", tmp_path / "missing.onnx")


# convert


def test_convert_rewrites_line_1_in_place(table, capsys):
    body = table.read_text().split("\n", 1)[1]
    assert run("convert", table, table, "--tensorrt-version", "10.12.0.36", "--algorithm", "minmax") == 0
    assert table.read_text() == "TRT-101200-MinMaxCalibration\n" + body
    assert "TRT-101200-MinMaxCalibration" in capsys.readouterr().out


def test_onnxruntime_reads_its_ranges(table, tmp_path):
    from onnxruntime.quantization.CalTableFlatBuffers.TrtTable import TrtTable

    run("convert", table, tmp_path / "calibration.flatbuffers")
    ranges = TrtTable.GetRootAs((tmp_path / "calibration.flatbuffers").read_bytes(), 0)
    entries = [ranges.Dict(index) for index in range(ranges.DictLength())]
    found = {entry.Key().decode(): float(entry.Value()) for entry in entries}
    assert found == pytest.approx(TABLE.dynamic_ranges, rel=1e-7)


def test_onnxruntimes_ranges_need_an_algorithm_and_usable_scales(table, tmp_path, capsys):
    run("convert", table, tmp_path / "ranges.flatbuffers")
    with pytest.raises(InputError, match="--algorithm"):
        run("convert", tmp_path / "ranges.flatbuffers", tmp_path / "x")
    CalibrationTable({"x": 1.0, "dead": 0.0, "infinite": math.inf}).write(table)
    capsys.readouterr()
    for to in ("onnxruntime", "onnxruntime-json", "onnxruntime-cache", "ranges", "nvdla"):
        assert run("convert", table, tmp_path / "ranges", "--to", to) == 0
        assert "and not tensors 'dead', 'infinite'" in capsys.readouterr().err
        assert formats.read(tmp_path / "ranges", algorithm="minmax").scales == {"x": 1.0}
    CalibrationTable({"dead": 0.0}).write(table)
    with pytest.raises(InputError, match="no scale of the table can be used"):
        run("convert", table, tmp_path / "ranges.flatbuffers")


def test_damaged_ranges_are_refused(table, tmp_path):
    path = tmp_path / "ranges.flatbuffers"
    run("convert", table, path)
    content = path.read_bytes()
    damaged = [content[:length] for length in range(8, len(content))]
    damaged += [
        content[:i] + bytes([content[i] ^ bit]) + content[i + 1 :] for i in range(len(content)) for bit in (1, 128)
    ]
    damaged += [struct.pack("<I", 2**31) + content, bytes(64), b"\0" + b"\xff" * 64]
    for item in damaged:
        path.write_bytes(item)
        try:
            formats.read(path, algorithm="entropy2")
        except InputError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("tool", ["convert", "set"])
def test_side_file_is_not_overwritten(table, tool):
    side_file = table.with_name("CalibrationTableLeNet.json")
    with pytest.raises(InputError, match="side file"):
        run(tool, table, *([side_file] if tool == "convert" else ["data=1", "--output", side_file]))
    assert not side_file.exists()


@pytest.mark.parametrize("tool", ["convert", "set"])
def test_side_file_that_fits_no_longer_is_mentioned(table, capsys, tool):
    arguments = [table, "--tensorrt-version", "8.5.2"] if tool == "convert" else ["data=1"]
    run(tool, table, *arguments)
    assert capsys.readouterr().err == ""
    table.with_name("CalibrationTableLeNet.json").write_text("{}")
    run(tool, table, *arguments)
    assert "fits it no longer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "not valid JSON"),
        ("{}", "neither scales nor dynamic_ranges"),
        ('{"scales": {}}', "neither scales nor dynamic_ranges"),
        ('{"scales": [1]}', "must map tensor names to numbers"),
        ('{"scales": {"x": "1"}}', "must map tensor names to numbers"),
        ('{"scales": {"x": true}}', "must map tensor names to numbers"),
        ('{"scales": {"x": null}}', "must map tensor names to numbers"),
        ('{"scales": {"x": 1}}', "give --algorithm"),
        ('{"scales": {"x": 1, "x": 2}}', "twice"),
        ('{"algorithm": "entropy2", "scales": {"x": -1}}', "negative"),
        ('{"algorithm": "entropy2", "scales": {"x": NaN}}', "NaN"),
        ('{"algorithm": "entropy2", "scales": {"x": 1e999}}', "infinite"),
        ('{"algorithm": "entropy2", "scales": {"x": 1%s}}' % ("0" * 400), "beyond"),
        ('{"algorithm": "entropy2", "scales": {"": 1}}', "no name"),
        ('{"algorithm": "entropy9", "scales": {"x": 1}}', "entropy9"),
        ('{"algorithm": 2, "scales": {"x": 1}}', "must be text"),
        ('{"algorithm": "entropy2", "tensorrt_version": "9.0.1", "scales": {"x": 1}}', "TensorRT 9"),
        ('{"algorithm": "entropy2", "scales": {"x": 1}, "dynamic_ranges": {"x": 128}}', "disagree about 'x'"),
        ('{"algorithm": "entropy2", "scales": {"x": 1}, "dynamic_ranges": {"y": 127}}', "disagree about"),
        ("{" + '"a":{' * 100_000, "not valid JSON"),
    ],
)
def test_malformed_json(tmp_path, content, complaint):
    path = tmp_path / "table.json"
    path.write_text(content)
    with pytest.raises(InputError, match=complaint) as caught:
        formats.read(path)
    assert str(path) in str(caught.value)


def test_json_may_give_ranges_alone(tmp_path):
    path = tmp_path / "table.json"
    path.write_text('{"algorithm": "minmax", "dynamic_ranges": {"x": 127, "y": 63.5}}')
    table = formats.read(path)
    assert table.scales == {"x": 1.0, "y": 0.5}
    assert table.tensorrt_version == "10.12.0"


@given(st.dictionaries(NAMES, SCALES, min_size=1, max_size=5), st.sampled_from(["table", "json"]))
def test_formats_keep_every_bit(tmp_path_factory, scales, to):
    path = tmp_path_factory.getbasetemp() / "any format"
    table = CalibrationTable(scales)
    formats.write(path, table, to)
    again = formats.read(path)
    assert again == table
    assert list(again.scales) == list(table.scales)


# set


def test_set_ranges_and_scales(table):
    assert run("set", table, "conv1=12.7", "a: b=c=1e-3") == 0
    changed = CalibrationTable.read(table)
    assert changed.dynamic_ranges == pytest.approx({"data": 1.27, "conv1": 12.7, "a: b=c": 1e-3}, rel=1e-6)
    assert changed.header == TABLE.header
    assert run("set", table, "data=0.25", "--scale") == 0
    assert CalibrationTable.read(table).scales["data"] == 0.25


def test_set_adds_only_when_asked(table):
    before = table.read_bytes()
    with pytest.raises(InputError, match="no tensor 'conv9'"):
        run("set", table, "data=1", "conv9=1")
    assert table.read_bytes() == before
    assert run("set", table, "conv9=1", "--add") == 0
    assert list(CalibrationTable.read(table).scales)[-1] == "conv9"


@pytest.mark.parametrize(
    "value",
    [
        *("data", "=1", "data=", "data=x", "data=0", "data=-1"),
        *("data=nan", "data=inf", "data=1e60", "data=1e-60", "data=1e-37"),
    ],
)
def test_set_refuses(table, value):
    before = table.read_bytes()
    with pytest.raises(InputError):
        run("set", table, value)
    assert table.read_bytes() == before


# the command


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["show", "TABLE"], 0),
        (["diff", "TABLE", "TABLE"], 0),
        (["check", "TABLE"], 0),
        (["check", "BAD"], 1),
        (["show", "BAD"], 2),
        (["show", "MISSING"], 2),
        (["diff", "TABLE", "TABLE", "--tolerance", "-1"], 2),
        (["diff", "TABLE", "TABLE", "--tolerance", "x"], 2),
        (["convert", "TABLE", "TABLE", "--tensorrt-version", "9.1.0"], 2),
        (["convert", "TABLE", "/proc/none/table"], 2),
        (["set", "TABLE"], 2),
        (["frobnicate"], 2),
        ([], 2),
        (["--help"], 0),
        (["set", "--help"], 0),
    ],
)
def test_exit_codes(table, tmp_path, capsys, arguments, code):
    (tmp_path / "bad").write_text("nonsense\n")
    names = {"TABLE": str(table), "BAD": str(tmp_path / "bad"), "MISSING": str(tmp_path / "missing")}
    with pytest.raises(SystemExit) as caught:
        run_command(main, [names.get(item, item) for item in arguments])
    assert caught.value.code == code
    err = capsys.readouterr().err
    assert err.startswith("error: ") == (code == 2)
    assert err.count("\n") == (code == 2)


def test_the_module_starts_without_heavy_imports(root, table):
    program = [sys.executable, "-X", "importtime", "-m", "calib", "show", str(table)]
    result = subprocess.run(program, cwd=root, capture_output=True, text=True, check=True)
    assert "conv1" in result.stdout
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "calib.table" in imported
    assert not {"torch", "numpy", "onnx", "rich", "jsonargparse"} & imported
