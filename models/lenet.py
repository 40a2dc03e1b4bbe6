"""Caffe's BVLC LeNet, with the layer names of lenet.prototxt."""

from __future__ import annotations

from torch import Tensor, nn


class LeNet(nn.Module):
    """LeNet as Caffe defines it: 28x28 grey images, no activation between convolution and pooling.

    Parameters start as Caffe's "xavier" filler does: uniform in +-sqrt(3 / fan_in), biases 0.

    Args:
        num_classes: Outputs of ``ip2``.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, kernel_size=5)
        self.pool1 = nn.MaxPool2d(kernel_size=2, stride=2)
        self.conv2 = nn.Conv2d(20, 50, kernel_size=5)
        self.pool2 = nn.MaxPool2d(kernel_size=2, stride=2)
        self.ip1 = nn.Linear(50 * 4 * 4, 500)
        self.relu1 = nn.ReLU(inplace=True)
        self.ip2 = nn.Linear(500, num_classes)
        self.prob = nn.Softmax(dim=1)
        for layer in (self.conv1, self.conv2, self.ip1, self.ip2):
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="linear")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def logits(self, data: Tensor) -> Tensor:
        """Scores before the softmax: float [B, 1, 28, 28] in [0, 1] -> float [B, num_classes]."""
        pool1 = self.pool1(self.conv1(data))
        pool2 = self.pool2(self.conv2(pool1))
        ip1 = self.relu1(self.ip1(pool2.flatten(1)))
        return self.ip2(ip1)

    def forward(self, data: Tensor) -> Tensor:
        """Class probabilities: float [B, 1, 28, 28] in [0, 1] -> float [B, num_classes]."""
        return self.prob(self.logits(data))
