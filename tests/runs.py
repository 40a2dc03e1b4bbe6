"""A run on the bundled digits, as train.py leaves it, for tests of what comes after."""

from pathlib import Path

import torch
from torch.nn import functional as F

from common.config import DataConfig
from common.run import Run
from data import Splits, open_data
from models import CheckpointMeta, LeNet, save_checkpoint


def digits_lenet(data: Splits, steps: int) -> LeNet:
    """LeNet after some steps on the digits, in their order."""
    torch.manual_seed(1)
    model = LeNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True)
    for step in range(steps):
        index = torch.arange(50 * step, 50 * step + 50) % len(data.train)
        optimizer.zero_grad()
        F.cross_entropy(model.logits(data.train.images(index)), data.train.labels[index]).backward()
        optimizer.step()
    return model


def digits_run(artifacts: Path, name: str = "lenet_mnist", steps: int = 40, **data: int) -> Run:
    """Save the checkpoint of such a training under ``artifacts``; ``data`` are further options of the data set."""
    config = DataConfig(dataset="digits", augment=False, **data)
    digits, run = open_data(config, seed=1), Run(name, artifacts)
    meta = CheckpointMeta("LeNet", "models.LeNet", {"num_classes": 10}, digits.info, config, seed=1, epochs=3)
    save_checkpoint(run.checkpoint, digits_lenet(digits, steps), meta)
    return run
