"""Detectors of torchvision without what no engine runs in INT8: their backbone and heads."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchvision.models import detection, get_model_builder, list_models

from common.errors import InputError


class DetectorCore(nn.Module):
    """Backbone and heads of a detector of torchvision (SSD, RetinaNet, FCOS, Faster and Mask R-CNN).

    A detector resizes and normalises its images, and picks boxes whose number depends on their values: that stays in
    float around this network. Of the two-stage ones, the heads are the region proposal network's. The names of the
    weights are the detector's.

    Args:
        detector: Its builder in ``torchvision.models.detection``, such as ``ssdlite320_mobilenet_v3_large``.
        arguments: Of the builder; it loads no weights unless they ask for them.

    Raises:
        InputError: there is no such detector.
    """

    def __init__(self, detector: str, **arguments: Any) -> None:
        super().__init__()
        if detector not in list_models(module=detection):
            raise InputError(f"{detector!r:.60} is none of {', '.join(list_models(module=detection))}")
        whole = get_model_builder(detector)(**{"weights": None, "weights_backbone": None, **arguments})
        self.backbone = whole.backbone
        self.head: nn.Module | None = getattr(whole, "head", None)
        if self.head is None:
            self.rpn = nn.ModuleDict({"head": whole.rpn.head})

    def forward(self, images: Tensor) -> Any:
        """float32 [B, 3, H, W], normalised -> the heads' tensors: classes and boxes of all anchors."""
        features = list(self.backbone(images).values())
        return self.head(features) if self.head is not None else self.rpn["head"](features)
