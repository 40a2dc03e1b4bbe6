"""Height and width left free in the ONNX files: they compute at other sizes what the network does, or are refused."""

import re
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calib.calibrator import calibrate
from calib.plan import plan_int8
from calib.tracing import trace
from common.errors import InputError
from common.run import Run
from engines.onnx.export import export, export_fp32
from models import LeNet, SmallResNet


class Segments(nn.Module):
    """A value for each place, enlarged to the size of the image, which the graph computes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, 2, 1)
        self.second = nn.Conv2d(8, 2, 3, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        coarse = self.second(self.first(images).relu())
        return F.interpolate(coarse, size=images.shape[-2:], mode="bilinear", align_corners=False)


def _session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(("model", "channels"), [(SmallResNet(), 1), (Segments(), 3)])
def test_all_three_files_take_images_of_any_size(model: nn.Module, channels: int, tmp_path: Path) -> None:
    network = trace(model.eval(), "Any", (channels, 28, 28))
    table = calibrate(network, [torch.rand(8, channels, 28, 28)])
    files = export(network, plan_int8(network, table), table, Run("any", tmp_path), {}, any_size=True)

    assert files.int8
    assert files.int8_cpu
    for path, least in ((files.fp32, 80), (files.int8, 15), (files.int8_cpu, 15)):
        session = _session(path)
        assert session.get_inputs()[0].shape == ["batch", channels, "height", "width"]
        assert session.get_outputs()[0].shape[0] == "batch"
        for size in ((28, 28), (45, 64)):
            images = torch.rand(2, channels, *size)
            expected = network.module(images).detach().numpy()
            (found,) = session.run(None, {"data": images.numpy()})
            assert 20 * np.log10(np.linalg.norm(expected) / np.linalg.norm(found - expected)) > least


@pytest.mark.parametrize(
    ("model", "channels", "message"),
    [
        (LeNet(), 1, "LeNet takes images of 28x28 alone: leave --any-size out (network LeNet does not take images of"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 2)), 3, "28x28 alone"),
    ],
)
def test_a_network_of_one_size_is_refused_and_nothing_written(
    model: nn.Module, channels: int, message: str, tmp_path: Path
) -> None:
    network = trace(model.eval(), type(model).__name__, (channels, 28, 28))
    with pytest.raises(InputError, match=re.escape(message)):
        export(network, None, None, Run("one", tmp_path), {}, any_size=True)
    assert not list(tmp_path.rglob("*.onnx"))


def test_without_it_the_size_stays_fixed(tmp_path: Path) -> None:
    export_fp32(trace(SmallResNet().eval(), "Fixed", (1, 28, 28)), tmp_path / "fixed.onnx")
    assert _session(tmp_path / "fixed.onnx").get_inputs()[0].shape == ["batch", 1, 28, 28]
