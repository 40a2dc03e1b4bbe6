"""Finding TensorRT, building and calibrating over a stand-in for Torch-TensorRT (the real one: tests/contract)."""

import sys

import pytest
import torch
from torch import nn

from calib import cache, tensorrt, tensorrt_build
from calib.graph import trace
from calib.subset import Subset
from calib.table import CalibrationTable
from calib.tensorrt_build import Build, build_engine, build_error, compile_arguments, takes_half, to_torchscript
from calib.tensorrt_rules import Gpu, Installed, TensorRTError
from common.config import EngineConfig
from models import LeNet
from tests.upstream import INSTALLED, TABLE, Upstream, provenance

CPU = torch.device("cpu")
SHAPE = (2, 1, 28, 28)


class Images:
    def __init__(self, broken=False):
        self.asked = []
        self._broken = broken

    def __len__(self):
        return 12

    def images(self, index):
        self.asked.append(index.tolist())
        if self._broken and len(self.asked) > 2:
            raise OSError("disk gone")
        return torch.rand(len(index), 1, 28, 28)


SUBSET = Subset(torch.tensor([7, 3, 11, 0]), 2)


@pytest.fixture
def network():
    torch.manual_seed(1)
    return trace(LeNet(), "LeNet", (1, 28, 28))


@pytest.fixture
def here(monkeypatch):
    """A machine with a GPU and an upstream that the test gives."""
    monkeypatch.setattr(tensorrt_build, "gpu_device", lambda index: CPU)

    def use(upstream, capability=(9, 0)):
        monkeypatch.setattr(tensorrt, "find_gpu", lambda index: Gpu(index, "NVIDIA Test", capability))
        monkeypatch.setattr(tensorrt, "load", lambda: (upstream, INSTALLED))
        return upstream

    return use


def calibrate(network, source, path, recalibrate=False, **changes):
    """Calibrate with TensorRT over SUBSET of ``source``."""
    return tensorrt.calibrate(
        network, lambda: (source, SUBSET), path, provenance(**changes), EngineConfig(), recalibrate
    )


class TestFinding:
    def test_a_cpu_build_of_torch(self, monkeypatch):
        monkeypatch.setattr(torch.version, "cuda", None)
        with pytest.raises(TensorRTError, match="CPU build"):
            tensorrt.find_gpu(0)

    def test_no_driver(self, monkeypatch):
        def init():
            raise RuntimeError("Found no NVIDIA driver on your system. Please check\nmore")

        monkeypatch.setattr(torch.version, "cuda", "12.8")
        monkeypatch.setattr(torch.cuda, "init", init)
        with pytest.raises(TensorRTError, match=r"^no NVIDIA GPU can be used: Found no NVIDIA driver on your system$"):
            tensorrt.find_gpu(0)

    def test_no_such_gpu(self, monkeypatch):
        monkeypatch.setattr(torch.version, "cuda", "12.8")
        monkeypatch.setattr(torch.cuda, "init", lambda: None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        with pytest.raises(TensorRTError, match="there is no GPU 1: this machine has 1"):
            tensorrt.find_gpu(1)

    def test_not_installed(self, monkeypatch):
        monkeypatch.setattr(tensorrt, "_distribution_version", lambda name: None)
        with pytest.raises(TensorRTError, match="not installed"):
            tensorrt.load()

    def test_another_torch(self, monkeypatch):
        monkeypatch.setattr(tensorrt, "_distribution_version", lambda name: "1.4.0")
        with pytest.raises(TensorRTError, match=r"needs torch 1\.4"):
            tensorrt.load()

    def test_an_import_that_fails(self, monkeypatch):
        monkeypatch.setattr(tensorrt, "_distribution_version", lambda name: torch.__version__)
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        with pytest.raises(TensorRTError, match="cannot be imported") as caught:
            tensorrt.load()
        assert "\n" not in str(caught.value)

    def test_a_gpu_that_is_too_old(self, here):
        here(Upstream(), capability=(7, 0))
        with pytest.raises(TensorRTError, match=r"compute capability 7\.0"):
            tensorrt.usable(0)


class TestBuilding:
    def test_precisions_have_fp32_beside_them(self):
        assert Build.of(EngineConfig(), "fp32").precisions == {"fp32"}
        assert Build.of(EngineConfig(), "fp16").precisions == {"fp16", "fp32"}
        assert Build.of(EngineConfig(), "int8").precisions == {"int8", "fp32"}
        assert Build.of(EngineConfig(int8_fp16=True), "int8").precisions == {"int8", "fp16", "fp32"}

    def test_a_dla_core_has_none(self):
        assert Build.of(EngineConfig(dla_core=0), "fp16").precisions == {"fp16"}
        assert Build.of(EngineConfig(dla_core=0), "int8").precisions == {"int8", "fp16"}

    def test_fp32_stays_off_the_dla_core(self):
        build = Build.of(EngineConfig(dla_core=0), "fp32")
        assert build.precisions == {"fp32"}
        assert build.dla_core is None

    def test_arguments(self):
        config = EngineConfig(device=1, tf32=True, timing_iterations=3, workspace=2, full_compilation=True)
        arguments = compile_arguments(Upstream(), SHAPE, Build.of(config, "int8"))
        assert arguments == {
            "ir": "ts",
            "inputs": [(SHAPE, torch.float)],
            "enabled_precisions": {torch.int8, torch.float},
            "device": {"device_type": "gpu", "gpu_id": 1, "dla_core": 0, "allow_gpu_fallback": False},
            "disable_tf32": False,
            "num_avg_timing_iters": 3,
            "workspace_size": 2 * 1024 * 1024,
            "require_full_compilation": True,
            "truncate_long_and_double": True,
        }

    def test_arguments_for_a_dla_core(self):
        arguments = compile_arguments(Upstream(), SHAPE, Build.of(EngineConfig(dla_core=1), "fp16"))
        assert arguments["device"] == {"device_type": "dla", "gpu_id": 0, "dla_core": 1, "allow_gpu_fallback": True}
        assert torch.float not in arguments["enabled_precisions"]

    def test_tf32_is_off_by_default(self):
        assert compile_arguments(Upstream(), SHAPE, Build.of(EngineConfig(), "fp32"))["disable_tf32"]

    @pytest.mark.parametrize(
        ("version", "precision", "half"),
        [("2.8.0", "fp16", False), ("2.12.1", "fp16", False), ("2.13.0", "fp16", True), ("2.13.0", "fp32", False)],
    )
    def test_fp16_is_a_flag_or_a_type_by_version(self, version, precision, half):
        installed = Installed(version, version, "11.0.0")
        build = Build.of(EngineConfig(), precision)
        assert takes_half(installed, build) is half
        upstream = Upstream()
        module = build_engine(upstream, installed, nn.Linear(4, 2), (3, 4), build, device=CPU)
        assert next(module.parameters()).dtype is (torch.half if half else torch.float)
        assert upstream.calls[0][1]["inputs"] == [((3, 4), torch.half if half else torch.float)]

    def test_int8_stays_float_where_types_decide(self):
        installed = Installed("2.13.0", "2.13.0", "11.0.0")
        assert not takes_half(installed, Build.of(EngineConfig(int8_fp16=True), "int8"))

    def test_tracing_leaves_the_module_alone(self):
        module = nn.Sequential(nn.Linear(4, 2), nn.Dropout()).train()
        traced = to_torchscript(module, (3, 4), CPU, half=True)
        assert module.training
        assert module[0].weight.dtype is torch.float
        assert "dropout" not in str(traced.inlined_graph) or not traced.training

    @pytest.mark.parametrize(
        ("error", "line"),
        [
            (
                RuntimeError(
                    "[Error thrown at core/conversion/conversionctx/ConversionCtx.cpp:169] Building serialized "
                    "network failed in TensorRT\n"
                ),
                "Building serialized network failed in TensorRT",
            ),
            (
                RuntimeError(
                    "[Error thrown at core/x.cpp:61] Expected builder->platformHasFastInt8() to be true but got "
                    "false\nRequested inference in INT8 but platform does not support INT8\n"
                ),
                "Requested inference in INT8 but platform does not support INT8",
            ),
            (ValueError(""), "ValueError"),
            (TypeError("one\ntwo"), "one"),
            (RuntimeError("x" * 1000), "x" * 300),
        ],
    )
    def test_a_build_error_is_one_line(self, error, line):
        assert build_error(error) == line
        with pytest.raises(TensorRTError) as caught:
            build_engine(Upstream(error), INSTALLED, nn.Linear(4, 2), (3, 4), Build(frozenset({"fp32"})), device=CPU)
        assert str(caught.value) == f"TensorRT could not build the engine: {line}"

    def test_out_of_memory_says_what_to_do(self):
        upstream = Upstream(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
        with pytest.raises(TensorRTError, match="too little free memory for batches of 3"):
            build_engine(upstream, INSTALLED, nn.Linear(4, 2), (3, 4), Build(frozenset({"fp32"})), device=CPU)


class TestCalibrating:
    def path(self, tmp_path):
        return tmp_path / "tensorrt" / "CalibrationTableLeNet"

    def test_calibrates_once_and_then_touches_no_data(self, here, network, tmp_path):
        upstream = here(Upstream())
        source = Images()
        first = calibrate(network, source, self.path(tmp_path))
        assert first.calibrated
        assert first.table.scales == TABLE.scales
        assert self.path(tmp_path).read_text() == TABLE.dumps()
        assert source.asked[-2:] == [[7, 3], [11, 0]]
        asked = len(source.asked)
        again = calibrate(network, source, self.path(tmp_path))
        assert not again.calibrated
        assert len(source.asked) == asked
        assert len(upstream.calls) == 1

    def test_records_what_tensorrt_was_given(self, here, network, tmp_path):
        here(Upstream())
        calibrate(network, Images(), self.path(tmp_path))
        recorded = cache.read_provenance(self.path(tmp_path))
        assert recorded is not None
        assert recorded.maker == "tensorrt"
        assert recorded.tensorrt_version == "10.12.0"
        assert recorded.weights == cache.weights_fingerprint(network.module)

    def test_uses_the_static_shape_of_the_calibration_batch(self, here, network, tmp_path):
        upstream = here(Upstream())
        calibrate(network, Images(), self.path(tmp_path))
        assert upstream.calls[0][1]["inputs"] == [(SHAPE, torch.float)]
        assert upstream.calls[0][1]["enabled_precisions"] == {torch.int8, torch.float}

    @pytest.mark.parametrize(
        ("upstream", "message"),
        [
            (Upstream(error=RuntimeError("[Error thrown at a.cpp:1] no kernel")), "no kernel"),
            (Upstream(batches=1), "took 1 of 2 calibration batches"),
            (Upstream(table=None), "without writing a calibration table"),
            (Upstream(supported=False), "a calibrator serves one engine"),
        ],
    )
    def test_a_failure_keeps_the_old_table(self, here, network, tmp_path, upstream, message):
        here(Upstream())
        path = self.path(tmp_path)
        calibrate(network, Images(), path)
        before = {item.name: item.read_bytes() for item in path.parent.iterdir()}
        here(upstream)
        with pytest.raises(TensorRTError, match=message):
            calibrate(network, Images(), path, recalibrate=True)
        assert {item.name: item.read_bytes() for item in path.parent.iterdir()} == before

    @pytest.mark.parametrize("error", [None, RuntimeError("no ranges")])
    def test_what_a_callback_raised_is_the_cause(self, here, network, tmp_path, error):
        here(Upstream(error=error))
        with pytest.raises(OSError, match="disk gone"):
            calibrate(network, Images(broken=True), self.path(tmp_path))
        assert not self.path(tmp_path).exists()

    def test_a_torn_table_is_made_again(self, here, network, tmp_path):
        here(Upstream())
        path = self.path(tmp_path)
        calibrate(network, Images(), path)
        path.write_text("TRT-101200-Entropy")
        again = calibrate(network, Images(), path)
        assert again.calibrated
        assert "line 1" in again.reason

    def test_an_edited_table_is_made_again(self, here, network, tmp_path):
        here(Upstream())
        path = self.path(tmp_path)
        calibrate(network, Images(), path)
        path.write_text(CalibrationTable({"input_0": 0.5, "output_0": 0.02}).dumps())
        assert calibrate(network, Images(), path).calibrated

    def test_a_gpu_without_int8(self, here, network, tmp_path, monkeypatch):
        here(Upstream(), capability=(6, 0))
        monkeypatch.setattr(tensorrt, "gpu_problem", lambda gpu: None)
        with pytest.raises(TensorRTError, match="no INT8 arithmetic"):
            calibrate(network, Images(), self.path(tmp_path))

    def test_percentile(self, here, network, tmp_path):
        here(Upstream())
        with pytest.raises(TensorRTError, match="no percentile calibration"):
            calibrate(network, Images(), self.path(tmp_path), algorithm="percentile")
