"""The Torch-TensorRT engine over a stand-in, on the CPU: what is built, reused, padded and refused."""

import json
import os

import pytest
import torch
from torch import nn

from calib.table import CalibrationTable
from calib.tracing import trace
from common.config import EngineConfig, QuantizationConfig
from common.side_file import digest
from engines.base import EngineError
from engines.gpu import GpuError
from engines.tensorrt import engine as subject
from engines.tensorrt import support
from engines.tensorrt.calibration import own_provenance, store
from engines.tensorrt.engine import TorchTensorRTEngine
from engines.tensorrt.support import Installed
from models import LeNet
from tests.records import provenance
from tests.upstream import INSTALLED, TABLE

OURS = CalibrationTable(dict.fromkeys(("data", "conv1", "pool1", "conv2", "pool2", "ip1", "ip2", "prob"), 0.01))


MINMAX = CalibrationTable(TABLE.scales, "minmax")
NEWER = Installed("2.8.0", "2.8.0", "10.13.0.1")
TYPED = Installed("2.13.0", "2.13.0", "11.0.0")


def engine(folder, batch_sizes=(1,), quantization=None, **config):
    return TorchTensorRTEngine(EngineConfig(**config), quantization or QuantizationConfig(), folder, batch_sizes)


def calibrated(folder, network, installed=INSTALLED, algorithm="entropy2"):
    """Leave TensorRT's own table of ``network`` in the run's folder."""
    path = folder / "tensorrt" / "CalibrationTableLeNet"
    store(path, TABLE.dumps().encode(), own_provenance(provenance(algorithm=algorithm), network, installed))
    return path


def images(count):
    return torch.rand(count, 1, 28, 28, generator=torch.Generator().manual_seed(count))


def built_sizes(upstream):
    return [arguments["inputs"][0][0][0] for _, arguments in upstream.calls]


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)

    def forward(self, x):
        x = self.conv(x)
        return x.mean((2, 3)), x.amax((2, 3))


class TestCompiling:
    def test_gives_every_output_of_a_padded_batch(self, machine, tmp_path):
        machine()
        network = trace(TwoHeads(), "Two", (1, 28, 28))
        compiled = engine(tmp_path, (4,)).compile(network, "fp16", None)
        for found, expected in zip(compiled.outputs(images(3)), network.module(images(3)), strict=True):
            torch.testing.assert_close(found, expected)

    def test_computes_what_the_network_does(self, machine, network, tmp_path):
        machine()
        compiled = engine(tmp_path, (4,)).compile(network, "fp32", None)
        torch.testing.assert_close(compiled.run(images(4)), network.module(images(4)))
        assert compiled.device == "NVIDIA H200"
        assert compiled.engine == "torch-tensorrt"
        assert compiled.details["TensorRT"] == "10.12.0.36"
        assert compiled.details["TF32"] == "off"

    @pytest.mark.parametrize(
        ("sizes", "batches", "built"),
        [
            pytest.param((4, 1, 4), (4, 1), [4, 1], id="each size once, before anything runs"),
            pytest.param((8, 1), (3,), [8, 1], id="an odd batch is padded, not built for"),
            pytest.param((2,), (5,), [2, 5], id="a larger batch is built for"),
        ],
    )
    def test_which_batch_sizes_are_built_for(self, machine, network, tmp_path, sizes, batches, built):
        upstream = machine()
        compiled = engine(tmp_path, sizes).compile(network, "fp32", None)
        assert built_sizes(upstream) == list(dict.fromkeys(sizes))
        for count in batches:
            torch.testing.assert_close(compiled.run(images(count)), network.module(images(count)))
        assert built_sizes(upstream) == built

    def test_on_the_device_the_batch_size_is_exact(self, machine, network, tmp_path):
        upstream = machine()
        compiled = engine(tmp_path, (8,)).compile(network, "fp32", None)
        assert compiled.run_on_device is not None
        assert compiled.run_on_device(images(2)).shape == (2, 10)
        assert built_sizes(upstream) == [8, 2]

    def test_without_a_shape_the_first_batch_builds(self, machine, tmp_path):
        upstream = machine()
        compiled = engine(tmp_path).compile(trace(LeNet(), "LeNet"), "fp32", None)
        assert upstream.calls == []
        assert compiled.run(images(2)).shape == (2, 10)

    def test_fp16_where_types_decide_goes_in_and_out_as_float32(self, machine, network, tmp_path):
        machine(installed=TYPED)
        compiled = engine(tmp_path, (2,)).compile(network, "fp16", None)
        probabilities = compiled.run(images(2))
        assert probabilities.dtype is torch.float
        torch.testing.assert_close(probabilities, network.module(images(2)), atol=2e-3, rtol=0)

    @pytest.mark.parametrize("graphs", [True, False])
    def test_is_captured_for_its_latency_unless_switched_off(self, machine, network, tmp_path, graphs):
        machine()
        compiled = engine(tmp_path, (2,), cuda_graphs=graphs).compile(network, "fp32", None)
        assert (compiled.captured is not None) is graphs


class TestFiles:
    NAME = "LeNet_fp32_b2_NVIDIA-H200_trt10.12.0.36.ts"

    def compile(self, machine, network, folder, precision="fp32", table=None, installed=INSTALLED, **config):
        """Compile with a new engine; the sizes that were built."""
        upstream = machine(installed=installed)
        engine(folder, (2,), **config).compile(network, precision, table)
        return built_sizes(upstream)

    def test_an_engine_is_saved_under_its_name_and_used_again(self, machine, network, tmp_path):
        assert self.compile(machine, network, tmp_path) == [2]
        assert sorted(path.name for path in (tmp_path / "engines").iterdir()) == [self.NAME, f"{self.NAME}.json"]
        assert self.compile(machine, network, tmp_path) == []
        compiled = engine(tmp_path, (2,)).compile(network, "fp32", None)
        assert compiled.size_bytes == (tmp_path / "engines" / self.NAME).stat().st_size

    @pytest.mark.parametrize(
        "changed",
        [
            *({"tf32": True}, {"timing_iterations": 2}, {"workspace": 1}),
            {"installed": Installed("2.8.1", "2.8.0", "10.12.0.36")},
        ],
    )
    def test_other_options_and_another_torch_build_again(self, machine, network, tmp_path, changed):
        self.compile(machine, network, tmp_path)
        assert self.compile(machine, network, tmp_path, **changed) == [2]

    def test_other_weights_build_again(self, machine, network, tmp_path):
        self.compile(machine, network, tmp_path)
        torch.nn.init.ones_(network.module.get_parameter("ip2.bias"))
        assert self.compile(machine, network, tmp_path) == [2]

    def test_another_table_builds_again(self, machine, network, tmp_path):
        explicit = QuantizationConfig(mode="explicit")
        arguments = {"precision": "int8", "quantization": explicit}
        assert self.compile(machine, network, tmp_path, table=OURS, **arguments) == [2]
        assert self.compile(machine, network, tmp_path, table=OURS, **arguments) == []
        other = CalibrationTable({**OURS.scales, "prob": 0.02})
        assert self.compile(machine, network, tmp_path, table=other, **arguments) == [2]

    @pytest.mark.parametrize(
        ("suffix", "content"),
        [*(("", text) for text in ("", "PK not an archive")), *((".json", text) for text in ("", "{}", "[]"))],
    )
    def test_a_damaged_engine_or_side_file_builds_again(self, machine, network, tmp_path, suffix, content):
        self.compile(machine, network, tmp_path)
        (tmp_path / "engines" / f"{self.NAME}{suffix}").write_text(content)
        assert self.compile(machine, network, tmp_path) == [2]

    def test_an_engine_that_does_not_load_is_built_again(self, machine, network, tmp_path):
        self.compile(machine, network, tmp_path)
        path = tmp_path / "engines" / self.NAME
        path.write_bytes(b"not an archive")
        side = path.with_name(f"{path.name}.json")
        record = json.loads(side.read_text())
        record["engine"] = digest(path)
        side.write_text(json.dumps(record))
        assert self.compile(machine, network, tmp_path) == [2]


class TestInt8:
    def test_implicit_is_built_from_tensorrts_own_table(self, machine, network, tmp_path):
        upstream = machine()
        path = calibrated(tmp_path, network)
        before = path.read_bytes()
        compiled = engine(tmp_path, (2,)).compile(network, "int8", OURS)
        calibrator = upstream.calls[0][1]["calibrator"]
        assert calibrator.use_cache
        assert calibrator.read_calibration_cache() == before
        assert path.read_bytes() == before
        assert compiled.details["quantization"] == "implicit (Torch-TensorRT 2.8.0 has DataLoaderCalibrator)"
        assert (tmp_path / "engines" / "LeNet_int8-implicit_b2_NVIDIA-H200_trt10.12.0.36.ts").exists()

    def test_the_builder_lists_what_runs_in_int8_and_the_engines_file_keeps_it(self, machine, network, tmp_path):
        upstream = machine()
        calibrated(tmp_path, network)
        compile_ = upstream.compile

        def logging(module, **arguments):
            node = "%input.5 : Tensor = aten::_convolution(%x, %w), scope: __module.conv2 # conv.py:543:0"
            layer = f"Layer(CaskConvolution): {node}, Tactic: 0x00, x (Int8[1,20:32,12,12]) -> y (Float[1,50,8,8])"
            os.write(2, f"DEBUG: Engine Layer Information:\n{layer}\n".encode())
            return compile_(module, **arguments)

        upstream.compile = logging
        for builds in (2, 0):  # the second time, from their files
            compiled = engine(tmp_path, (2, 1)).compile(network, "int8", OURS)
            assert len(upstream.calls) == builds
            upstream.calls.clear()
            assert compiled.macs.source == "as TensorRT's engine of batch 2 executes it"
            assert [(layer.layer, layer.int8) for layer in compiled.macs.layers] == [("conv2", True)]
            assert compiled.macs.uncounted == ["conv1", "ip1", "ip2"]
            assert compiled.details["engine of batch 1"].startswith("INT8: 100.0 % of 1.6 M multiply-accumulates")

    def test_nothing_is_said_of_layers_that_the_builder_did_not_list(self, machine, network, tmp_path):
        machine()
        calibrated(tmp_path, network)
        compiled = engine(tmp_path, (2,)).compile(network, "int8", OURS)
        assert compiled.macs is None
        assert "engine of batch 2" not in compiled.details

    def test_explicit_has_no_calibrator(self, machine, network, tmp_path):
        upstream = machine()
        compiled = engine(tmp_path, (2,), QuantizationConfig(mode="explicit")).compile(network, "int8", OURS)
        module, arguments = upstream.calls[0]
        assert "calibrator" not in arguments
        assert "aten::fake_quantize_per_channel_affine" in str(module.inlined_graph)
        assert compiled.details["int8 layers"] == "conv1, conv2, ip1, ip2"

    @pytest.mark.parametrize(
        ("theirs", "installed", "ours", "message"),
        [
            (TABLE.dumps(), INSTALLED, None, r"run quantize\.py"),
            (None, INSTALLED, OURS, r"has not calibrated LeNet yet: run quantize\.py"),
            ("no table", INSTALLED, OURS, "line 1"),
            (TABLE.dumps(), NEWER, OURS, r"of TensorRT 10\.12\.0, and 10\.13\.0 is installed"),
            (MINMAX.dumps(), INSTALLED, OURS, "of algorithm minmax, and entropy2 is wanted"),
        ],
    )
    def test_tables_that_do_not_serve(self, machine, network, tmp_path, theirs, installed, ours, message):
        machine(installed=installed)
        if theirs is not None:
            calibrated(tmp_path, network).write_text(theirs)
        with pytest.raises(EngineError, match=message):
            engine(tmp_path).compile(network, "int8", ours)

    def test_a_table_of_other_weights_does_not_serve(self, machine, network, tmp_path):
        machine()
        calibrated(tmp_path, network)
        torch.nn.init.ones_(network.module.get_parameter("ip2.bias"))
        with pytest.raises(EngineError, match="of other weights"):
            engine(tmp_path).compile(network, "int8", OURS)

    def test_fp16_layers_need_the_flag(self, machine, network, tmp_path):
        machine(installed=TYPED)
        with pytest.raises(EngineError, match="no flag for FP16 layers"):
            engine(tmp_path, int8_fp16=True).compile(network, "int8", OURS)

    def test_a_table_that_tensorrt_does_not_accept(self, machine, network, tmp_path):
        upstream = machine()
        calibrated(tmp_path, network)

        def reject(module, **arguments):
            arguments["calibrator"].get_batch(["input_0"])
            return module

        upstream.compile = reject
        with pytest.raises(EngineError, match="did not accept the calibration table"):
            engine(tmp_path).compile(network, "int8", OURS)
        assert not (tmp_path / "engines").exists()


class TestRefusing:
    def test_a_batch_size_that_cannot_be_built_is_known_when_compiling(self, machine, network, tmp_path):
        upstream = machine()
        compile_ = upstream.compile

        def full(module, **arguments):
            if arguments["inputs"][0][0][0] > 2:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return compile_(module, **arguments)

        upstream.compile = full
        with pytest.raises(EngineError, match="GPU 0 has too little free memory for batches of 256"):
            engine(tmp_path, (2, 256)).compile(network, "fp32", None)

    def test_a_later_build_error_is_one_too(self, machine, network, tmp_path):
        upstream = machine()
        compiled = engine(tmp_path).compile(network, "fp32", None)
        upstream.error = RuntimeError("no kernel image")
        with pytest.raises(EngineError, match="no kernel image"):
            compiled.run(images(7))

    def test_out_of_memory(self, machine, network, tmp_path, monkeypatch):
        machine()
        compiled = engine(tmp_path, (2,)).compile(network, "fp32", None)

        def full(*arguments):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(subject.Engines, "on_device", full)
        with pytest.raises(EngineError, match="too little free memory for a batch of 2"):
            compiled.run(images(2))

    def test_an_engine_that_does_not_run_is_known_when_compiling(self, machine, network, tmp_path, monkeypatch):
        machine()

        def fails(*arguments):
            raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported")

        monkeypatch.setattr(subject.Engines, "on_device", fails)
        with pytest.raises(EngineError, match="does not run its engine of batch 2: CUDA error: out of memory$"):
            engine(tmp_path, (2,)).compile(network, "fp16", None)

    def test_unavailable_says_why(self, machine, tmp_path, monkeypatch):
        machine()
        assert engine(tmp_path).unavailable() is None

        def missing(index):
            raise GpuError("there is no GPU 3")

        monkeypatch.setattr(support, "find_gpu", missing)
        assert engine(tmp_path).unavailable() == "there is no GPU 3"
        with pytest.raises(EngineError, match="there is no GPU 3"):
            engine(tmp_path).compile(trace(LeNet()), "fp32", None)
        with pytest.raises(EngineError, match="there is no GPU 3"):
            engine(tmp_path).mode("entropy2")


def test_a_dla_core_is_named(machine, network, tmp_path):
    upstream = machine(capability=(8, 7), name="Orin")
    calibrated(tmp_path, network)
    compiled = engine(tmp_path, dla_core=1).compile(network, "int8", OURS)
    assert compiled.device == "Orin, DLA core 1"
    assert upstream.calls[0][1]["device"]["device_type"] == "dla"


def test_fp32_beside_a_dla_core_runs_on_the_gpu(machine, network, tmp_path):
    upstream = machine(capability=(8, 7), name="Orin")
    compiled = engine(tmp_path, dla_core=1).compile(network, "fp32", None)
    assert compiled.device == "Orin"
    assert "does not compute in FP32" in compiled.details["DLA"]
    assert upstream.calls[0][1]["device"]["device_type"] == "gpu"
