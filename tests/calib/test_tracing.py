"""Names and normalisation of traced networks."""

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calib.tracing import trace
from common.errors import InputError
from models import LeNet
from tests.networks import Residual

LENET = ("data", "conv1", "pool1", "conv2", "pool2", "ip1", "ip2", "prob")


def test_lenet_has_exactly_caffes_blobs() -> None:
    network = trace(LeNet())
    assert network.tensors == LENET
    assert network.name == "LeNet"
    assert network.scale_source["pool1"] == "conv1"
    assert network.scale_source["pool2"] == "conv2"
    assert all(network.scale_source[name] == name for name in LENET if not name.startswith("pool"))
    assert [layer.name for layer in network.layers] == ["conv1", "conv2", "ip1", "ip2", "prob"]
    assert not network.unsupported


def test_ip1_is_the_value_after_the_in_place_relu() -> None:
    model = LeNet().eval()
    images = torch.rand(3, 1, 28, 28)
    seen: dict[str, Tensor] = {}
    result = trace(model).run(images, lambda name, value: seen.setdefault(name, value.clone()))
    with torch.no_grad():
        pool2 = model.pool2(model.conv2(model.pool1(model.conv1(images))))
        ip1 = torch.relu(model.ip1(pool2.flatten(1)))
        torch.testing.assert_close(seen["ip1"], ip1)
        torch.testing.assert_close(seen["ip2"], model.ip2(ip1))
        torch.testing.assert_close(result, model(images))
    assert tuple(seen) == LENET


def test_tracing_leaves_the_model_alone() -> None:
    model = Residual().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trace(model)
    assert model.training
    assert model.relu.inplace
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_batch_normalisation_is_folded_and_dropout_is_gone() -> None:
    """That it computes the same: tests/general/test_networks.py."""
    network = trace(nn.Sequential(OrderedDict(net=Residual(), drop=nn.Dropout(0.5))))
    seen: list[str] = []
    network.run(torch.randn(2, 3, 8, 8), lambda name, value: seen.append(name))
    assert tuple(seen) == network.tensors
    assert not any(isinstance(module, nn.BatchNorm2d | nn.Dropout) for module in network.module.modules())
    assert network.tensors == ("data", "net.conv1", "net.conv2", "net.down.0", "add", "net.pool", "net.fc")


@pytest.mark.parametrize(
    "pool", [nn.AvgPool2d(2, 2, 1, divisor_override=3), lambda x: F.avg_pool2d(x, 3, divisor_override=2)]
)
def test_a_divisor_of_a_pooling_becomes_a_factor(pool: Callable[[Tensor], Tensor]) -> None:
    """PyTorch's exporter drops it without a word."""

    class Divided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = pool

        def forward(self, x: Tensor) -> Tensor:
            return self.pool(self.pool(x))

    images = torch.rand(2, 3, 16, 16)
    network = trace(Divided(), input_shape=(3, 16, 16))
    torch.testing.assert_close(network.module(images), pool(pool(images)))
    functions = [node for node in network.module.graph.nodes if node.op == "call_function"]
    assert [node.target for node in functions] == [F.avg_pool2d, torch.mul] * 2
    assert not any(node.kwargs.get("divisor_override") for node in functions)
    with pytest.raises(InputError, match="divisor_override and ceil_mode"):
        trace(nn.AvgPool2d(2, ceil_mode=True, divisor_override=3), input_shape=(3, 16, 16))


def test_a_reused_module_gives_two_names() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3, padding=1)
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv(self.conv(x)).flatten(1))

    assert trace(Twice()).tensors == ("data", "conv", "conv_1", "fc")


def test_names_data_and_prob_are_kept_for_the_input_and_a_softmax_at_the_end() -> None:
    class Names(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.data = nn.Conv2d(1, 1, 1)
            self.prob = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.prob(self.data(x).flatten(1))

    network = trace(Names())
    assert network.tensors == ("data", "data_1", "prob")
    assert trace(nn.Sequential(Names(), nn.Softmax(1))).tensors == ("data", "0.data", "0.prob", "prob")


def test_an_out_of_place_relu_is_a_tensor_of_its_own() -> None:
    network = trace(nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)), "Plain")
    assert network.tensors == ("data", "0", "1", "3")


def test_padding_other_than_zeros_is_not_an_int8_convolution() -> None:
    network = trace(nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), nn.Flatten()), "Reflect")
    assert "0" in network.unsupported


def test_relus_overwrite_only_what_nobody_else_sees() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1)
            self.six = nn.ReLU6()

        def forward(self, x: Tensor) -> Tensor:
            first = self.first(x)
            second = self.second(F.relu(first)) + first
            third = F.relu6(second).flatten(1)
            return F.relu(third.clone() + self.six(self.first(x)).flatten(1)) - third

    model, images = Shared().eval(), 9 * torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    seen: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}

    def observe(name: str, value: Tensor) -> None:
        seen[name], kept[name] = value.clone(), value

    network = trace(model)
    result = network.run(images, observe)
    with torch.inference_mode():
        torch.testing.assert_close(result, model(images))
        torch.testing.assert_close(result, network.module(images))
    assert all(torch.equal(seen[name], kept[name]) for name in seen)


def test_control_flow_on_values_is_refused_with_the_place() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(InputError, match=r"Branches cannot be traced: .*test_tracing\.py:\d+: return x if"):
        trace(Branches())


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda self, x, y: x + y, "takes 2 inputs"),
        (lambda self, x: 3, "gives no tensor that depends on its input"),
        (lambda self, x, y=None: x if y is None else y, "optional input 'y' is not supported"),
    ],
)
def test_other_than_one_input_and_no_output_are_refused(forward: object, message: str) -> None:
    model = type("Odd", (nn.Module,), {"forward": forward})()
    with pytest.raises(InputError, match=message):
        trace(model)
