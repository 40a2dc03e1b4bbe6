"""Small networks that exercise what the product accepts, with weights that make their values lively."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from calib.calibrator import calibrate
from calib.network import Network
from calib.plan import Int8Plan, plan_int8
from calib.tracing import trace
from common.config import DataConfig
from data import ImageData, open_data
from models import LeNet

SHAPE = (3, 12, 12)


class Residual(nn.Module):
    """Batch normalisation, in-place ReLU, an addition with a projected skip, average pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.down = nn.Sequential(nn.Conv2d(8, 8, 1, stride=2, bias=False), nn.BatchNorm2d(8))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(x))
        y += self.down(x)
        return self.fc(torch.flatten(self.pool(self.relu(y)), 1))


class Mobile(nn.Module):
    """Depthwise convolution, Hardswish, SiLU, ReLU6, a squeeze-and-excitation whose product stays in float."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Hardswish(inplace=True))
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU6(inplace=True))
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1))
        self.project = nn.Conv2d(8, 6, 1)
        self.act = nn.SiLU()
        self.fc = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.stem(x))
        x = x * torch.sigmoid(self.squeeze(x))
        x = self.act(self.project(x))
        return self.fc(x.mean((2, 3))).softmax(1)


class Branches(nn.Module):
    """Concatenation of pooled and convolved branches, a channel shuffle by reshape, chunk, size arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 6, 3, padding=1)
        self.right = nn.Conv2d(3, 6, 1)
        self.mix = nn.Conv2d(12, 8, 1, groups=2)
        self.pool = nn.MaxPool2d(2)
        self.last = nn.Conv2d(4, 8, 3)
        self.fc = nn.Linear(8 * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([self.left(x), self.right(x)], 1)
        size = joined.size(0)
        joined = joined.view(size, 2, 6, 12, 12).transpose(1, 2).contiguous().view(size, 12, 12, 12)
        first, second = torch.chunk(self.pool(self.mix(F.relu(joined))), 2, 1)
        y = self.last(first + second)
        return self.fc(y.reshape(y.shape[0], -1)).softmax(dim=1)


class MixedReaders(nn.Module):
    """A value that a convolution and an operation in float read, and one submodule that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.twice(F.max_pool2d(x, 3, 1, 1)) - torch.tanh(x)
        y = self.twice(y) * 0.5
        return self.fc(y.amax((2, 3)))


class Tokens(nn.Module):
    """A linear layer on [B, positions, channels]."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, stride=4)
        self.mlp = nn.Linear(8, 8)
        self.fc = nn.Linear(8 * 9, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.fc(F.relu(self.mlp(x)).flatten(1))


def sequence() -> nn.Module:
    """Layers whose names are numbers."""
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 10))


class Tied(nn.Module):
    """One weight in two convolutions and a function, which stays in float."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.second = nn.Conv2d(3, 3, 3, padding=1)
        self.second.weight = self.first.weight
        self.fc = nn.Linear(3 * 6 * 6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(F.relu(self.first(x)))
        x = F.relu(F.conv2d(x, self.first.weight))
        return self.fc(F.avg_pool2d(x, 5, 1).flatten(1))


class Upsampling(nn.Module):
    """Transposed convolutions: windows that overlap, in front of normalisation and ReLU, and windows side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(6, 5, 3, stride=2, padding=1, output_padding=1, bias=False)
        self.bn = nn.BatchNorm2d(5)
        self.wide = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.fc = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.up(self.down(x))), inplace=True)
        return self.fc(self.wide(torch.cat([x, y], 1)).mean((2, 3)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "lenet": LeNet,
    "residual": Residual,
    "mobile": Mobile,
    "branches": Branches,
    "mixed": MixedReaders,
    "tokens": Tokens,
    "tied": Tied,
    "sequence": sequence,
    "upsampling": Upsampling,
}


def images(name: str, count: int, seed: int = 0) -> Tensor:
    """Random images for a network of ``NETWORKS``: float32 [count, C, H, W]."""
    shape = (1, 28, 28) if name == "lenet" else SHAPE
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))


def make_network(name: str, seed: int = 0) -> Network:
    """A network of ``NETWORKS``, its batch normalisation and biases away from the trivial, traced."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = NETWORKS[name]()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, std=0.3)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
                nn.init.uniform_(module.weight, 0.5, 2.0)
            if (
                isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear | nn.BatchNorm2d)
                and module.bias is not None
            ):
                nn.init.normal_(module.bias, std=0.3)
    shape = images(name, 1).shape
    return trace(model, name, (shape[1], shape[2], shape[3]))


def make_plan(
    network: Network, keep_fp: tuple[str, ...] = (), quantize_output: bool = False, count: int = 32
) -> Int8Plan:
    """Everything in INT8 that can be, with scales from random images."""
    table = calibrate(network, [images(network.name, count, seed=1)])
    return plan_int8(network, table, keep_fp, quantize_output)


@cache
def mnist(folder: Path) -> ImageData:
    """MNIST from its files."""
    return open_data(DataConfig(dataset="mnist", dir=folder, download=False), seed=1)


class _BeyondTheEnd(torch.autograd.Function):
    """A function whose ONNX operator reads beyond the end of its input."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def symbolic(g, x):
        return g.op("Gather", x, g.op("Constant", value_t=torch.tensor([99])), axis_i=1)


@fx.wrap
def beyond_the_end(x: Tensor) -> Tensor:
    return _BeyondTheEnd.apply(x)


class Unrunnable(nn.Module):
    """What loads in ONNX Runtime and does not run there."""

    def forward(self, x: Tensor) -> Tensor:
        return beyond_the_end(x).flatten(1)


def run_onnx(model: onnx.ModelProto, batch: Tensor) -> np.ndarray:
    """The output of a model, computed as it is written, without ONNX Runtime's optimisations."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"data": batch.numpy()})
    return result


def without_saturation() -> onnxruntime.SessionOptions:
    """Options with which ONNX Runtime computes ``*_int8.onnx`` exactly on x86 without VNNI, too (docs/onnx.md)."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    return options
