"""What users' networks do that tracing could get wrong: refused in one line, or right."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import onnx
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree
from torchvision.ops import FrozenBatchNorm2d

from calib.calibrator import calibrate
from calib.network import Network
from calib.plan import Int8Plan, plan_int8
from calib.tracing import trace
from common.errors import InputError
from engines.integer import IntegerNetwork
from engines.onnx.float import float_model
from engines.onnx.int8 import int8_model
from engines.onnxruntime.engine import open_session

SHAPE = (3, 6, 6)


class Body(nn.Module):
    """A convolution, a function on its output, a linear layer."""

    def __init__(self, function: Callable[[Tensor], Tensor], features: int = 4 * 6 * 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.fc = nn.Linear(features, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.function(self.conv(x)).flatten(1))


def traced(model: nn.Module) -> Network:
    """Trace a model whose network computes what it does, for another number of images than it was traced with."""
    network = trace(model.eval(), input_shape=SHAPE)
    images = torch.rand(5, *SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(network.module(images), model(images))
    return network


def planned(network: Network) -> Int8Plan:
    """Calibrated on random images."""
    return plan_int8(network, calibrate(network, [torch.rand(4, *SHAPE)]))


def assert_file_gives(model: nn.Module) -> None:
    """The ONNX file has all of the model's outputs, for any number of images."""
    session, _ = open_session(float_model(trace(model, input_shape=SHAPE)), 1)
    images = torch.rand(5, *SHAPE)
    with torch.no_grad():
        expected = _pytree.tree_leaves(model(images))
    for value, reference in zip(session.run(None, {"data": images.numpy()}), expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(value), reference)


def statement(change: Callable[[Tensor], object]) -> Callable[[Tensor], Tensor]:
    """What changes its argument in place, its own result unused."""

    def function(x: Tensor) -> Tensor:
        change(x)
        return x

    return function


def test_a_single_value_is_no_class_and_stays_as_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1))
    assert traced(model).task == "regress"


@pytest.mark.parametrize(
    "function",
    [
        statement(lambda x: x.mul_(2)),
        statement(lambda x: x.clamp_(-0.1, 0.1)),
        statement(lambda x: F.relu(x, True)),
        statement(lambda x: F.hardswish(x, inplace=True)),
        statement(torch.sigmoid_),
        statement(lambda x: F.leaky_relu_(x, 0.2)),
    ],
)
def test_what_works_in_place_is_not_lost(function: Callable[[Tensor], Tensor]) -> None:
    network, images = traced(Body(function)), torch.rand(5, *SHAPE)
    assert not torch.allclose(network.module(images), Body(lambda x: x)(images))


def test_a_value_changed_through_a_view_is_followed_by_torch_export() -> None:
    network = traced(Body(statement(lambda x: x.view(-1).mul_(2))))
    assert network.traced_by.startswith("torch.export, since torch.fx cannot: network Body computes something else")


def test_a_value_changed_in_a_part_is_put_together_from_its_parts() -> None:
    def function(x: Tensor) -> Tensor:
        x[:, 1:3] *= 2
        return x

    assert set(traced(Body(function)).unsupported.values()) == {"mul"}


def assigns(x: Tensor) -> None:
    x[:, 0] = 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.copy_(x + 1), "copy_, which works in place"),
        (assigns, r"Body cannot be traced: .*item assignment.*test_tracing\.py:\d+: x\[:, 0\]"),
    ],
)
def test_in_place_without_a_pure_counterpart_is_refused_by_name(
    change: Callable[[Tensor], object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        trace(Body(statement(change)))


def test_masks_and_indices_have_no_range(caplog: pytest.LogCaptureFixture) -> None:
    network = trace(Body(lambda x: torch.where(x > 0, x, -x)), input_shape=SHAPE)
    table = calibrate(network, [torch.rand(2, *SHAPE)])

    assert table.scales["gt"] == 0
    assert set(table.unusable) == {"gt"}
    assert "gt" not in caplog.text


def test_what_a_mask_picks_is_quantized_and_not_the_mask() -> None:
    network = trace(Body(lambda x: x[x.amax((1, 2, 3)) > 0]), input_shape=SHAPE)
    plan = plan_int8(network, calibrate(network, [torch.rand(2, *SHAPE)]))
    assert network.tensor_of["flatten"] == "getitem"
    onnx.checker.check_model(int8_model(plan, for_cpu=True), full_check=True)


def test_attention_is_the_products_that_it_is_made_of() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.fc = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.conv(x).flatten(2).transpose(1, 2)
            mixed, _ = self.attention(tokens, tokens, tokens)
            return self.fc(mixed.mean(1))

    network = trace(Attention(), input_shape=SHAPE)
    calibrate(network, [torch.rand(2, *SHAPE)])
    assert network.traced_by == "torch.export, since torch.fx does not look into attention (MultiheadAttention)"
    assert [layer.kind for layer in network.layers] == ["conv", "linear", "matmul", "matmul", "linear", "linear"]


def test_stochastic_depth_is_nothing() -> None:
    from torchvision.ops import StochasticDepth

    network = trace(Body(StochasticDepth(0.5, "row")), input_shape=SHAPE)
    assert network.tensors == ("data", "conv", "fc")
    assert not network.unsupported


def test_a_concatenation_that_a_relu_overwrites_gives_its_inputs_no_scale() -> None:
    network = trace(Body(lambda x: F.relu(torch.cat([x, -x], 1), inplace=True), 8 * 6 * 6), input_shape=SHAPE)
    assert all(network.scale_source[name] == name for name in network.tensors)


class Reads(nn.Module):
    """A network that computes with a constant of its own."""

    def __init__(self, constant: Callable[[Reads], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.constant = constant
        self.conv = nn.Conv2d(3, 8, 1)
        self.scale = nn.Parameter(torch.rand(8))
        self.table = nn.Embedding(8, 1)
        self.mix = nn.Linear(2, 8)
        self.register_buffer("grid", torch.rand(1, 2))
        self.register_buffer("deep", torch.rand(1, 2, 8, 6, 6))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc((self.conv(x) * self.constant(self)).mean((2, 3)))


@pytest.mark.parametrize(
    "constant",
    [
        lambda model: model.scale.view(1, -1, 1, 1),
        lambda model: model.mix(model.grid).view(1, -1, 1, 1),
        lambda model: model.table(torch.arange(8)).view(1, 8, 1, 1),
        lambda model: F.dropout(model.mix(model.grid), training=model.training).view(1, -1, 1, 1),
        lambda model: model.deep[0, :1],
    ],
    ids=["parameter", "layer_on_buffer", "embedding", "dropout", "five_dimensions"],
)
def test_what_depends_on_no_image_is_a_constant(constant: Callable[[Reads], Tensor]) -> None:
    network, images = traced(Reads(constant)), torch.rand(4, *SHAPE)
    plan = planned(network)

    assert {layer.name for layer in plan.weighted} == {"conv", "fc"}
    torch.testing.assert_close(IntegerNetwork(plan)(images), network.module(images), atol=0.1, rtol=0)
    int8_model(plan)


def test_further_arguments_keep_their_defaults_where_they_branch() -> None:
    class Extra(nn.Module):
        def forward(self, x: Tensor, return_loss: bool = False, **kwargs: object) -> Tensor:
            return x.mean() if return_loss else x.flatten(1)

    with pytest.raises(InputError, match="network Extra "):
        trace(Extra())
    network = trace(Extra(), input_shape=SHAPE)
    assert network.module(torch.rand(5, *SHAPE)).shape == (5, 3 * 6 * 6)
    assert network.traced_by.startswith("torch.export, since ")


@fx.wrap
def mixed_by_weight(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.flatten(1), weight)


def test_a_matrix_product_in_a_function_that_fx_does_not_enter_is_found() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3 * 6 * 6))

        def forward(self, x: Tensor) -> Tensor:
            return mixed_by_weight(x, self.weight)

    network = trace(Wrapped(), input_shape=SHAPE)
    assert network.traced_by == "torch.export, since torch.fx does not look into mixed_by_weight"
    assert [layer.kind for layer in network.layers] == ["linear"]


class Windows(nn.Module):
    """Attention within windows, whose number multiplies with that of the images."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(3, 1, batch_first=True)
        self.token = nn.Parameter(torch.randn(1, 1, 3))

    def forward(self, x: Tensor) -> Tensor:
        images, channels, height, width = x.shape
        windows = x.reshape(images, channels, 2, height // 2, 2, width // 2).permute(0, 2, 4, 3, 5, 1)
        windows = windows.reshape(images * 4, -1, channels)
        windows = torch.cat([self.token.expand(images * 4, -1, -1), windows], 1)
        return self.attention(windows, windows, windows)[0].reshape(images, -1)


def test_a_multiple_of_the_number_of_images_stays_one_for_any_number() -> None:
    network = traced(Windows())
    reshapes = [node for node in network.module.graph.nodes if node.target is torch.reshape]
    assert reshapes
    assert all(isinstance(size, int) for node in reshapes for size in node.args[1])


def test_a_map_made_for_each_image_goes_through_layers() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Conv2d(1, 3, 1)
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            free = ~torch.zeros((len(x), *x.shape[2:])).to(torch.bool)
            return self.conv(x + self.project(free.cumsum(1, dtype=torch.float32)[:, None])).mean((2, 3))

    plan = planned(traced(Positions()))
    assert {layer.name for layer in plan.weighted} == {"project", "conv"}
    int8_model(plan)


def test_a_convolution_that_computes_its_weight_is_one_in_int8() -> None:
    class Standardized(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return F.conv2d(x, weight, self.bias, self.stride, self.padding)

    network = trace(nn.Sequential(Standardized(3, 4, 3), nn.Flatten()), input_shape=SHAPE)
    assert network.traced_by == "torch.export, since torch.fx does not look into 0 (Standardized)"
    assert [layer.kind for layer in network.layers] == ["conv"]


def normalised(layer: nn.Module, norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A network with one layer whose weight is computed from others."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), norm(layer), nn.ReLU())


class Tokens(nn.Module):
    """A linear layer on tokens [B, 6, 6], whose result a function brings to batch normalisation."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.linear = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        nn.init.uniform_(self.norm.weight)
        nn.init.uniform_(self.norm.running_mean)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.norm, self.linear(x[:, 0])).flatten(1)


@pytest.mark.parametrize(
    ("function", "folded"),
    [
        (lambda norm, x: norm(x), False),
        (lambda norm, x: norm(x.flatten(0, 1)).reshape_as(x), True),
        (lambda norm, x: norm(x.transpose(1, 2).flatten(0, 1)).view_as(x), False),
    ],
    ids=["of_rows", "of_features", "of_columns"],
)
def test_batch_normalisation_of_tokens_is_folded_where_it_is_of_the_features(
    function: Callable[[nn.Module, Tensor], Tensor], folded: bool
) -> None:
    assert ("batchnorm" not in traced(Tokens(function)).kinds.values()) == folded


def compiled(*layers: nn.Module) -> nn.Module:
    """Layers in the wrapper of ``torch.compile``."""
    return torch.compile(nn.Sequential(*layers), backend="eager")  # type: ignore[return-value]


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: normalised(nn.Linear(64, 5), nn.utils.weight_norm),
        lambda: normalised(nn.Linear(64, 5), nn.utils.spectral_norm),
        lambda: normalised(nn.Linear(64, 5), lambda layer: nn.Sequential(layer, nn.BatchNorm1d(5, affine=False))),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), FrozenBatchNorm2d(4), nn.Flatten(), nn.Linear(64, 5)),
        lambda: nn.DataParallel(Body(F.relu)),
        lambda: compiled(Body(F.relu)),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), compiled(nn.Flatten(), nn.Linear(64, 5))),
    ],
    ids=["weight_norm", "spectral_norm", "norm_without_weights", "frozen_norm", "data_parallel", "compile", "part"],
)
def test_computed_weights_and_wrappers_are_no_obstacle_and_stay(make: Callable[[], nn.Module]) -> None:
    model = make()
    names = list(model.state_dict())
    network = traced(model)
    assert network.traced_by == "torch.fx"
    assert len(network.layers) == 2
    assert list(model.state_dict()) == names


def test_a_model_in_half_precision_is_taken_in_float32() -> None:
    model = Body(F.relu).half().eval()
    network = trace(model, input_shape=SHAPE)
    images = torch.rand(3, *SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(network.module(images), Body(F.relu)(images), atol=1e-2, rtol=0)
    assert model.fc.weight.dtype == torch.float16


class Gives(nn.Module):
    """A network whose result is made by a function of images and classes."""

    def __init__(self, result: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.result = result
        self.body = Body(F.relu)

    def forward(self, x: Tensor) -> object:
        return self.result(x, self.body(x))


@dataclasses.dataclass
class Found:
    """What a model may give."""

    logits: Tensor
    hidden: Tensor | None = None


@pytest.mark.parametrize(
    "result",
    [
        lambda x, y: (y, y, y.softmax(1)),
        lambda x, y: {"logits": y, "images": x},
        lambda x, y: Found(y, y.relu()),
        lambda x, y: Found(y),
        lambda x, y: (y, y.argmax(1)),
        lambda x, y: x.unfold(-1, 3, 2),
    ],
    ids=["twice", "images", "dataclass", "dataclass_of_one", "scores_and_class", "windows"],
)
def test_every_output_is_one_of_the_file(result: Callable[[Tensor, Tensor], object]) -> None:
    assert_file_gives(Gives(result).eval())


class OneByOne(nn.Module):
    """Goes through the images one by one."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([image.mean() * len(x) for image in x])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Body(lambda x: x * torch.rand(1)), "net computes something else once traced: random"),
        (OneByOne, "for another number of images"),
        (lambda: Body(lambda x: x, 4), r"net does not take images of shape \(2, 3, 6, 6\): .*test_tracing"),
        (lambda: torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(108, 5))), "it is TorchScript; pass the nn"),
        (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(5)), r"its module 1 \(LazyLinear\) has no weights yet"),
        (lambda: Gives(lambda x, y: (y, torch.ones(1))), "output 2 of 2 does not depend on the images"),
        (lambda: Body(lambda x: x / x.abs().max().item()), "something else for another number of images"),
        (lambda: Gives(lambda x, y: y.argmax(1)), "network net gives int64, as an argmax does: pass the network"),
        (lambda: Gives(lambda x, y: (y > 0, y.argmax(1))), "gives bool, as an argmax does"),
        (lambda: Body(Tensor.half), r"in fc \(Linear\): its forward changes the type of its values"),
    ],
    ids=[
        *("random", "image_by_image", "shape", "torchscript", "lazy", "constant_output"),
        *("number_of_the_batch", "argmax", "several_without_floats", "cast"),
    ],
)
def test_what_cannot_be_traced_is_one_line(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(InputError, match=message):
        trace(make().eval(), "net", input_shape=SHAPE)


def test_masks_of_minus_infinity_are_calibrated_around() -> None:
    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(6, 18)
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            tokens = x.flatten(1, 2)
            query, key, value = self.qkv(tokens).chunk(3, -1)
            tokens = F.scaled_dot_product_attention(query, key, value, is_causal=True)
            later = torch.full((18, 18), float("-inf")).triu(1)
            return self.attention(tokens, tokens, tokens, attn_mask=later)[0].mean(1)

    network = traced(Causal())
    attention = ["linear", "matmul", "matmul"]
    assert [layer.kind for layer in network.layers] == [*attention, *attention, "linear"]
    assert not planned(network).kept


@pytest.mark.parametrize("equation", ["...c,cd->...d", "bhwc,dc->bdhw"])
def test_a_product_by_index_with_a_matrix_of_weights_is_a_linear_layer(equation: str) -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum(equation, x, self.weight).flatten(1)

    assert [layer.kind for layer in traced(Product()).layers] == ["linear"]


def test_a_product_by_index_of_a_diagonal_stays_as_it_is() -> None:
    class Diagonal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)
            self.weight = nn.Parameter(torch.randn(4, 6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bcii,ck->bik", self.conv(x), self.weight)

    network = trace(Diagonal().eval(), input_shape=(3, 8, 8))
    assert network.traced_by.startswith("torch.export")
    assert list(network.unsupported.values()) == ["einsum.default"]


def test_a_bound_of_infinity_is_no_mask() -> None:
    class Clamped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.clamp(self.first(x), 0.0, float("inf")))

    assert "clamp" in trace(Clamped().eval()).tensors


def test_a_state_made_for_each_image_is_one_for_any_number_in_the_file() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(6, 4, batch_first=True)
            self.fc = nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.gru(x.flatten(1, 2))[1][-1])

    assert_file_gives(Recurrent().eval())


@pytest.mark.parametrize(("groups", "convolutions"), [(1, 2), (2, 1)])
def test_a_transposed_convolution_by_its_function_is_a_layer(groups: int, convolutions: int) -> None:
    """In groups, the axis of its channels holds those of one alone: no scale for each."""

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.weight = nn.Parameter(torch.randn(4, 2, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv_transpose2d(self.conv(x), self.weight, stride=2, output_padding=1, groups=groups).flatten(1)

    model = Functional()
    network, images = traced(model), torch.rand(4, *SHAPE)
    assert list(network.kinds.values()).count("conv") == convolutions
    torch.testing.assert_close(network.module(images), model(images))
