"""What versions and GPUs can do, and which way INT8 goes: decided without either."""

import ast
import runpy
import sys
from pathlib import Path

import pytest
import torch

from calib.table import CalibrationTable
from common.errors import InputError
from engines.gpu import Gpu, GpuError
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
    table_problem,
)
from tests.upstream import Upstream

ROOT = Path(__file__).parents[3]
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


class TestFinding:
    def test_not_installed(self, monkeypatch):
        monkeypatch.setattr(support, "_distribution_version", lambda name: None)
        with pytest.raises(TensorRTError, match="not installed"):
            support.load()

    def test_another_torch(self, monkeypatch):
        monkeypatch.setattr(support, "_distribution_version", lambda name: "1.4.0")
        with pytest.raises(TensorRTError, match=r"needs torch 1\.4"):
            support.load()

    def test_an_import_that_fails(self, monkeypatch):
        monkeypatch.setattr(support, "_distribution_version", lambda name: torch.__version__)
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        with pytest.raises(TensorRTError, match="cannot be imported") as caught:
            support.load()
        assert "\n" not in str(caught.value)

    def test_a_gpu_that_is_too_old(self, monkeypatch):
        monkeypatch.setattr(support, "find_gpu", lambda index: gpu(7, 0))
        monkeypatch.setattr(support, "load", lambda: (Upstream(), installed()))
        with pytest.raises(TensorRTError, match=r"compute capability 7\.0"):
            support.usable(0)

    def test_no_gpu(self, monkeypatch):
        def missing(index):
            raise GpuError("there is no GPU 3")

        monkeypatch.setattr(support, "find_gpu", missing)
        with pytest.raises(TensorRTError, match="there is no GPU 3"):
            support.usable(3)


def imported(file):
    """Roots of the names of the modules that a file imports, within functions too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield str(node.module).partition(".")[0]


def test_nothing_else_imports_tensorrt():
    packages = ("benchmarks", "calib", "common", "data", "engines", "evaluation", "models")
    files = [*ROOT.glob("*.py"), *(file for name in packages for file in (ROOT / name).rglob("*.py"))]
    assert [file for file in files if set(OPTIONAL) & set(imported(file))] == [Path(support.__file__)]


def test_nor_does_this_before_it_is_used(monkeypatch):
    for name in OPTIONAL:
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    runpy.run_path(str(support.__file__), run_name="support_again")
