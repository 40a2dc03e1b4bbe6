"""PyTorch's own baselines, on a machine without a GPU; with one: tests/gpu."""

import re

import pytest
import torch

from calib.tracing import trace
from common.config import EngineConfig
from engines import cuda
from engines.base import EngineError
from engines.gpu import Gpu
from models import LeNet


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_there_are_no_baselines():
    network = trace(LeNet())
    assert cuda.baselines(network, EngineConfig(), ("fp32", "fp16")) == []
    reason = str(cuda.CudaEngine(EngineConfig()).unavailable())
    assert "GPU" in reason
    with pytest.raises(EngineError, match=re.escape(reason)):
        cuda.CudaEngine(EngineConfig()).compile(network, "fp32")


def test_a_baseline_that_does_not_fit_is_left_out(monkeypatch, caplog):
    monkeypatch.setattr(cuda, "find_gpu", lambda index: Gpu(index, "NVIDIA Test", (9, 0)))

    def full(self, network, precision, table=None):
        raise EngineError("no memory left")

    monkeypatch.setattr(cuda.CudaEngine, "compile", full)
    assert cuda.baselines(trace(LeNet()), EngineConfig(), ("fp32",)) == []
    assert "no memory left" in caplog.text


def test_there_is_no_int8(monkeypatch):
    monkeypatch.setattr(cuda, "find_gpu", lambda index: Gpu(index, "NVIDIA Test", (9, 0)))
    with pytest.raises(EngineError, match="no INT8 kernels"):
        cuda.CudaEngine(EngineConfig()).compile(trace(LeNet()), "int8")


def test_no_fp16_where_it_is_slow(monkeypatch):
    monkeypatch.setattr(cuda, "find_gpu", lambda index: Gpu(index, "NVIDIA Test", (6, 1)))
    with pytest.raises(EngineError, match="no fast FP16"):
        cuda.CudaEngine(EngineConfig()).compile(trace(LeNet()), "fp16")


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_what_was_asked_for(allowed):
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    try:
        cuda.allow_tf32(allowed)
        assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == (allowed, allowed)
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
