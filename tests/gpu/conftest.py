"""LeNet, and what of TensorRT is installed."""

import pytest
import torch

from calib.tracing import trace
from engines.tensorrt.support import TensorRTError, has_calibrator, usable
from models import LeNet


@pytest.fixture(scope="session")
def network():
    torch.manual_seed(1)
    return trace(LeNet(), "LeNet", (1, 28, 28))


@pytest.fixture(scope="session")
def installed():
    """The versions; skips without TensorRT."""
    try:
        return usable(0)[1]
    except TensorRTError as error:
        pytest.skip(f"needs TensorRT: {error}")


@pytest.fixture(scope="session")
def calibrator(installed):
    """Skips where Torch-TensorRT has no calibrator."""
    if not has_calibrator(installed.torch_tensorrt):
        pytest.skip(f"torch_tensorrt {installed.torch_tensorrt} has no DataLoaderCalibrator")
