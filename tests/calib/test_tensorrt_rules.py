"""What versions and GPUs can do, and which way INT8 goes: decided without either."""

import pytest

from calib.table import CalibrationTable
from calib.tensorrt_rules import (
    Gpu,
    Installed,
    TensorRTError,
    algorithm_problem,
    engine_file,
    gpu_problem,
    has_calibrator,
    has_fast_fp16,
    has_int8,
    installation_problem,
    mode_for_named_table,
    precision_problem,
    quantization_mode,
    release,
    strongly_typed,
    table_problem,
)
from common.errors import InputError


def installed(torch_tensorrt="2.8.0", tensorrt="10.12.0.36"):
    return Installed(torch_tensorrt, torch_tensorrt, tensorrt)


def gpu(*capability):
    return Gpu(0, "NVIDIA Test", capability)


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("2.8.0", (2, 8)),
        ("2.8.0+cu128", (2, 8)),
        ("2.14.0a0+git1", (2, 14)),
        ("2.9.0.dev20250801", (2, 9)),
        ("x", (0, 0)),
    ],
)
def test_release(version, expected):
    assert release(version) == expected


class TestInstallation:
    def test_the_tested_pair(self):
        assert installation_problem("2.8.0+cu128", "2.8.0") is None

    def test_missing_says_what_to_install(self):
        assert 'pip install -e ".[tensorrt]"' in str(installation_problem("2.8.0", None))

    def test_another_torch_names_the_one_that_is_needed(self):
        problem = str(installation_problem("2.11.0+cu130", "2.8.0"))
        assert "needs torch 2.8" in problem
        assert "2.11.0+cu130" in problem

    def test_too_old(self):
        assert "older than 2.8.0" in str(installation_problem("2.7.1", "2.7.0"))

    def test_the_latest_pair(self):
        assert installation_problem("2.14.1", "2.14.0") is None


@pytest.mark.parametrize(
    ("capability", "int8", "fp16"),
    [
        ((5, 2), False, False),
        ((5, 3), False, True),
        ((6, 0), False, True),
        ((6, 1), True, False),
        ((6, 2), False, True),
        ((7, 0), True, True),
        ((7, 5), True, True),
        ((9, 0), True, True),
        ((12, 0), True, True),
    ],
)
def test_what_a_gpu_computes(capability, int8, fp16):
    assert has_int8(capability) is int8
    assert has_fast_fp16(capability) is fp16
    assert (precision_problem("int8", gpu(*capability)) is None) is int8
    assert (precision_problem("fp16", gpu(*capability)) is None) is fp16
    assert precision_problem("fp32", gpu(*capability)) is None


def test_a_gpu_that_tensorrt_no_longer_supports():
    assert gpu_problem(gpu(7, 5)) is None
    assert "compute capability 7.0" in str(gpu_problem(gpu(7, 0)))


class TestMode:
    def test_auto_takes_the_calibrator_where_there_is_one(self):
        mode, reason = quantization_mode("auto", installed())
        assert (mode, reason) == ("implicit", "Torch-TensorRT 2.8.0 has DataLoaderCalibrator")

    @pytest.mark.parametrize("version", ["2.9.0", "2.12.1", "2.13.0", "2.14.0"])
    def test_auto_goes_explicit_after_2_8(self, version):
        mode, reason = quantization_mode("auto", installed(version))
        assert mode == "explicit"
        assert f"{version} has no DataLoaderCalibrator" in reason

    @pytest.mark.parametrize(
        ("version", "warned"), [("2.8.0", False), ("2.9.0", True), ("2.12.1", True), ("2.13.0", False)]
    )
    def test_versions_without_the_int8_flag_are_warned_about(self, version, warned):
        _, reason = quantization_mode("explicit", installed(version))
        assert ("INT8 flag" in reason) is warned

    def test_auto_goes_explicit_for_what_implicit_cannot(self):
        mode, reason = quantization_mode("auto", installed(), needs_explicit="conv1 kept in float")
        assert mode == "explicit"
        assert "conv1 kept in float" in reason

    def test_implicit_refuses_what_it_cannot(self):
        with pytest.raises(TensorRTError, match="conv1 kept in float; take --quantization explicit"):
            quantization_mode("implicit", installed(), needs_explicit="conv1 kept in float")

    def test_implicit_is_gone_after_2_8(self):
        with pytest.raises(TensorRTError, match=r"2\.8\.0 was the last"):
            quantization_mode("implicit", installed("2.9.0"))

    def test_as_asked(self):
        assert quantization_mode("implicit", installed()) == ("implicit", "as asked")
        assert quantization_mode("explicit", installed()) == ("explicit", "as asked")

    @pytest.mark.parametrize(
        ("wanted", "version", "needs"),
        [("explicit", "2.8.0", None), ("auto", "2.9.0", None), ("auto", "2.8.0", "the output quantized")],
    )
    def test_a_dla_core_needs_implicit(self, wanted, version, needs):
        with pytest.raises(TensorRTError, match="DLA core needs implicit"):
            quantization_mode(wanted, installed(version), needs, dla=True)

    def test_a_named_table_goes_explicit(self):
        assert mode_for_named_table("auto") == mode_for_named_table("explicit") == "explicit"

    def test_a_named_table_and_implicit_are_refused(self):
        with pytest.raises(InputError, match=r"take --quantization explicit, or leave --cache out$"):
            mode_for_named_table("implicit")

    def test_a_dla_core_with_the_calibrator(self):
        assert quantization_mode("auto", installed(), dla=True)[0] == "implicit"


def test_versions_of_the_source():
    assert has_calibrator("2.8.0")
    assert not has_calibrator("2.9.0")
    assert not strongly_typed(installed("2.12.1"))
    assert strongly_typed(installed("2.13.0"))


class TestTable:
    TABLE = CalibrationTable({"input_0": 0.01}, "entropy2", "10.12.0")

    def test_fits(self):
        assert table_problem(self.TABLE, "entropy2", "10.12.0.36") is None

    def test_of_another_tensorrt(self):
        assert "of TensorRT 10.12.0, and 10.13.2 is installed" in str(
            table_problem(self.TABLE, "entropy2", "10.13.2.6")
        )

    def test_of_another_algorithm(self):
        assert "of algorithm entropy2, and minmax is wanted" in str(table_problem(self.TABLE, "minmax", "10.12.0.36"))


def test_tensorrt_has_no_percentile():
    assert "no percentile calibration" in str(algorithm_problem("percentile"))
    assert algorithm_problem("legacy") is None


def test_engine_file_says_what_it_is():
    name = engine_file("LeNet", "int8-implicit", 32, "NVIDIA H200", "10.12.0.36")
    assert name == "LeNet_int8-implicit_b32_NVIDIA-H200_trt10.12.0.36.ts"


def test_engine_file_stays_in_its_folder():
    name = engine_file("../Le Net", "fp32", 1, "NVIDIA GeForce RTX 4090 / D", "10.12.0.36")
    assert "/" not in name
    assert " " not in name
    assert not name.startswith(".")
