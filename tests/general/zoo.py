"""Networks beside those of ``tests.networks``: what users' code does, and what torchvision ships."""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from calib.calibrator import calibrate
from calib.int8 import WEIGHT_MAX, channel_axis
from calib.network import Network
from calib.plan import Int8Plan, plan_int8
from calib.table import CalibrationTable
from calib.tracing import trace
from models.small_resnet import SmallResNet
from tests.networks import NETWORKS


class NormFirst(nn.Module):
    """Batch normalisation before the convolution, which nothing folds, and a residual sum that nothing follows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv(F.relu(self.norm(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Collisions(nn.Module):
    """Modules named as functions are, as the input and the output are, and as second calls are."""

    def __init__(self) -> None:
        super().__init__()
        self.data = nn.Conv2d(3, 4, 1)
        self.data_1 = nn.Conv2d(4, 4, 1)
        self.add = nn.Conv2d(4, 4, 3, padding=1)
        self.add_1 = nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.Conv2d(4, 4, 1)
        self.cat = nn.Conv2d(8, 4, 1)
        self.prob = nn.Linear(4, 10)

    def forward(self, data: Tensor) -> Tensor:
        x = self.data_1(F.relu(self.data(data)))
        y = self.add(x) + self.add_1(x)
        y = self.add(y) + x
        z = self.cat(torch.cat([F.relu(self.relu(y)), y], 1))
        return self.prob(z.mean((2, 3)))


class Functional(nn.Module):
    """Layers as functions: parameters of the network's own, in-place arguments by position, methods that overwrite."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3, 3, 3) * 0.2)
        self.bias = nn.Parameter(torch.randn(8))
        self.shift = nn.Parameter(torch.randn(8, 1, 1))
        self.conv = nn.Conv2d(8, 8, 3, groups=4)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.weight, self.bias, padding=1)
        x.mul_(1.5)
        x += self.shift
        F.relu(x, True)
        x = F.max_pool2d(F.silu(self.conv(x)), kernel_size=2)
        x = F.dropout(torch.add(x, 0.5), 0.3, self.training)
        x = torch.flatten(F.adaptive_avg_pool2d(x, (2, 2)), start_dim=1)
        return F.log_softmax(self.fc(x), dim=1)


class Pools(nn.Module):
    """Every pooling, with padding and rounding up, over branches that are joined; dropouts and an identity between."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding="same")
        self.max = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.mean = nn.AvgPool2d(3, 2, padding=1, count_include_pad=False)
        self.drop = nn.Dropout2d(0.2)
        self.identity = nn.Identity()
        self.mix = nn.Conv2d(16, 8, 3, padding=2, dilation=2)
        self.act = nn.ReLU6(inplace=True)
        self.most = nn.AdaptiveMaxPool2d(2)
        self.fc = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(32, 16), nn.Hardswish(), nn.Linear(16, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = torch.cat((self.max(x), self.mean(x)), dim=1)
        return self.fc(self.most(self.act(self.mix(self.identity(self.drop(x))))))


class Tuples(nn.Module):
    """Operations that give several values, and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.fc = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.split(self.conv(x), 4, dim=1)
        x = first * (second > 0) + second
        return self.fc(x.flatten(2).max(dim=2)[0])


class SamePadding(nn.Module):
    """Padding by name, with dilation and with kernels of even size, for which it is not the same on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.valid = nn.Conv2d(3, 8, (1, 2), padding="valid", dilation=2)
        self.dilated = nn.Conv2d(8, 8, 3, padding="same", dilation=2)
        self.even = nn.Conv2d(8, 8, 4, padding="same", groups=2)
        self.both = nn.Conv2d(8, 8, (4, 3), padding="same", dilation=(3, 1))
        self.weight = nn.Parameter(torch.randn(8, 8, 2, 2) * 0.2)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.even(F.relu(self.dilated(self.valid(x))))
        x = F.conv2d(self.both(x), self.weight, padding="same", dilation=3)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class NormThenRelu(nn.BatchNorm2d):
    """What derives from a layer, and computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class EdgePadded(nn.Conv2d):
    """A convolution that pads for itself."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 1, 1, 1), mode="replicate"))


class Derived(nn.Module):
    """Layers of a user's own making, parametrized weights, a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = EdgePadded(3, 8, 3)
        self.norm = NormThenRelu(8)
        self.second = parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1))
        self.second_norm = nn.BatchNorm2d(8)
        self.hooked = nn.Conv2d(8, 8, 1)
        self.hooked.register_forward_hook(_twice)
        self.fc = parametrizations.orthogonal(nn.Linear(8, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.second_norm(self.second(self.norm(self.conv(x))))
        return self.fc(F.avg_pool2d(self.hooked(x), 12).flatten(1))


def _twice(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return 2 * output


def _torchvision(name: str) -> nn.Module:
    from torchvision.models import get_model

    model: nn.Module = get_model(name, weights=None, num_classes=10)
    return model


HAND_MADE: dict[str, Callable[[], nn.Module]] = {
    **NETWORKS,
    "norm_first": NormFirst,
    "collisions": Collisions,
    "functional": Functional,
    "pools": Pools,
    "tuples": Tuples,
    "derived": Derived,
    "same_padding": SamePadding,
    "small_resnet": SmallResNet,
}
TORCHVISION = ("resnet18", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1")
ALL: dict[str, Callable[[], nn.Module]] = {**HAND_MADE, **{name: partial(_torchvision, name) for name in TORCHVISION}}

GIVE_PROBABILITIES = {"lenet", "mobile", "branches"}
"""Networks that end in a softmax of their own."""

UNSUPPORTED: dict[str, set[str]] = {
    "mobile": {"sigmoid", "mul", "mean"},
    "mixed": {"tanh", "sub", "mul", "amax"},
    "norm_first": {"BatchNorm2d"},
    "collisions": {"mean"},
    "functional": {"mul", "add", "log_softmax"},
    "tuples": {"gt", "mul", "add", "max"},
    "derived": {"pad", "mul"},
    "mobilenet_v3_small": {"Hardsigmoid", "mul"},
    "shufflenet_v2_x0_5": {"mean"},
    "upsampling": {"mean"},
}
"""What stays in float; nothing in the other networks."""


def shape_of(name: str) -> tuple[int, int, int]:
    """(C, H, W) of a network's images."""
    if name in TORCHVISION:
        return (3, 32, 32)
    return (1, 28, 28) if name in ("lenet", "small_resnet") else (3, 12, 12)


def images_of(name: str, count: int, seed: int = 0) -> Tensor:
    """Random images for a network: float32 [count, C, H, W]."""
    return torch.rand(count, *shape_of(name), generator=torch.Generator().manual_seed(seed))


def build(name: str) -> nn.Module:
    """A network with random weights, whose batch normalisation knows its inputs, so that no value fades or explodes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ALL[name]()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
        with torch.no_grad():
            model.train()(images_of(name, 16, seed=2))
    return model.eval()


def traced(name: str, model: nn.Module) -> Network:
    """A network as the commands trace it."""
    return trace(model, name, shape_of(name))


def exact_plan(
    network: Network, images: Tensor, keep_fp: Sequence[str] = (), quantize_output: bool = False
) -> Int8Plan:
    """Everything in INT8 that can be, in numbers that float32 computes with exactly.

    All scales become powers of two, all weights and biases multiples of them. Sums, products and quantization are
    then the same in whatever order they are computed, so that implementations must agree in every code.
    """
    network = dataclasses.replace(network, module=copy.deepcopy(network.module))
    table = calibrate(network, [images])
    table = CalibrationTable({name: float(_power_of_two(torch.tensor(s))) for name, s in table.scales.items()})
    plan = plan_int8(network, table, keep_fp, quantize_output)
    for layer in plan.weighted:
        module = network.module.get_submodule(str(layer.target))
        assert isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)
        weight = module.weight.data.movedim(channel_axis(module), 0)
        rows = weight.flatten(1)
        scales = _power_of_two(rows.abs().amax(1, keepdim=True) / WEIGHT_MAX)
        codes = (rows / scales).round().clamp(-WEIGHT_MAX, WEIGHT_MAX)
        # So that a channel's largest magnitude / 127 is its scale again.
        largest = codes.abs().argmax(1, keepdim=True)
        codes.scatter_(1, largest, torch.where(codes.gather(1, largest) < 0, -WEIGHT_MAX, WEIGHT_MAX).float())
        module.weight.data = (codes * scales).view_as(weight).movedim(0, channel_axis(module)).contiguous()
        if module.bias is not None:
            steps = scales.flatten() * plan.scales[layer.inputs[0]]
            module.bias.data = (module.bias / steps).round() * steps
    return plan


def _power_of_two(values: Tensor) -> Tensor:
    return torch.exp2(values.log2().round())
