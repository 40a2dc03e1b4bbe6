"""PyTorch's own baselines and the latency harness on a real GPU; no TensorRT needed."""

import pytest
import torch

from common.config import EngineConfig
from engines.cuda import CudaEngine, CudaGraphs, baselines
from engines.gpu import find_gpu

pytestmark = pytest.mark.gpu


def images(count):
    return torch.rand(count, 1, 28, 28, generator=torch.Generator().manual_seed(count))


def test_the_gpu_is_found():
    gpu = find_gpu(0)
    assert gpu.name == torch.cuda.get_device_name(0)
    assert gpu.capability == torch.cuda.get_device_capability(0)


@pytest.mark.parametrize("graphs", [False, True])
class TestBaselines:
    def test_fp32_is_what_the_cpu_computes(self, network, graphs):
        compiled = CudaEngine(EngineConfig(), graphs).compile(network, "fp32")
        for count in (1, 7, 256):
            torch.testing.assert_close(compiled.run(images(count)), network.module(images(count)), atol=1e-5, rtol=1e-4)
        assert compiled.device == torch.cuda.get_device_name(0)
        assert compiled.details["TF32"] == "off"

    def test_fp16_is_close_and_half_the_size(self, network, graphs):
        half = CudaEngine(EngineConfig(), graphs).compile(network, "fp16")
        full = CudaEngine(EngineConfig(), graphs).compile(network, "fp32")
        probabilities = half.run(images(64))
        assert probabilities.dtype is torch.float
        torch.testing.assert_close(probabilities, network.module(images(64)), atol=5e-3, rtol=0)
        assert half.size_bytes * 2 == full.size_bytes

    def test_on_the_device(self, network, graphs):
        compiled = CudaEngine(EngineConfig(), graphs).compile(network, "fp32")
        assert compiled.run_on_device is not None
        result = compiled.run_on_device(images(8).cuda())
        assert result.is_cuda
        torch.testing.assert_close(result.cpu(), network.module(images(8)), atol=1e-5, rtol=1e-4)


class TestCudaGraphs:
    def test_are_captured_once_for_each_shape_and_follow_their_input(self):
        calls = []

        def double(values):
            calls.append(values.shape)
            return values * 2

        graphs = CudaGraphs(double)
        for _ in range(3):
            for shape in ((2, 3), (4, 3)):
                values = torch.rand(shape, device="cuda")
                assert torch.equal(graphs(values), values * 2)
        assert len(calls) == 2 * 4  # three runs to warm up and the capture, for each shape

    def test_replay_on_another_stream(self):
        graphs = CudaGraphs(torch.sin)
        values = torch.rand(1000, device="cuda")
        graphs(values)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = graphs(values + 1).clone()
        stream.synchronize()
        assert torch.equal(result, torch.sin(values + 1))


def test_baselines_are_eager_and_graphs_in_both_precisions(network):
    found = baselines(network, EngineConfig(), ("fp32", "fp16", "int8"))
    assert [(item.engine, item.precision) for item in found] == [
        ("torch-cuda", "fp32"),
        ("torch-cuda", "fp16"),
        ("torch-cuda-graphs", "fp32"),
        ("torch-cuda-graphs", "fp16"),
    ]
