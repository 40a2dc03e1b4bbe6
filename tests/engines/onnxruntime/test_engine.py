"""The ONNX Runtime engine: what it runs, with which kernels, and what it says when it cannot."""

import platform
import sys
from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from calib.calibrator import calibrate
from calib.network import Network
from calib.plan import plan_int8
from calib.table import CalibrationTable
from calib.tracing import trace
from common.config import EngineConfig, QuantizationConfig
from common.threads import available_cores
from engines.base import EngineError
from engines.integer import IntegerNetwork
from engines.onnx.int8 import int8_model
from engines.onnxruntime.engine import (
    OnnxRuntimeEngine,
    describe_dot_products,
    dot_products,
    integer_fault,
    integer_operators,
    open_runner,
    open_session,
    sums_are_exact,
)
from models import LeNet
from tests.networks import NETWORKS, Unrunnable, images, make_network, make_plan


@pytest.fixture
def integer_kernels() -> None:
    """Skips where the installed ONNX Runtime computes wrongly on this CPU, as the engine says, too."""
    fault = integer_fault()
    if fault is not None:
        pytest.skip(fault)


def make_engine(threads: int | None = 1, **quantization: object) -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine(EngineConfig(threads=threads), QuantizationConfig(**quantization))


def make_table(network: Network) -> CalibrationTable:
    return calibrate(network, [images(network.name, 32, seed=1)])


@pytest.mark.parametrize("name", NETWORKS)
def test_fp32_is_the_network(name):
    network, batch = make_network(name), images(name, 5)
    compiled = make_engine().compile(network, "fp32", None)
    assert compiled.engine == "onnxruntime"
    assert compiled.latency_note is None
    assert torch.allclose(compiled(batch), network.module(batch), atol=1e-5)


@pytest.mark.parametrize("name", ["lenet", "residual"])
def test_every_layer_runs_on_integers(name, integer_kernels):
    network = make_network(name)
    compiled = make_engine().compile(network, "int8", make_table(network))
    assert compiled.details["convolutions and matrix products in float"] == "none"
    expected = {
        "lenet": "2 NhwcMaxPool, 2 QGemm, 1 QLinearLeakyRelu, 2 QLinearConv",
        "residual": "1 QGemm, 1 QLinearAdd, 3 QLinearConv, 1 QLinearGlobalAveragePool, 2 QLinearLeakyRelu",
    }[name]
    assert sorted(compiled.details["integer operators"].split(", ")) == sorted(expected.split(", "))


def test_a_layer_kept_in_float_is_told(integer_kernels):
    network = make_network("lenet")
    compiled = make_engine(keep_fp=["conv2"]).compile(network, "int8", make_table(network))
    # conv1, too: only conv2 reads what it gives, in float, and the CPU kernel delivers int8 alone.
    assert compiled.details["convolutions and matrix products in float"] == "2 Conv"


def test_concatenation_runs_on_integers():
    _, optimized = open_session(int8_model(make_plan(make_network("branches")), for_cpu=True), threads=1)
    assert integer_operators(optimized).keys() >= {"QLinearConcat", "QLinearAdd", "QLinearConv", "QGemm"}


def test_fp16_runs_natively_or_says_why_not():
    network, batch = make_network("lenet"), images("lenet", 4)
    try:
        compiled = make_engine().compile(network, "fp16", None)
    except EngineError as error:
        reason = str(error)
    else:
        assert torch.allclose(compiled(batch), network.module(batch), atol=0.01)
        return
    assert "no FP16 kernel for" in reason
    assert "\n" not in reason


def test_threads_are_those_asked_for_else_all_cores():
    network = make_network("lenet")
    assert make_engine(3).compile(network, "fp32", None).device == "CPU (3 threads)"
    assert make_engine(1).compile(network, "fp32", None).device == "CPU (1 thread)"
    cores = available_cores()
    assert make_engine(None).compile(network, "fp32", None).device.startswith(f"CPU ({cores} thread")


class FakeSessions:
    """Stands in for ONNX Runtime's sessions, with a clock of its own: seconds of a run, by threads and images."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int, int], float]) -> None:
        self.now, self.seconds, self.lock = 0.0, seconds, Lock()
        self.runs: list[tuple[int, int]] = []
        monkeypatch.setattr("engines.onnxruntime.engine.open_session", lambda model, threads: (threads, model))
        monkeypatch.setattr("engines.onnxruntime.engine._infer", self.infer)
        monkeypatch.setattr("engines.onnxruntime.engine.time", SimpleNamespace(perf_counter=lambda: self.now))

    def infer(self, threads: int, images: np.ndarray) -> list[np.ndarray]:
        with self.lock:
            self.now += self.seconds(threads, len(images))
            self.runs.append((threads, len(images)))
        return [images[:, 0, 0]]

    def way(self, size: int) -> list[tuple[int, int]]:
        """How a batch is run once it has been seen: the (threads, images) of each session's run."""
        run, _ = open_runner(onnx.ModelProto(), threads=6)
        batch = np.arange(size, dtype=np.float32).reshape(size, 1, 1, 1)
        run(batch)
        self.runs.clear()
        np.testing.assert_array_equal(run(batch)[0].ravel(), np.arange(size))
        return sorted(self.runs)


# The fake's sessions run one after the other, so that a way takes the sum of its runs.
@pytest.mark.parametrize(
    ("seconds", "ways"),
    [
        pytest.param(
            lambda threads, images: 1e-4 if threads == 6 else 1e-3,
            {1: [(6, 1)], 3: [(6, 3)], 12: [(6, 12)]},
            id="one session on all threads is fastest",
        ),
        pytest.param(
            lambda threads, images: 1e-3 if threads == 6 else 1e-4,
            {1: [(1, 1)], 3: [(1, 3)], 12: [(1, 12)]},
            id="one thread is fastest",
        ),
        pytest.param(
            lambda threads, images: 1e-2 if threads == 6 else 1e-4 * (1 + abs(images - 3)),
            {1: [(1, 1)], 6: [(1, 3), (1, 3)], 12: [(1, 3)] * 4, 100: [(1, 16), (1, 16), *[(1, 17)] * 4]},
            id="parts of three images are fastest",
        ),
        pytest.param(
            lambda threads, images: 1.0,
            {1: [(6, 1)], 4: [(6, 4)], 11: [(6, 11)], 12: [(1, 2)] * 6, 30: [(1, 5)] * 6},
            id="long runs are shared by all threads",
        ),
    ],
)
def test_a_batch_is_run_in_the_fastest_way(seconds, ways, monkeypatch):
    sessions = FakeSessions(monkeypatch, seconds)
    assert {size: sessions.way(size) for size in ways} == ways


def test_what_takes_long_is_not_tried(monkeypatch):
    sessions = FakeSessions(monkeypatch, lambda threads, images: 1.0)
    run, _ = open_runner(onnx.ModelProto(), threads=2)
    run(np.zeros((64, 1, 1, 1), np.float32))
    assert sessions.runs == [(2, 64), (2, 64), (1, 32), (1, 32)]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("way", ["single", "shared", "whole"])
def test_batches_of_any_size_and_layout(threads, way, monkeypatch):
    """However the threads share a batch, no image may be lost or change its place."""
    place = {"single": 0, "shared": -2, "whole": -1}[way]
    monkeypatch.setattr("engines.onnxruntime.engine._fastest", lambda ways, images, limit: ways[place])
    compiled = make_engine(threads).compile(make_network("residual"), "fp32", None)
    batch = images("residual", 8)
    expected = torch.cat([compiled(image[None]) for image in batch])
    for size in range(1, 9):
        assert torch.allclose(compiled(batch[:size]), expected[:size], atol=1e-6)
    assert torch.allclose(compiled(batch.to(memory_format=torch.channels_last)), expected, atol=1e-6)


def test_an_error_in_a_share_of_the_batch_is_raised(monkeypatch):
    monkeypatch.setattr("engines.onnxruntime.engine._fastest", lambda ways, images, limit: ways[-2])
    compiled = make_engine(2).compile(make_network("residual"), "fp32", None)
    compiled(images("residual", 8))
    with pytest.raises(Exception, match="data"):
        compiled(torch.zeros(8, 1, 5, 5))


@pytest.mark.parametrize(
    ("network", "precision", "message"),
    [(make_network("lenet"), "int8", "calibration table"), (trace(LeNet()), "fp32", "input_shape")],
)
def test_what_compiling_needs(network, precision, message):
    with pytest.raises(EngineError, match=message):
        make_engine().compile(network, precision, None)


def test_a_model_that_onnxruntime_does_not_take_is_one_line():
    value = onnx.helper.make_tensor_value_info("data", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("NoSuchOperator", ["data"], ["prob"])
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "test", [value], [value]))
    with pytest.raises(EngineError, match="ONNX Runtime does not take the network") as error:
        open_session(model, threads=1)
    assert "\n" not in str(error.value)


def test_a_model_that_loads_but_does_not_run_is_an_engine_error(capfd):
    with pytest.raises(EngineError, match="does not run the network.*out of data bounds") as error:
        make_engine().compile(trace(Unrunnable(), input_shape=(1, 2, 2)), "fp32", None)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_it_says_that_onnxruntime_is_missing(monkeypatch):
    assert make_engine().unavailable() is None
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    reason = make_engine().unavailable()
    assert reason is not None
    assert "pip install onnxruntime" in reason


def test_kernels_that_compute_wrongly_are_not_used(monkeypatch):
    monkeypatch.setattr("engines.onnxruntime.engine.integer_fault", lambda: "wrong sums")
    network = make_network("lenet")
    with pytest.raises(EngineError, match="wrong sums"):
        make_engine().compile(network, "int8", make_table(network))
    make_engine().compile(network, "fp32", None)


def test_wrong_sums_are_found(monkeypatch):
    monkeypatch.setattr(
        "engines.onnxruntime.engine._infer", lambda session, images: session.run(None, {"data": images})[0] + 1
    )
    fault = integer_fault.__wrapped__()
    assert fault is not None
    assert "install onnxruntime" in fault


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or dot_products() != [], reason="only x86 without VNNI saturates"
)
def test_int8_weights_are_found_to_saturate():
    assert not sums_are_exact(np.int8)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("flags\t\t: fpu avx2 avx512_vnni avx_vnni amx_int8", "AVX-512 VNNI, AVX-VNNI, AMX"),
        ("flags\t\t: fpu avx2 fma", "none (no VNNI): INT8 gains less speed here than with them"),
        ("Features\t: fp asimd asimddp", "Arm dot product"),
    ],
)
def test_integer_dot_products(tmp_path, flags, expected):
    path = tmp_path / "cpuinfo"
    path.write_text(f"processor\t: 0\nmodel name\t: avx_vnni lookalike\n{flags}\n")
    assert describe_dot_products(dot_products(path)) == expected


def test_unknown_dot_products(tmp_path, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert dot_products(tmp_path / "missing") is None
    assert "not known" in describe_dot_products(None)
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert dot_products(tmp_path / "missing") == ["Arm dot product"]


WORST: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "first layer, several columns at once": (lambda: nn.Conv2d(1, 20, 5), (1, 28, 28)),
    "first layer of three channels": (lambda: nn.Conv2d(3, 32, 3, 2, 1), (3, 32, 32)),
    "odd number of channels": (lambda: nn.Conv2d(7, 50, 3, padding=1), (7, 9, 9)),
    "64 channels": (lambda: nn.Conv2d(64, 64, 3, padding=1), (64, 8, 8)),
    "pointwise": (lambda: nn.Conv2d(64, 48, 1), (64, 8, 8)),
    "dilated": (lambda: nn.Conv2d(16, 16, 3, padding=2, dilation=2), (16, 9, 9)),
    "depthwise": (lambda: nn.Conv2d(32, 32, 3, padding=1, groups=32), (32, 8, 8)),
    "depthwise, 5 x 5, stride 2": (lambda: nn.Conv2d(16, 16, 5, 2, 2, groups=16), (16, 9, 9)),
    "depthwise, two for each channel": (lambda: nn.Conv2d(8, 16, 3, groups=8), (8, 8, 8)),
    "grouped": (lambda: nn.Conv2d(32, 32, 3, padding=1, groups=4), (32, 8, 8)),
    "linear": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(500, 70)), (5, 10, 10)),
    "linear on positions": (lambda: nn.Sequential(nn.Flatten(2), nn.Linear(49, 30)), (3, 7, 7)),
}


@pytest.mark.parametrize("behind_relu", [False, True])
@pytest.mark.parametrize("name", WORST)
def test_a_plain_session_is_the_simulation_in_the_worst_case(name, behind_relu, integer_kernels):
    """Weights at -127 and 127, values at -128 and 127: kernels that add two products in 16 bits would saturate.

    Behind a ReLU, where the weights are int8, they do not: the sum of two products is at most 2 * 127 * 127.
    """
    make, shape = WORST[name]
    generator = torch.Generator().manual_seed(0)
    layer = make()
    (weighted,) = (module for module in layer.modules() if isinstance(module, nn.Conv2d | nn.Linear))
    signs = torch.randint(0, 2, weighted.weight.shape, generator=generator) * 2.0 - 1
    signs[::3], signs[1::3] = 1, -1
    weighted.weight.data, weighted.bias.data = 127 * signs, torch.arange(float(len(signs)))
    values = torch.tensor([-128.0, 127.0])
    mixed = values[torch.randint(0, 2, (2, *shape), generator=generator)]
    batch = torch.cat([torch.full((1, *shape), -128.0), torch.full((1, *shape), 127.0), mixed])
    with torch.no_grad():
        scale = float(torch.exp2((layer(batch).abs().max() / 127).log2().ceil()))  # so that float32 is exact
    if isinstance(layer, nn.Conv2d):
        # ONNX Runtime's convolution gives codes: another layer reads them.
        last = nn.Conv2d(layer.out_channels, layer.out_channels, 1, groups=layer.out_channels, bias=False)
        last.weight.data.fill_(127)
        layer = nn.Sequential(OrderedDict(first=layer, last=last))
    before = nn.ReLU() if behind_relu else nn.Identity()
    network = trace(nn.Sequential(OrderedDict(before=before, layer=layer, flat=nn.Flatten())).eval(), "worst", shape)
    plan = plan_int8(network, CalibrationTable({"data": 1.0, "before": 1.0, "layer.first": scale}))
    model = int8_model(plan, for_cpu=True)
    zero_points = [numpy_helper.to_array(item) for item in model.graph.initializer if item.name == "before_zero_point"]
    assert zero_points == ([0] if behind_relu else [])
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"data": batch.numpy()})
    np.testing.assert_array_equal(found, IntegerNetwork(plan)(batch).numpy())
