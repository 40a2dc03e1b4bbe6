"""Tables and ranges as other programs write them, through ``python -m calib``."""

import json
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from calib.__main__ import main
from calib.table import CalibrationTable, formats
from common.errors import InputError

ZERO = "TRT-101200-EntropyCalibration2\nimages: 3c021406\nONNXTRT_Broadcast_1855_output: 0\nx: 3c010a14\n"
INFINITE = "TRT-6001-MinMaxCalibration\n(Unnamed Layer* 21) [Shuffle]_output: 3d0971dc\nbad: 7f800000\nc: 3c0660b4\n"
LEGACY = "0 3ff0000000000000 3fefffeb074a771d\ninput: 3d97aca7\nConv_0__output: 3eb2bbb9\n"
PAIRS = {
    "a": {"lowest": -8.0, "highest": 2.0, "CLS": "TensorData"},
    "neg": {"lowest": -3.0, "highest": -1.0, "CLS": "TensorData"},
}
LIMITS = st.dictionaries(
    st.text(st.characters(categories=["L", "N"]), min_size=1), st.floats(1e-30, 1e30), min_size=1, max_size=5
)


@pytest.fixture
def write(tmp_path):
    def write(content, name="table"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def run(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize("text", [ZERO, INFINITE, LEGACY, INFINITE.replace("7f800000", "bc008912")])
def test_convert_writes_back_what_it_read(write, tmp_path, text):
    assert run("convert", write(text), tmp_path / "copy") == 0
    assert (tmp_path / "copy").read_text() == text
    assert run("convert", tmp_path / "copy", tmp_path / "other.json") == 0
    assert run("convert", tmp_path / "other.json", tmp_path / "back") == 0
    assert CalibrationTable.read(tmp_path / "back") == CalibrationTable.loads(text)


def test_a_byte_order_mark(write, tmp_path, capsys):
    mark = b"\xef\xbb\xbf"
    assert run("convert", write(mark + ZERO.encode()), tmp_path / "copy") == 0
    assert (tmp_path / "copy").read_text() == ZERO
    assert "begins with a byte order mark: TensorRT does not recognise line 1" in capsys.readouterr().err
    for text in (json.dumps({"a": {"lowest": -8.0, "highest": 2.0}}), "a: 8.0\n", "a 8.0\n"):
        table = formats.read(write(mark + text.encode()), algorithm="minmax")
        assert table.dynamic_ranges == pytest.approx({"a": 8.0})


def test_an_infinite_scale_is_reported_everywhere(write, tmp_path, capsys):
    path = write(INFINITE)
    assert run("show", path) == 0
    assert "tensor 'bad' cannot be quantized: the scale is infinite" in capsys.readouterr().out
    assert run("show", path, "--json") == 0

    def refuse(name):
        raise AssertionError(name)

    content = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert content["scales"]["bad"] == "7f800000"
    assert content["unusable"] == {"bad": "the scale is infinite"}
    assert run("check", path) == 0
    assert "warning: " in capsys.readouterr().out
    assert run("convert", path, tmp_path / "copy") == 0
    assert "'bad' cannot be quantized" in capsys.readouterr().err
    assert run("diff", path, path) == 0
    nan = write(INFINITE.replace("7f800000", "7fc00000"), "nan")
    assert run("diff", nan, nan) == 0
    assert run("diff", path, nan, "--json") == 1
    assert "7fc00000" in capsys.readouterr().out


def test_a_table_without_line_1(write, tmp_path, capsys):
    path = write("images: 3c010a14\nx: 3d2b1111\n")
    for arguments in (["show", path], ["convert", path, tmp_path / "new"]):
        with pytest.raises(InputError, match="line 1: .*--algorithm"):
            run(*arguments)
    assert run("check", path) == 1
    assert "1 problem" in capsys.readouterr().out
    version = ["--algorithm", "entropy2", "--tensorrt-version", "8.5.2"]
    assert run("convert", path, tmp_path / "new", *version) == 0
    assert (tmp_path / "new").read_text() == "TRT-8502-EntropyCalibration2\nimages: 3c010a14\nx: 3d2b1111\n"
    assert run("diff", path, tmp_path / "new") == 0


def test_ranges_of_sample_int8_api(write):
    path = write("gpu_0/data_0: 1.00024\ngpu_0/conv1_1: 5.43116\nsmall: 1e-05\nwhole: 3\n")
    ranges = formats.read(path, algorithm="minmax").dynamic_ranges
    assert ranges == pytest.approx({"gpu_0/data_0": 1.00024, "gpu_0/conv1_1": 5.43116, "small": 1e-5, "whole": 3})
    with pytest.raises(InputError, match="--algorithm"):
        run("show", path)


def test_nvdlas_json_holds_scales(write):
    path = write('{"data": {"scale": 1.1892666816711426, "min": 0, "max": 0, "offset": 0}}')
    assert formats.read(path, algorithm="entropy2").scales == {"data": 1.1892666816711426}


@pytest.fixture
def onnxruntime_files(tmp_path):
    import numpy as np
    from onnxruntime.quantization import write_calibration_table
    from onnxruntime.quantization.calibrate import TensorData

    data = {
        name: TensorData(lowest=np.float32(pair["lowest"]), highest=np.float32(pair["highest"]))
        for name, pair in PAIRS.items()
    }
    write_calibration_table(data, str(tmp_path))
    return tmp_path


def test_onnxruntimes_json_alone_has_both_ends(onnxruntime_files, capsys):
    def ranges(name):
        return formats.read(onnxruntime_files / name, algorithm="minmax").dynamic_ranges

    assert ranges("calibration.json") == pytest.approx({"a": 8.0, "neg": 3.0})
    for name in ("calibration.flatbuffers", "calibration.cache"):
        assert ranges(name) == pytest.approx({"a": 2.0, "neg": -1.0})
        assert run("show", onnxruntime_files / name, "--algorithm", "minmax") == 0
        captured = capsys.readouterr()
        assert "'neg' cannot be quantized: the scale is negative" in captured.out
        assert "calibration.json has both" in captured.err


def test_onnxruntimes_other_json(write):
    array = {"data": [4.0], "dtype": "float32", "CLS": "numpy.array"}
    content = {
        "CLS": "TensorsData",
        "data": {"x": {"lowest": -1.0, "highest": array, "CLS": "TensorData"}},
        "calibration_method": {"CLS": "CalibrationMethod", "value": "CalibrationMethod.MinMax"},
    }
    assert formats.read(write(json.dumps(content)), algorithm="minmax").dynamic_ranges == pytest.approx({"x": 4.0})


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('{"x": {"lowest": "a", "highest": 1}}', "no numbers"),
        ('{"x": {"lowest": [1, 2], "highest": 1}}', "no numbers"),
        ('{"CLS": "TensorsData"}', "must map"),
        ('{"CLS": "TensorsData", "data": {"x": 1}}', "must map"),
        ('{"x": {"lowest": 1%s, "highest": 1}}' % ("0" * 400), "beyond"),
        ('{"x": {"scale": null}}', "must map tensor names to numbers"),
        ('{"x": {"scale": 1e39}}', "beyond"),
        ('{"x": {"scale": 1}, "y": 1}', "neither scales nor"),
        ('{"legacy": 1, "algorithm": "legacy", "scales": {"x": 1}}', "legacy must hold"),
        ("a: 1.5\na: 2.5\n", "twice"),
        ("a 1.5\nb\n", "line 2"),
    ],
)
def test_malformed_files_of_others(write, content, complaint):
    with pytest.raises(InputError, match=complaint) as error:
        formats.read(write(content), algorithm="minmax")
    assert "\n" not in str(error.value)


@given(LIMITS, st.sampled_from(formats.FORMATS))
@example({"0": 1.0}, "onnxruntime-cache")  # is no line 1 of a legacy table
def test_every_format_reads_back(tmp_path_factory, limits, form):
    path = tmp_path_factory.getbasetemp() / f"ranges-{form}"
    table = CalibrationTable({name: limit / 127 for name, limit in limits.items()}, "minmax")
    assert formats.write(path, table, form) == []
    back = formats.read(path, algorithm="minmax")
    assert dict(sorted(back.scales.items())) == pytest.approx(dict(sorted(table.scales.items())), rel=1e-6)


# remove and merge


def test_remove(write, tmp_path, capsys):
    path = write(ZERO)
    assert run("remove", path, "ONNXTRT_Broadcast_*", "--output", tmp_path / "new") == 0
    assert (tmp_path / "new").read_text() == ZERO.replace("ONNXTRT_Broadcast_1855_output: 0\n", "")
    assert "removed tensor 'ONNXTRT_Broadcast_1855_output'" in capsys.readouterr().out
    assert run("remove", path, "images") == 0
    assert path.read_text() == ZERO.replace("images: 3c021406\n", "")
    for names, complaint in ((["nothing"], "no tensor 'nothing'"), (["*"], "nothing would be left")):
        with pytest.raises(InputError, match=complaint):
            run("remove", path, *names)


def test_a_name_with_special_characters_is_itself_first(write):
    path = write(INFINITE + "(Unnamed Layer* 21 and more) [Shuffle]_output: 3f800000\n")
    assert run("remove", path, "(Unnamed Layer* 21) [Shuffle]_output") == 0
    assert list(CalibrationTable.read(path).scales) == ["bad", "c", "(Unnamed Layer* 21 and more) [Shuffle]_output"]


def test_merge_takes_entries_by_pattern(write, tmp_path, capsys):
    path = write("TRT-8601-EntropyCalibration2\nconv1: 3f800000\nconv2: 3f800000\nfc: 0\n")
    other = tmp_path / "other"
    CalibrationTable({"conv1": 2.0, "conv2": 3.0, "conv3": 4.0, "fc": 5.0}, "minmax").write(other)
    assert run("merge", path, other, "--take", "conv*", "--output", tmp_path / "new") == 0
    assert (tmp_path / "new").read_text() == "TRT-8601-EntropyCalibration2\nconv1: 40000000\nconv2: 40400000\nfc: 0\n"
    assert "took tensors 'conv1', 'conv2' from" in capsys.readouterr().out
    assert run("merge", path, other, "--take", "conv?", "--add") == 0
    assert CalibrationTable.read(path).scales == {"conv1": 2.0, "conv2": 3.0, "fc": 0.0, "conv3": 4.0}
    path = write("TRT-8601-EntropyCalibration2\nconv1: 3f800000\n")
    with pytest.raises(InputError, match="--add"):
        run("merge", path, other, "--take", "conv3")
    with pytest.raises(InputError, match="no tensor 'conv9'"):
        run("merge", path, other, "--take", "conv9")


def test_a_scale_in_json_may_be_infinite_as_digits(write):
    table = formats.read(write('{"algorithm": "minmax", "scales": {"x": "7f800000"}}'))
    assert math.isinf(table.scales["x"])
