"""LeNet, and a machine with a GPU and a stand-in for Torch-TensorRT (the real one: tests/contract)."""

import pytest
import torch

from calib.tracing import trace
from engines.gpu import Gpu
from engines.tensorrt import build, support
from models import LeNet
from tests.upstream import INSTALLED, Upstream


@pytest.fixture
def network():
    torch.manual_seed(1)
    return trace(LeNet(), "LeNet", (1, 28, 28))


@pytest.fixture
def machine(monkeypatch):
    """Gives the machine an upstream and a GPU; what runs on the GPU runs on the CPU."""
    monkeypatch.setattr(build, "gpu_device", lambda index: torch.device("cpu"))

    def use(upstream=None, installed=INSTALLED, capability=(9, 0), name="NVIDIA H200"):
        upstream = upstream or Upstream()
        monkeypatch.setattr(support, "find_gpu", lambda index: Gpu(index, name, capability))
        monkeypatch.setattr(support, "load", lambda: (upstream, installed))
        return upstream

    return use
