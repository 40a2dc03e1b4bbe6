"""A small residual network with batch normalisation, for 28x28 grey images."""

from __future__ import annotations

from torch import Tensor, nn


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut: ResNet's basic block (He et al., 2015, arXiv:1512.03385).

    Args:
        channels_in: Channels of the input, [N, channels_in, H, W].
        channels: Channels of the output; where they differ, the shortcut is a 1x1 convolution.
        stride: Stride of the first convolution and of the shortcut.
    """

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut.append(nn.Conv2d(channels_in, channels, 1, stride=stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(channels))
        self.relu2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels_in, H, W] -> [B, channels, H / stride, W / stride], float."""
        y = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(y)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """A residual network of 173,000 parameters that trains on MNIST in minutes on a CPU.

    Args:
        num_classes: Outputs.
        in_channels: Channels of the images.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.block1 = Block(16, 24, stride=1)
        self.block2 = Block(24, 48, stride=2)
        self.block3 = Block(48, 96, stride=2)
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(96, num_classes)
        self.prob = nn.Softmax(dim=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def logits(self, data: Tensor) -> Tensor:
        """Scores before the softmax: float [B, in_channels, 28, 28] in [0, 1] -> float [B, num_classes]."""
        x = self.pool(self.relu(self.bn(self.conv(data))))
        x = self.block3(self.block2(self.block1(x)))
        return self.fc(self.mean(x).flatten(1))

    def forward(self, data: Tensor) -> Tensor:
        """Class probabilities: float [B, in_channels, 28, 28] in [0, 1] -> float [B, num_classes]."""
        return self.prob(self.logits(data))
