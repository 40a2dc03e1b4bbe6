"""The calibration table's format: round trips, versions, and everything that a file can get wrong."""

import copy
import math
import pickle
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calib.table import (
    CalibrationTable,
    Legacy,
    parse,
    scale_from_hex,
    scan,
    version_number,
    version_string,
    why_unusable,
)
from common.errors import InputError

SAMPLE = """\
TRT-7202-EntropyCalibration2
data: 3c008912
conv1: 3c88edfc
(Unnamed Layer* 4) [Fully Connected]_output: 3dc6a9ed
a: b: c: 3f800000
prob: 3c010a14
"""

NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r\0"), min_size=1)
SCALES = st.floats(0, exclude_min=True, allow_nan=False, allow_infinity=False, width=32)
TABLES = st.builds(
    CalibrationTable,
    st.dictionaries(NAMES, SCALES, min_size=1, max_size=8),
    st.sampled_from(["entropy2", "entropy", "minmax", "legacy"]),
    st.sampled_from(["7.2.2", "8.6.1", "10.0.1", "10.12.0"]),
)


def problems(text):
    table, found = parse(text)
    assert (table is None) == bool(found)
    return [(problem.line, problem.message) for problem in found]


def test_reads_what_tensorrt_writes():
    table = CalibrationTable.loads(SAMPLE)
    assert list(table.scales) == ["data", "conv1", "(Unnamed Layer* 4) [Fully Connected]_output", "a: b: c", "prob"]
    assert (table.algorithm, table.tensorrt_version) == ("entropy2", "7.2.2")
    assert table.scales["data"] * 127 * 2048 == pytest.approx(2040.5, rel=1e-7)
    assert table.scales["prob"] * 127 * 2048 == pytest.approx(2048.5, rel=1e-7)
    assert table.scales["a: b: c"] == 1.0
    assert table.dumps() == SAMPLE


def test_dynamic_ranges_are_127_scales():
    table = CalibrationTable({"a": 0.5, "b": 2.0})
    assert table.dynamic_ranges == {"a": 63.5, "b": 254.0}


@given(TABLES)
def test_round_trip(table):
    again = CalibrationTable.loads(table.dumps())
    assert again == table
    assert list(again.scales) == list(table.scales)
    crlf = CalibrationTable.loads(table.dumps().replace("\n", "\r\n"))
    assert crlf == table


def test_scales_are_rounded_to_float32():
    scale = CalibrationTable({"x": 0.1}).scales["x"]
    assert scale == struct.unpack("f", struct.pack("f", 0.1))[0] != 0.1


def test_can_be_copied_and_pickled():
    table = CalibrationTable.loads(SAMPLE)
    assert copy.deepcopy(table) == table
    assert pickle.loads(pickle.dumps(table)) == table


def test_does_not_change_with_what_it_was_made_from():
    scales = {"x": 1.0}
    table = CalibrationTable(scales)
    scales["y"] = 2.0
    assert list(table.scales) == ["x"]


@pytest.mark.parametrize(
    ("version", "number"),
    [("7.0.0", 7000), ("7.2.2", 7202), ("8.6.1", 8601), ("8.5.10", 8510), ("10.0.1", 100001), ("10.12.0", 101200)],
)
def test_versions(version, number):
    assert version_number(version) == number
    assert version_string(number) == version


def test_build_number_is_dropped():
    assert version_number("10.12.0.36") == 101200
    assert CalibrationTable({"x": 1.0}, tensorrt_version="8.5.2.2").tensorrt_version == "8.5.2"


@pytest.mark.parametrize(
    "version",
    [
        *("", "10", "10.12", "10.12.0.36.1", "10.12.x", "v10.12.0", "10.12.0-rc1", " 10.12.0", "10.12.0\n", "-1.2.3"),
        *("0.1.2", "7.10.0", "7.2.100", "9.0.1", "10.100.0", "10.12.100", "100.0.0", "1O.12.0", "10..0"),
        "\u0661\u0660.12.0",
    ],
)
def test_versions_without_a_number(version):
    with pytest.raises(InputError, match="TensorRT"):
        version_number(version)


@pytest.mark.parametrize("number", [0, 7, 999, 9001, 10000, 10120, 99999, 1000000])
def test_numbers_without_a_version(number):
    with pytest.raises(InputError, match=str(number)):
        version_string(number)


@given(st.integers(0, 1_100_000))
def test_versions_and_numbers_are_one_to_one(number):
    try:
        version = version_string(number)
    except InputError:
        return
    assert version_number(version) == number


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("conv1 3c88edfc", "expected 'name: 8 hex digits'"),
        ("conv1:3c88edfc", "expected 'name: 8 hex digits'"),
        ("", "expected 'name: 8 hex digits'"),
        ("conv1: ", "must be 8 hex digits, not ''"),
        ("conv1: 3c88edfc0", "must be 8 hex digits"),
        ("conv1: 0x3c88ed", "must be 8 hex digits"),
        ("conv1: 3c88edfg", "must be 8 hex digits"),
        ("conv1: \uff13c88edfc", "must be 8 hex digits"),
        ("conv1: +c88edfc", "must be 8 hex digits"),
        (": 3c88edfc", "no name"),
        ("data: 3c88edfc", "'data' already appeared in line 2"),
        ("co\rnv1: 3c88edfc", "line breaks"),
        ("co\0nv1: 3c88edfc", "NUL"),
    ],
)
def test_malformed_lines(line, complaint):
    text = f"TRT-7202-EntropyCalibration2\ndata: 3c008912\n{line}\nlast: 3c008912\n"
    ((number, message),) = problems(text)
    assert number == 3
    assert complaint in message
    with pytest.raises(InputError, match=r"^some/file line 3: ") as caught:
        CalibrationTable.loads(text, "some/file")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("", "expected 'TRT-<version>-<algorithm>'"),
        ("data: 3c008912", "expected 'TRT-<version>-<algorithm>'"),
        ("TRT-8XXX-EntropyCalibration2", "expected 'TRT-<version>-<algorithm>'"),
        ("TRT--EntropyCalibration2", "expected 'TRT-<version>-<algorithm>'"),
        ("TRT-12345678901234567890-EntropyCalibration2", "expected 'TRT-<version>-<algorithm>'"),
        ("TRT-9001-EntropyCalibration2", "9001 is not the number of a TensorRT version"),
        ("TRT-7202-EntropyCalibration3", "unknown algorithm 'EntropyCalibration3'"),
        ("TRT-7202-entropycalibration2", "unknown algorithm"),
        *((line, "expected 'TRT-") for line in ("0", "0 1 2", "0 3ff0000000000000")),
        ("1 3ff0000000000000 3fefffeb074a771d", "expected 'TRT-"),
    ],
)
def test_malformed_first_line(line, complaint):
    ((number, message),) = problems(f"{line}\nconv1: 3c88edfc\n")
    assert number == 1
    assert complaint in message


def test_every_problem_is_found_and_the_first_is_named():
    text = "TRT-1-Magic\nx\ny: 3c0089123\nz: 3c008912\nz: 3c008912\n"
    assert [line for line, _ in problems(text)] == [1, 1, 2, 3, 5]
    with pytest.raises(InputError, match=r"line 1: .* \(and 4 more\)$"):
        CalibrationTable.loads(text)


@pytest.mark.parametrize("text", ["", "\n", "TRT-7202-EntropyCalibration2", "TRT-7202-EntropyCalibration2\n\n"])
def test_files_without_a_tensor(text):
    assert any("no tensor" in message for _, message in problems(text))


def test_empty_lines_may_follow():
    assert CalibrationTable.loads(SAMPLE + "\n\r\n\n") == CalibrationTable.loads(SAMPLE.rstrip("\n"))


def test_tensorrt_writes_a_tensor_of_zeros_as_0():
    table = CalibrationTable.loads("TRT-8401-EntropyCalibration2\ninput: 3caa54fc\n366: 0\n367: 00000000\n")
    assert table.scales["366"] == table.scales["367"] == 0.0
    assert list(table.unusable) == ["366", "367"]
    assert table.dumps().splitlines()[2:] == ["366: 0", "367: 00000000"]
    with pytest.raises(InputError, match=r"366.*zero throughout"):
        table.scale("366")
    assert table.scale("input") > 0
    with pytest.raises(InputError, match="no tensor 'nothing'"):
        table.scale("nothing")


@pytest.mark.parametrize(
    ("scale", "usable"),
    [(2.0**-127, False), (2.0**-126, True), (1.0, True), (2.6e36, True), (3e36, False)],
)
def test_scales_that_cannot_quantize_are_kept_and_named(scale, usable):
    assert (why_unusable(scale) is None) == usable
    table = CalibrationTable({"x": scale, "y": 1.0})
    assert (list(table.unusable) == ["x"]) == (not usable)
    assert CalibrationTable.loads(table.dumps()) == table


@pytest.mark.parametrize(
    ("digits", "complaint"),
    [
        ("7f800000", "infinite"),
        ("ff800000", "negative"),
        ("7fc00000", "NaN"),
        ("ffc00001", "NaN"),
        ("7f800001", "NaN"),
        ("bc88edfc", "negative"),
        ("80000000", "scale 0"),
        ("00000001", "subnormal"),
        ("7f7fffff", "beyond float32"),
    ],
)
def test_what_cannot_quantize_is_kept_and_the_rest_is_used(digits, complaint):
    text = f"TRT-6001-MinMaxCalibration\na: 3d0971dc\nb: {digits}\nc: 3c0660b4\n"
    table = CalibrationTable.loads(text)
    assert table.dumps() == text
    assert table == CalibrationTable.loads(text)
    assert list(table.unusable) == ["b"]
    assert complaint in table.unusable["b"]
    assert table.scale("a") == scale_from_hex("3d0971dc")
    with pytest.raises(InputError, match="cannot quantize tensor 'b'"):
        table.scale("b")


@pytest.mark.parametrize("scale", [-math.inf, math.inf, math.nan, -1.0, -0.0])
def test_constructor_keeps_what_a_file_can_hold(scale):
    assert list(CalibrationTable({"x": scale}).unusable) == ["x"]


@pytest.mark.parametrize(
    ("scales", "options", "message"),
    [
        *(({"x": scale}, {}, "tensor 'x': the scale") for scale in (3.5e38, 1e300)),
        *(({name: 1.0}, {}, "name") for name in ("", "a\nb", "a\rb", "a\0b", "\ud800")),
        ({}, {}, "at least one tensor"),
        ({"x": 1.0}, {"algorithm": "entropy3"}, "unknown algorithm 'entropy3'"),
        ({"x": 1.0}, {"tensorrt_version": "latest"}, "not a TensorRT version"),
    ],
)
def test_what_the_constructor_refuses(scales, options, message):
    with pytest.raises(InputError, match=message):
        CalibrationTable(scales, **options)


LEGACY = "0 3ff0000000000000 3fefffeb074a771d\ninput: 3d97aca7\nConv_0__output: 3eb2bbb9\n"


def test_legacy_header_holds_cutoff_and_quantile():
    table = CalibrationTable.loads(LEGACY)
    assert (table.algorithm, table.legacy) == ("legacy", Legacy(1.0, 0.99999))
    assert table.dumps() == LEGACY
    assert CalibrationTable({"x": 1.0}, "legacy").header == "0 3ff0000000000000 3fefff2e48e8a71e"
    assert table != CalibrationTable(table.scales, "legacy", legacy=Legacy(0.5, 0.99999))


@pytest.mark.parametrize(
    ("header", "given", "expected"),
    [
        ("TRT-8XXX-EntropyCalibration2\n", (None, "8.5.2"), ("entropy2", "8.5.2")),
        ("TRT-8XXX-EntropyCalibration2 \n", ("minmax", "8.5.2"), ("minmax", "8.5.2")),
        ("TRT-9001-EntropyCalibration3\n", ("minmax", "8.5.2"), ("minmax", "8.5.2")),
        ("nonsense\n", ("minmax", "8.5.2"), ("minmax", "8.5.2")),
        ("", ("entropy2", None), ("entropy2", "10.12.0")),
        ("", ("entropy2", "8.6.1"), ("entropy2", "8.6.1")),
    ],
)
def test_foreign_and_missing_headers_need_to_be_told(header, given, expected):
    text = f"{header}images: 3c010a14\n/stem/Conv_output_0: 3d2b1111\n"
    with pytest.raises(InputError, match=r"line 1: .*python -m calib convert"[: 9 if "9001" in header else None]):
        CalibrationTable.loads(text)
    table = scan(text).table("file", *given)
    assert (table.algorithm, table.tensorrt_version) == expected
    assert list(table.scales) == ["images", "/stem/Conv_output_0"]


def test_one_half_of_a_foreign_header_is_not_enough():
    text = "TRT-9001-EntropyCalibration3\nx: 3c010a14\n"
    with pytest.raises(InputError, match="9001"):
        scan(text).table("file", algorithm="minmax")
    with pytest.raises(InputError, match="EntropyCalibration3"):
        scan(text).table("file", tensorrt_version="8.6.1")


def test_spaces_and_line_ends_are_told_and_not_kept():
    clean = "TRT-8503-EntropyCalibration2\nimages: 3c010a14\nx: 3c010a14\n"
    for text, complaint in (
        (clean.replace("\n", " \n"), "spaces"),
        (clean.replace("\n", "\t\n"), "spaces"),
        (clean.replace("\n", "\r\n"), "CR LF"),
        (clean[:-1], "no line break"),
        (clean.replace(": ", ":  "), ""),
    ):
        assert CalibrationTable.loads(text).dumps() == clean
        assert [complaint in oddity for oddity in scan(text).oddities] == [True] * bool(complaint)


def test_scales_that_are_not_padded():
    text = "TRT-8600-EntropyCalibration2\ninput: 3c010a14\nx: a3d70a3\n"
    table = CalibrationTable.loads(text)
    assert table.scales["x"] == scale_from_hex("0a3d70a3") == pytest.approx(9.12e-33, rel=1e-3)
    assert table.dumps() == text
    assert "has 7 digits" in scan(text).oddities[0]
    with pytest.raises(InputError, match="8 hex digits"):
        CalibrationTable.loads(text[:-1])


def test_replaced_keeps_line_1_and_the_spelling():
    table = CalibrationTable.loads("TRT-8401-MinMaxCalibration\na: 0\nb: 0\nc: 3caa54fc\n")
    assert table.replaced({"a": 0.0, "b": 1.0}).dumps() == "TRT-8401-MinMaxCalibration\na: 0\nb: 3f800000\n"


def test_files_that_are_too_large_are_not_read(tmp_path):
    with open(tmp_path / "large", "wb") as stream:
        stream.truncate(17 * 1024 * 1024)
    with pytest.raises(InputError, match="larger than"):
        CalibrationTable.read(tmp_path / "large")


def test_error_lines_stay_short():
    with pytest.raises(InputError) as caught:
        CalibrationTable.loads("x" * 100_000)
    assert len(str(caught.value)) < 300
