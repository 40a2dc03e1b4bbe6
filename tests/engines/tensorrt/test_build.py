"""Building over a stand-in for Torch-TensorRT (the real one: tests/contract)."""

import pytest
import torch
from torch import nn

from common.config import EngineConfig
from engines.tensorrt import build
from engines.tensorrt.build import Build, build_engine, build_error, compile_arguments, takes_half, to_torchscript
from engines.tensorrt.support import Installed, TensorRTError
from tests.upstream import INSTALLED, Upstream

CPU = torch.device("cpu")
SHAPE = (2, 1, 28, 28)


class TestBuilding:
    @pytest.mark.parametrize(
        ("config", "precision", "precisions", "dla_core"),
        [
            ({}, "fp32", {"fp32"}, None),
            ({}, "fp16", {"fp16", "fp32"}, None),
            ({}, "int8", {"int8", "fp32"}, None),
            ({"int8_fp16": True}, "int8", {"int8", "fp16", "fp32"}, None),
            ({"dla_core": 0}, "fp32", {"fp32"}, None),  # on the GPU
            ({"dla_core": 0}, "fp16", {"fp16"}, 0),
            ({"dla_core": 0}, "int8", {"int8", "fp16"}, 0),
        ],
    )
    def test_precisions_have_fp32_beside_them_but_on_a_dla_core(self, config, precision, precisions, dla_core):
        build = Build.of(EngineConfig(**config), precision)
        assert (build.precisions, build.dla_core) == (precisions, dla_core)

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

    @pytest.fixture
    def memory(self, monkeypatch):
        """Sets the free memory of every GPU, MiB."""
        free = [0]
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0] << 20, 80 << 30))
        return free

    def test_a_full_gpu_is_told_before_anything_is_tried(self, memory):
        memory[0] = 8
        upstream = Upstream()
        message = "^GPU 1 has no memory left to build an engine: end what else uses it$"
        with pytest.raises(TensorRTError, match=message):
            build_engine(upstream, INSTALLED, nn.Linear(4, 2), (3, 4), Build(frozenset({"fp32"}), device=1))
        assert not upstream.calls

    def test_a_gpu_that_answers_nothing_any_more(self, memory, monkeypatch):
        memory[0] = 1000

        def breaks(*arguments):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        def fails(*arguments):
            monkeypatch.setattr(torch.cuda, "mem_get_info", breaks)
            breaks()

        monkeypatch.setattr(build, "to_torchscript", fails)
        with pytest.raises(TensorRTError, match="could not build the engine: CUDA error: an illegal memory access"):
            build_engine(Upstream(), INSTALLED, nn.Linear(4, 2), (3, 4), Build(frozenset({"fp32"})))

    def test_a_gpu_that_became_full_is_told_beside_what_tensorrt_said(self, memory, monkeypatch):
        memory[0] = 1000

        def fails(*arguments):
            memory[0] = 8
            raise RuntimeError("CUDNN_STATUS_INTERNAL_ERROR")

        monkeypatch.setattr(build, "to_torchscript", fails)
        message = "the engine: CUDNN_STATUS_INTERNAL_ERROR; GPU 0 has no memory left, end what else uses it$"
        with pytest.raises(TensorRTError, match=message):
            build_engine(Upstream(), INSTALLED, nn.Linear(4, 2), (3, 4), Build(frozenset({"fp32"})))
