"""Small networks for images of 1x8x8 in three classes."""

import torch
from torch import Tensor, nn


class Scores(nn.Sequential):
    """Enough to learn the made-up data."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3))


class Lively(nn.Sequential):
    """With all that a training keeps beside its weights: running statistics and random numbers."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Dropout(0.1), nn.Linear(16, 3))


class ToNaN(Scores):
    """Gives NaN from the eighth training batch on."""

    batches = 0

    def forward(self, images: Tensor) -> Tensor:
        self.batches += self.training
        scores: Tensor = super().forward(images)
        return scores * (torch.nan if self.training and self.batches >= 8 else 1.0)


class Auxiliary(Scores):
    """Gives a second output while it trains, as Inception does."""

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = super().forward(images)
        return (scores, scores) if self.training else scores  # type: ignore[return-value]
