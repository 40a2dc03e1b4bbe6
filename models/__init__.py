"""Networks, the LightningModule that trains them, and checkpoints.

Names are imported on first use: ``from models import LeNet`` does not import Lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.checkpoint import Checkpoint, CheckpointMeta, load_checkpoint, save_checkpoint
    from models.classifier import Classifier
    from models.detection import DetectorCore
    from models.lenet import LeNet
    from models.network import build_network
    from models.small_resnet import SmallResNet

_HOME = {
    "Checkpoint": "models.checkpoint",
    "CheckpointMeta": "models.checkpoint",
    "Classifier": "models.classifier",
    "DetectorCore": "models.detection",
    "LeNet": "models.lenet",
    "SmallResNet": "models.small_resnet",
    "build_network": "models.network",
    "load_checkpoint": "models.checkpoint",
    "save_checkpoint": "models.checkpoint",
}

__all__ = [
    "Checkpoint",
    "CheckpointMeta",
    "Classifier",
    "DetectorCore",
    "LeNet",
    "SmallResNet",
    "build_network",
    "load_checkpoint",
    "save_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
