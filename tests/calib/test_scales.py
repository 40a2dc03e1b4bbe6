"""Which tensors share a scale."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calib.tracing import trace


def test_pooling_windows_share_the_scale_of_their_input_and_nothing_else_shares() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
            self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            first = F.relu(self.conv(x), inplace=True)
            added = F.relu(first + self.second(first), inplace=True)
            return self.fc(self.pool(torch.cat([added, F.max_pool2d(first, 3, 1, 1)], 1)).flatten(1))

    source = trace(Block()).scale_source
    assert {name: root for name, root in source.items() if name != root} == {"max_pool2d": "conv"}


def test_pooling_everything_has_a_scale_of_its_own() -> None:
    class Pools(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.windows, self.everything, self.fc = nn.AvgPool2d(2), nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = F.adaptive_max_pool2d(F.adaptive_avg_pool2d(self.windows(x), 2) * 2.0, output_size=1)
            return self.fc(self.everything(x).flatten(1))

    source = trace(Pools()).scale_source
    assert (source["windows"], source["adaptive_avg_pool2d"]) == ("data", "data")
    assert (source["everything"], source["adaptive_max_pool2d"]) == ("everything", "adaptive_max_pool2d")
