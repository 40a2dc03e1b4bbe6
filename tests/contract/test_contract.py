"""Our TensorRT path against the real Torch-TensorRT wheel: the scenarios of ``drive.py`` in a subprocess."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.contract.made import FOLDER, ROOT, require

pytestmark = pytest.mark.contract

DRIVE = Path(__file__).with_name("drive.py")
MARKER = "stand-in: TensorRT was asked for a builder"
EXIT_CODE = 86


@pytest.fixture(scope="session")
def found(tmp_path_factory) -> dict[str, Any]:
    """What all scenarios found."""
    require(FOLDER, "contract environment")
    folder = tmp_path_factory.mktemp("contract")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(FOLDER / "site"), str(ROOT)]),
        "LD_LIBRARY_PATH": os.pathsep.join([str(FOLDER / "lib"), os.environ.get("LD_LIBRARY_PATH", "")]),
        "CUDA_VISIBLE_DEVICES": "",
    }
    own = FOLDER / "venv" / "bin" / "python"
    python = str(own) if own.exists() else sys.executable
    process = subprocess.run(
        [python, str(DRIVE), str(folder)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return {**result, "folder": folder}


def asks_for_a_builder(ending: dict[str, Any]) -> bool:
    """Whether a scenario got as far as TensorRT itself."""
    assert ending["code"] == EXIT_CODE, ending["stderr"]
    return bool(ending["stdout"].splitlines()[-1] == MARKER)


@pytest.fixture
def calibrator(found):
    if not found["versions"]["calibrator"]:
        pytest.skip(f"torch_tensorrt {found['versions']['versions'][1]} has no DataLoaderCalibrator")


def test_the_wheels_are_the_ones_that_the_environment_names(found):
    stamp = json.loads((FOLDER / "complete.json").read_text())
    _, torch_tensorrt, tensorrt = found["versions"]["versions"]
    assert f"torch_tensorrt=={torch_tensorrt}" in stamp["installed"]
    assert tensorrt.startswith(stamp["tensorrt"])


def test_our_rule_knows_which_version_has_the_calibrator(found):
    from engines.tensorrt.support import has_calibrator

    facts = found["versions"]
    assert has_calibrator(facts["versions"][1]) is facts["calibrator"] is facts["takes_calibrator"]


def test_compile_knows_every_argument_that_we_pass(found):
    assert found["versions"]["unknown_arguments"] == []


def test_importing_it_leaves_warnings_alone(found):
    assert found["versions"]["capture_warnings"] == "warnings"


@pytest.mark.usefixtures("calibrator")
class TestCalibrator:
    def test_delivers_exactly_the_subset_in_order_images_alone_and_stops(self, found):
        facts = found["delivers"]
        assert facts["batches"] == [[7, 3], [11, 0], [5, 9]]  # read from memory after the last call
        assert facts["pointers_per_batch"] == [1]
        assert facts["stopped"]
        assert facts["stays_stopped"]
        assert facts["asked"] == [[7, 3], [11, 0], [5, 9]]
        assert facts["given"] == 3
        assert facts["written"]
        assert facts["table"]

    def test_is_entropy_calibrator_2_without_a_cache(self, found):
        facts = found["delivers"]
        assert (facts["type"], facts["algorithm"]) == ("IInt8EntropyCalibrator2", 2)
        assert facts["cache_length"] == 0
        assert facts["batch_size"] == 1  # upstream's: with an explicit batch dimension TensorRT does not use it
        assert not facts["shared_class"]

    def test_algorithms_map_to_tensorrts(self, found):
        facts = found["algorithms"]
        assert facts["entropy2"] == ["IInt8EntropyCalibrator2", 2]
        assert facts["entropy"] == ["IInt8EntropyCalibrator", 1]
        assert facts["minmax"] == ["IInt8MinMaxCalibrator", 3]
        assert facts["legacy"] == ["IInt8LegacyCalibrator", 0]
        assert facts["legacy_numbers"] == [0.999, 1.0]
        assert facts["legacy_batch"] == [[7, 3]]
        assert "no percentile calibration" in facts["percentile"]

    def test_reads_our_table_file_without_touching_it(self, found):
        facts = found["reads_table"]
        assert facts["read"]  # the bytes, after memory was churned
        assert facts["unchanged"]
        assert facts["calm"]

    def test_a_table_that_tensorrt_does_not_accept_is_an_error(self, found):
        facts = found["reads_table"]
        assert facts["batch_after_rejection"] is None
        assert "did not accept the calibration table" in facts["rejection"]

    def test_an_exception_in_a_callback_is_kept_and_voids_the_table(self, found):
        facts = found["keeps_exceptions"]
        assert facts["batches"] == [True, False, False]
        assert facts["error"] == "ValueError('this image cannot be read')"
        assert not facts["written"]

    def test_files_that_cannot_be_read_or_written_do_not_abort(self, found):
        facts = found["keeps_exceptions"]
        assert (facts["gone"], facts["gone_length"]) == ("FileNotFoundError", 0)
        assert (facts["unwritable"], facts["unwritable_written"]) == ("FileNotFoundError", False)

    def test_an_engine_of_two_inputs_is_refused(self, found):
        facts = found["keeps_exceptions"]
        assert facts["two_inputs"] is None
        assert "2 inputs" in facts["two_inputs_error"]

    def test_control_the_upstream_calibrator_aborts_on_an_exception(self, found):
        ending = found["endings"]["upstream_aborts"]
        assert ending["code"] == -signal.SIGABRT
        assert "terminate called" in ending["stderr"]

    def test_a_calibration_reaches_tensorrt_and_keeps_the_old_table(self, found):
        assert asks_for_a_builder(found["endings"]["calibrate"])
        assert (found["folder"] / "CalibrationTableLeNet").read_text() == "the old table\n"
        assert not (found["folder"] / "CalibrationTableLeNet.json").exists()

    def test_the_engine_builds_implicit_int8_from_tensorrts_table(self, found):
        ending = found["endings"]["engine"]
        assert asks_for_a_builder(ending)
        assert json.loads(ending["stdout"].splitlines()[0])[0] == "implicit"


class TestCompileSpec:
    @pytest.mark.parametrize(
        ("name", "parts"),
        [
            ("fp32", ["[Float, ]", '"TF32 Disabled": 0', "shape=(2,1,28,28,), dtype=Float", '"device_type": GPU']),
            ("fp32", ['"Truncate long and double": 1']),
            ("fp16", ["[Float, Half, ]", '"TF32 Disabled": 1', '"Workspace Size": 67108864']),
            ("fp16", ['"Num Avg Timing Iters": 3']),
            ("int8", ["[Float, Half, Int8, ]"]),
            ("dla", ["[Half, Int8, ]", '"device_type": DLA', '"dla_core": 1', '"allow_gpu_fallback": True']),
        ],
    )
    def test_says_what_was_asked_for(self, found, name, parts):
        spec = found["parses"][name]
        precisions = spec.partition('"Enabled Precision": ')[2]
        for part in parts:
            assert precisions.startswith(part) if part.startswith("[") else part in spec

    def test_full_compilation_has_no_fallback_to_torch(self, found):
        assert re.search(r'"Torch Fallback":\s*{\s*"enabled": False', found["parses"]["int8"])

    @pytest.mark.usefixtures("calibrator")
    def test_takes_the_calibrator(self, found):
        assert found["parses"]["with_calibrator"] != found["parses"]["without_calibrator"] == 0


class TestFrontEnd:
    @pytest.mark.parametrize("module", ["float", "explicit"])
    @pytest.mark.parametrize("form", ["traced", "scripted"])
    def test_converts_all_of_lenet(self, found, module, form):
        assert found["supports"][f"{module}_{form}"] is True

    def test_control_it_does_not_convert_everything(self, found):
        assert found["supports"]["another"] is False

    def test_the_explicit_module_quantizes_each_value_and_each_weight(self, found):
        facts = found["supports"]
        assert facts["per_tensor"] == 4  # data, conv1, conv2, ip1
        assert facts["per_channel"] == 4  # conv1, conv2, ip1, ip2

    def test_the_quantization_of_the_weights_is_not_folded_away(self, found):
        ending = found["endings"]["lowered"]
        assert asks_for_a_builder(ending)
        graph = ending["stderr"].partition("Lowered Graph")[2]
        assert graph.count("aten::fake_quantize_per_channel_affine") == 4
        assert graph.count("aten::fake_quantize_per_tensor_affine") == 4

    @pytest.mark.parametrize("scenario", ["build_fp32", "build_fp16", "build_half", "build_explicit"])
    def test_compiling_gets_as_far_as_tensorrt(self, found, scenario):
        assert asks_for_a_builder(found["endings"][scenario])

    def test_tensorrt_is_asked_for_a_builder_beforehand(self, found):
        assert asks_for_a_builder(found["endings"]["needs_builder"])

    def test_without_a_builder_there_is_one_line(self, found):
        ending = found["endings"]["without_builder"]
        assert ending["code"] == 0, ending["stderr"]
        assert ending["stdout"].startswith(
            "TensorRT 10.12.0 gives no builder, for the reason above: 1.5 GiB of the GPU's"
        )
        assert ending["stdout"].count("\n") == 1

    def test_control_torch_tensorrt_crashes_without_a_builder(self, found):
        assert found["endings"]["upstream_crashes"]["code"] == -signal.SIGSEGV

    def test_the_engine_builds_explicit_int8(self, found):
        ending = found["endings"]["engine_explicit"]
        assert asks_for_a_builder(ending)
        assert json.loads(ending["stdout"].splitlines()[0])[0] == "explicit"
