"""Finding a GPU on machines without one, and what each generation computes in; on a GPU: tests/gpu."""

import pytest
import torch

from engines.gpu import Gpu, GpuError, find_gpu, has_fast_fp16, precision_problem


def test_a_cpu_build_of_torch(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(GpuError, match="CPU build"):
        find_gpu(0)


@pytest.fixture
def one_gpu(monkeypatch):
    """A machine with one GPU."""
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


def fails(message):
    def fail(*_):
        raise RuntimeError(f"{message}\nmore")

    return fail


@pytest.mark.usefixtures("one_gpu")
def test_no_driver(monkeypatch):
    monkeypatch.setattr(torch.cuda, "init", fails("Found no NVIDIA driver on your system. Please check"))
    with pytest.raises(GpuError, match=r"^no NVIDIA GPU can be used: Found no NVIDIA driver on your system$"):
        find_gpu(0)


@pytest.mark.usefixtures("one_gpu")
def test_no_such_gpu():
    with pytest.raises(GpuError, match="there is no GPU 1: this machine has 1"):
        find_gpu(1)


@pytest.mark.usefixtures("one_gpu")
def test_a_gpu_without_memory_for_cuda_itself(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", fails("CUDA error: out of memory"))
    with pytest.raises(GpuError, match=r"^GPU 0 cannot be used \(CUDA error: out of memory\): end what else uses it$"):
        find_gpu(0)


@pytest.mark.parametrize(
    ("capability", "fp16"),
    [
        ((5, 2), False),
        ((5, 3), True),
        ((6, 0), True),
        ((6, 1), False),
        ((6, 2), True),
        ((7, 0), True),
        ((7, 5), True),
        ((9, 0), True),
        ((12, 0), True),
    ],
)
def test_what_pytorch_computes_on_a_gpu(capability, fp16):
    gpu = Gpu(0, "NVIDIA Test", capability)
    assert has_fast_fp16(capability) is fp16
    assert (precision_problem("fp16", gpu) is None) is fp16
    assert precision_problem("fp32", gpu) is None
    assert "no INT8 kernels" in str(precision_problem("int8", gpu))
