"""Our TensorRT path against the real Torch-TensorRT wheel: the scenarios of ``drive.py`` in a subprocess."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engines.tensorrt.support import has_calibrator
from tests.contract.made import FOLDER, ROOT, require

pytestmark = pytest.mark.contract

DRIVE = Path(__file__).with_name("drive.py")
MARKER = "stand-in: TensorRT was asked for a builder"
EXIT_CODE = 86


# Scenarios whose assertions hold, and those that get as far as TensorRT itself.
HOLD = ("versions", "parses", "supports", "without_builder")
ASK_FOR_A_BUILDER = ("build_fp32", "build_fp16", "build_half", "lowered", "needs_builder", "engine_explicit")
# The same, of what versions with DataLoaderCalibrator alone can do.
HOLD_WITH_CALIBRATOR = ("delivers", "algorithms", "reads_table", "keeps_exceptions", "takes_the_calibrator")
ASK_WITH_CALIBRATOR = ("calibrate", "engine")
# What happens to others, in whose place ours stands.
CONTROLS = ("upstream_aborts", "upstream_crashes")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("contract")


@pytest.fixture(scope="session")
def found(folder: Path) -> dict[str, Any]:
    """The versions, and how all scenarios ended."""
    require(FOLDER, "contract environment")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(FOLDER / "site"), str(ROOT)]),
        "LD_LIBRARY_PATH": os.pathsep.join([str(FOLDER / "lib"), os.environ.get("LD_LIBRARY_PATH", "")]),
        "CUDA_VISIBLE_DEVICES": "",
    }
    own = FOLDER / "venv" / "bin" / "python"
    python = str(own) if own.exists() else sys.executable
    scenarios = [*HOLD, *ASK_FOR_A_BUILDER, *HOLD_WITH_CALIBRATOR, *ASK_WITH_CALIBRATOR, *CONTROLS]
    process = subprocess.run(
        [python, str(DRIVE), str(folder), *scenarios],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


@pytest.fixture
def calibrator(found: dict[str, Any]) -> None:
    if not has_calibrator(found["installed"][1]):
        pytest.skip(f"torch_tensorrt {found['installed'][1]} has no DataLoaderCalibrator")


def assert_holds(ending: dict[str, Any]) -> None:
    assert ending["code"] == 0, ending["stderr"]


def assert_asks_for_a_builder(ending: dict[str, Any]) -> None:
    assert ending["code"] == EXIT_CODE, ending["stderr"]
    assert ending["stdout"].splitlines()[-1] == MARKER


def test_the_wheels_are_the_ones_that_the_environment_names(found):
    stamp = json.loads((FOLDER / "complete.json").read_text())
    _, torch_tensorrt, tensorrt = found["installed"]
    assert f"torch_tensorrt=={torch_tensorrt}" in stamp["installed"]
    assert tensorrt.startswith(stamp["tensorrt"])


@pytest.mark.parametrize("scenario", HOLD)
def test_holds(found, scenario):
    assert_holds(found[scenario])


@pytest.mark.usefixtures("calibrator")
@pytest.mark.parametrize("scenario", HOLD_WITH_CALIBRATOR)
def test_holds_with_a_calibrator(found, scenario):
    assert_holds(found[scenario])


@pytest.mark.parametrize("scenario", ASK_FOR_A_BUILDER)
def test_gets_as_far_as_tensorrt(found, scenario):
    assert_asks_for_a_builder(found[scenario])


@pytest.mark.usefixtures("calibrator")
@pytest.mark.parametrize("scenario", ASK_WITH_CALIBRATOR)
def test_gets_as_far_as_tensorrt_with_a_calibrator(found, scenario):
    assert_asks_for_a_builder(found[scenario])


def test_control_torch_tensorrt_crashes_without_a_builder(found):
    assert found["upstream_crashes"]["code"] == -signal.SIGSEGV


@pytest.mark.usefixtures("calibrator")
def test_control_the_upstream_calibrator_aborts_on_an_exception(found):
    assert found["upstream_aborts"]["code"] == -signal.SIGABRT
    assert "terminate called" in found["upstream_aborts"]["stderr"]


@pytest.mark.usefixtures("calibrator")
def test_a_calibration_keeps_the_old_table(found, folder):
    assert (folder / "calibrate" / "CalibrationTableLeNet").read_text() == "the old table\n"
    assert not (folder / "calibrate" / "CalibrationTableLeNet.json").exists()


def test_the_quantization_of_values_and_weights_is_not_folded_away(found):
    graph = found["lowered"]["stderr"].partition("Lowered Graph")[2]
    assert graph.count("aten::fake_quantize_per_tensor_affine") == 4  # data, conv1, conv2, ip1
    assert graph.count("aten::fake_quantize_per_channel_affine") == 4  # conv1, conv2, ip1, ip2
