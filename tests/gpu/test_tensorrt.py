"""The whole TensorRT path on a real GPU with TensorRT: what no other machine can test."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from calib.calibrator import calibrate as reference
from calib.subset import Subset
from calib.tracing import trace
from common.config import EngineConfig, QuantizationConfig
from data.base import Preprocessing
from data.tensor import TensorImages
from engines.tensorrt.calibration import calibrate
from engines.tensorrt.engine import TorchTensorRTEngine
from engines.tensorrt.match import compare, made_by
from engines.tensorrt.support import TensorRTError
from evaluation.latency import measure_latency
from tests.records import provenance

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("installed")]

CONFIG = EngineConfig(timing_iterations=1)  # what is built here need not be the fastest
LAYERS = ("conv1", "conv2", "ip1", "ip2")
SUBSET = Subset(torch.randperm(200, generator=torch.Generator().manual_seed(1))[:100], 10)
IMAGES = TensorImages(
    torch.randint(0, 256, (64, 28, 28), dtype=torch.uint8), torch.zeros(64, dtype=torch.int64), Preprocessing(1, 28, 28)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run's folder that all tests share, so that an engine which several of them take is built once."""
    return tmp_path_factory.mktemp("run")


class Source:
    _images = torch.rand(200, 1, 28, 28, generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return len(self._images)

    def images(self, index):
        return self._images[index]


@pytest.fixture(scope="module")
def ours(network):
    return reference(network, [Source().images(batch) for batch in SUBSET.batches])


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("fp16", 5e-3)])
@pytest.mark.parametrize("graphs", [False, True])
def test_float_engines(network, folder, precision, tolerance, graphs):
    config = replace(CONFIG, cuda_graphs=graphs)
    engine = TorchTensorRTEngine(config, QuantizationConfig(), folder, (8, 1))
    compiled = engine.compile(network, precision, None)
    for count in (8, 1, 5):
        batch = Source().images(torch.arange(count))
        torch.testing.assert_close(compiled.run(batch), network.module(batch), atol=tolerance, rtol=0)
    assert compiled.run_on_device is not None
    batch = Source().images(torch.arange(8))
    result = compiled.run_on_device(batch.cuda()).cpu()
    torch.testing.assert_close(result, network.module(batch), atol=tolerance, rtol=0)
    assert (compiled.captured is not None) is graphs


class TwoHeads(nn.Module):
    """Scores and a box from one feature map."""

    def __init__(self):
        super().__init__()
        self.conv, self.scores, self.box = nn.Conv2d(1, 4, 5, 4), nn.Linear(144, 10), nn.Linear(144, 4)

    def forward(self, x):
        x = torch.relu(self.conv(x)).flatten(1)
        return self.scores(x), self.box(x)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_network_of_two_outputs(folder, precision):
    network = trace(TwoHeads(), "TwoHeads", (1, 28, 28))
    compiled = TorchTensorRTEngine(CONFIG, QuantizationConfig(), folder, (8,)).compile(network, precision, None)
    batch = Source().images(torch.arange(5))
    for found, expected in zip(compiled.outputs(batch), network.module(batch), strict=True):
        torch.testing.assert_close(found, expected, atol=5e-3, rtol=0)
    ((entry,),) = measure_latency([compiled], IMAGES, [8], seconds=0.1, runs=10)
    assert entry.compute.median > 0


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_engine_as_a_cuda_graph_follows_its_input(network, folder, precision):
    compiled = TorchTensorRTEngine(CONFIG, QuantizationConfig(), folder, (8,)).compile(network, precision, None)
    source = torch.zeros(8, 1, 28, 28, device="cuda")
    replay = compiled.captured(source)
    for first in (0, 8, 16):
        batch = Source().images(torch.arange(first, first + 8)).cuda()
        source.copy_(batch)
        assert torch.equal(replay(), compiled.run_on_device(batch))


def test_the_report_times_the_engine_and_the_call_through_its_runtime(network, folder):
    compiled = TorchTensorRTEngine(CONFIG, QuantizationConfig(), folder, (1,)).compile(network, "fp32", None)
    ((entry,),) = measure_latency([compiled], IMAGES, [1], seconds=0.1, runs=10)
    assert entry.without_graph is not None
    assert entry.end_to_end is not None
    assert entry.compute.median > 0
    assert entry.without_graph.median > 0


def test_explicit_int8(network, ours, folder):
    engine = TorchTensorRTEngine(CONFIG, QuantizationConfig(mode="explicit"), folder, (8,))
    compiled = engine.compile(network, "int8", ours)
    batch = Source().images(torch.arange(8))
    torch.testing.assert_close(compiled.run(batch), network.module(batch), atol=0.05, rtol=0)
    assert [layer.layer for layer in compiled.macs.layers if layer.int8] == list(LAYERS)


@pytest.mark.usefixtures("calibrator")
def test_implicit_int8_and_the_two_tables(network, ours, tmp_path):
    path = tmp_path / "tensorrt" / "CalibrationTableLeNet"
    theirs = calibrate(network, lambda: (Source(), SUBSET), path, provenance(), CONFIG)
    assert theirs.calibrated
    pairs = [pair for pair in compare(ours, theirs.table, made_by(network)) if pair.ratio is not None]
    assert ("data", "input_0") in [(pair.reference, pair.tensorrt) for pair in pairs]
    for pair in pairs:
        assert pair.ratio == pytest.approx(1, rel=0.02), pair

    engine = TorchTensorRTEngine(CONFIG, QuantizationConfig(mode="implicit"), tmp_path, (8,))
    compiled = engine.compile(network, "int8", ours)
    batch = Source().images(torch.arange(8))
    torch.testing.assert_close(compiled.run(batch), network.module(batch), atol=0.05, rtol=0)

    macs = compiled.macs
    assert {layer.layer for layer in macs.layers} | set(macs.uncounted) == set(LAYERS)
    assert macs.source == "as TensorRT's engine of batch 8 executes it"
    loaded = TorchTensorRTEngine(CONFIG, QuantizationConfig(mode="implicit"), tmp_path, (8,))
    assert loaded.compile(network, "int8", ours).macs == macs

    again = calibrate(network, lambda: pytest.fail("touched the data"), path, provenance(), CONFIG)
    assert not again.calibrated


def test_a_full_gpu_is_told_at_once(network, tmp_path):
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    held = torch.empty(free - (32 << 20), dtype=torch.uint8, device="cuda")
    try:
        with pytest.raises(TensorRTError, match="GPU 0 has no memory left to build an engine"):
            TorchTensorRTEngine(CONFIG, QuantizationConfig(), tmp_path, (8,)).compile(network, "fp32", None)
    finally:
        del held
        torch.cuda.empty_cache()


def test_an_engine_is_loaded_from_its_file(network, folder):
    def compiled():
        return TorchTensorRTEngine(CONFIG, QuantizationConfig(), folder, (8,)).compile(network, "fp32", None)

    batch = Source().images(torch.arange(8))
    first = compiled().run(batch)
    (engine,) = (folder / "engines").glob("LeNet_fp32_b8_*.ts")
    written = engine.stat().st_mtime_ns
    assert torch.equal(compiled().run(batch), first)
    assert engine.stat().st_mtime_ns == written
