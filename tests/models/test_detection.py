"""Backbone and heads of torchvision's detectors, and what is said of a whole one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import ssdlite320_mobilenet_v3_large

from calib.tracing import trace
from common.cli import ROOT
from common.config import DataConfig
from common.errors import InputError
from data import Preprocessing
from data.base import DatasetInfo
from models import CheckpointMeta, DetectorCore, save_checkpoint

SSDLITE = {"num_classes": 3, "reduce_tail": True}


class Whole(nn.Module):
    """As a detector does: boxes and scores of each image, whose number depends on its values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, images: Tensor) -> list[dict[str, Tensor]]:
        return [{"boxes": values[values > 0]} for values in self.conv(images)]


def test_a_whole_detector_is_told_which_part_to_pass() -> None:
    with pytest.raises(InputError, match="pass what comes before that, its backbone and heads .*models.DetectorCore"):
        trace(Whole().eval(), "Whole", (3, 8, 8))


def test_the_core_takes_the_detectors_weights_and_gives_its_heads_tensors() -> None:
    detector = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, **SSDLITE).eval()
    core = DetectorCore("ssdlite320_mobilenet_v3_large", **SSDLITE).eval()
    core.load_state_dict(detector.state_dict())
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))

    with torch.no_grad():
        found = core(images)
        expected = detector.head(list(detector.backbone(images).values()))

    assert found.keys() == {"bbox_regression", "cls_logits"}
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_checkpoint_of_it_is_read_back_by_another_process_and_names_no_other_class(tmp_path: Path) -> None:
    core = DetectorCore("ssdlite320_mobilenet_v3_large", **SSDLITE)
    info = DatasetInfo("imagefolder", "images", (), Preprocessing(3, 64, 64), "0" * 64)
    arguments = {"detector": "ssdlite320_mobilenet_v3_large", **SSDLITE}
    meta = CheckpointMeta(
        "DetectorCore", "models.DetectorCore", arguments, info, DataConfig(dataset="imagefolder"), seed=1
    )
    save_checkpoint(tmp_path / "model.ckpt", core, meta)

    # There, torchvision's detectors are not imported yet.
    code = f"from pathlib import Path; import models; models.load_checkpoint(Path({str(tmp_path)!r}, 'model.ckpt'))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    with pytest.raises(InputError, match="'resnet18' is none of fasterrcnn_"):
        DetectorCore("resnet18")
