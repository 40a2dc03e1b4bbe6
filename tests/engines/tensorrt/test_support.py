"""What versions and GPUs can do, and which way INT8 goes: decided without either."""

import runpy
import sys

import pytest
import torch

from common.errors import InputError
from engines.gpu import Gpu
from engines.tensorrt import support
from engines.tensorrt.support import (
    Installed,
    TensorRTError,
    algorithm_problem,
    gpu_problem,
    has_calibrator,
    installation_problem,
    mode_for_named_table,
    quantization_mode,
    release,
    strongly_typed,
)

OPTIONAL = ("tensorrt", "torch_tensorrt")


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


@pytest.mark.parametrize(
    ("torch_version", "torch_tensorrt", "problem"),
    [
        ("2.8.0+cu128", "2.8.0", None),
        ("2.14.1", "2.14.0", None),
        ("2.8.0", None, 'pip install -e ".[tensorrt]"'),
        ("2.11.0+cu130", "2.8.0", "needs torch 2.8"),
        ("2.7.1", "2.7.0", "older than 2.8.0"),
    ],
)
def test_what_must_be_installed(torch_version, torch_tensorrt, problem):
    found = installation_problem(torch_version, torch_tensorrt)
    assert found is None if problem is None else problem in found


def test_a_gpu_that_tensorrt_no_longer_supports():
    assert gpu_problem(gpu(7, 5)) is None
    assert "compute capability 7.0" in str(gpu_problem(gpu(7, 0)))


@pytest.mark.parametrize(
    ("wanted", "version", "options", "mode", "reason"),
    [
        ("auto", "2.8.0", {}, "implicit", "Torch-TensorRT 2.8.0 has DataLoaderCalibrator"),
        ("auto", "2.8.0", {"dla": True}, "implicit", "DataLoaderCalibrator"),
        ("auto", "2.9.0", {}, "explicit", "2.9.0 has no DataLoaderCalibrator"),
        ("auto", "2.14.0", {}, "explicit", "2.14.0 has no DataLoaderCalibrator"),
        ("auto", "2.8.0", {"needs_explicit": "conv1 kept in float"}, "explicit", "conv1 kept in float"),
        ("implicit", "2.8.0", {}, "implicit", "as asked"),
        ("explicit", "2.8.0", {}, "explicit", "as asked"),
        ("explicit", "2.9.0", {}, "explicit", "INT8 flag"),
        ("explicit", "2.12.1", {}, "explicit", "INT8 flag"),
        ("explicit", "2.13.0", {}, "explicit", "as asked"),
    ],
)
def test_which_way_int8_goes_and_why(wanted, version, options, mode, reason):
    found, why = quantization_mode(wanted, installed(version), **options)
    assert found == mode
    assert reason in why
    assert ("INT8 flag" in why) is (version in ("2.9.0", "2.12.1"))


@pytest.mark.parametrize(
    ("wanted", "version", "options", "message"),
    [
        ("implicit", "2.8.0", {"needs_explicit": "conv1 kept"}, "conv1 kept; take --quantization explicit"),
        ("implicit", "2.9.0", {}, r"2\.8\.0 was the last"),
        ("explicit", "2.8.0", {"dla": True}, "DLA core needs implicit"),
        ("auto", "2.9.0", {"dla": True}, "DLA core needs implicit"),
        ("auto", "2.8.0", {"dla": True, "needs_explicit": "the output quantized"}, "DLA core needs implicit"),
    ],
)
def test_ways_that_are_refused(wanted, version, options, message):
    with pytest.raises(TensorRTError, match=message):
        quantization_mode(wanted, installed(version), **options)


def test_a_named_table_goes_explicit():
    assert mode_for_named_table("auto") == mode_for_named_table("explicit") == "explicit"
    with pytest.raises(InputError, match=r"take --quantization explicit, or leave --cache out$"):
        mode_for_named_table("implicit")


def test_versions_of_the_source():
    assert has_calibrator("2.8.0")
    assert not has_calibrator("2.9.0")
    assert not strongly_typed(installed("2.12.1"))
    assert strongly_typed(installed("2.13.0"))


def test_tensorrt_has_no_percentile():
    assert "no percentile calibration" in str(algorithm_problem("percentile"))
    assert algorithm_problem("legacy") is None


class TestFinding:
    @pytest.mark.parametrize(("found", "message"), [(None, "not installed"), ("1.4.0", r"needs torch 1\.4")])
    def test_not_installed_or_of_another_torch(self, monkeypatch, found, message):
        monkeypatch.setattr(support, "_distribution_version", lambda name: found)
        with pytest.raises(TensorRTError, match=message):
            support.load()

    def test_an_import_that_fails(self, monkeypatch):
        monkeypatch.setattr(support, "_distribution_version", lambda name: torch.__version__)
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        with pytest.raises(TensorRTError, match="cannot be imported") as caught:
            support.load()
        assert "\n" not in str(caught.value)

    def test_a_gpu_that_is_too_old(self, machine):
        machine(capability=(7, 0))
        with pytest.raises(TensorRTError, match=r"compute capability 7\.0"):
            support.usable(0)


def test_nor_does_this_before_it_is_used(monkeypatch):
    for name in OPTIONAL:
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    runpy.run_path(str(support.__file__), run_name="support_again")
