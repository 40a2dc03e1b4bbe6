"""The form of the plan that TensorRT fuses: what changes in it, and that nothing else does."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calib.calibrator import calibrate
from calib.explicit import fake_quantize, place_in_front
from calib.plan import Int8Plan, plan_int8
from calib.tracing import trace
from engines.integer import IntegerNetwork
from engines.tensorrt.form import for_tensorrt, fuse, linear_as_convolution
from tests.networks import NETWORKS, images, make_network, make_plan


def classes_agree(first: Tensor, second: Tensor) -> float:
    return float((first.argmax(1) == second.argmax(1)).float().mean())


def test_a_residual_sum_takes_the_convolution_in_float_and_the_shortcut_quantized():
    plan = make_plan(make_network("residual"))
    fused = fuse(plan)
    (add,) = (layer for layer in plan.network.layers if layer.kind == "add")
    assert fused.layers == plan.layers
    (in_float,) = fused.float_inputs[add.name]
    assert in_float in add.inputs
    assert [fused.reads_int8(add, node) for node in add.inputs].count(True) == 1
    assert in_float not in place_in_front(fused).partial


def test_a_sum_without_a_convolution_of_its_own_stays_in_float():
    plan = make_plan(make_network("branches"))
    (add,) = (layer for layer in plan.network.layers if layer.kind == "add")
    assert add.name in plan.layers
    assert plan.layers - fuse(plan).layers == {add.name}


def test_activations_are_computed_in_the_layer_before_them():
    plan = make_plan(make_network("mobile"))
    gone = plan.layers - fuse(plan).layers
    assert gone == {layer.name for layer in plan.network.layers if layer.kind == "activation"} != set()


def test_without_sums_activations_and_concatenations_nothing_is_rounded_otherwise():
    plan = make_plan(make_network("lenet"))
    batch = images("lenet", 64)
    assert torch.equal(IntegerNetwork(fuse(plan))(batch), IntegerNetwork(plan)(batch))


@pytest.mark.parametrize("name", NETWORKS)
def test_convolutions_compute_what_the_linear_layers_do(name):
    plan = make_plan(make_network(name))
    form = linear_as_convolution(plan)
    batch = images(name, 16)
    with torch.inference_mode():
        torch.testing.assert_close(form.network.module(batch), plan.network.module(batch), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(IntegerNetwork(form)(batch), IntegerNetwork(plan)(batch), atol=1e-6, rtol=1e-5)
    assert [layer.name for layer in form.weighted] == [layer.name for layer in plan.weighted]
    assert plan.network.module is not form.network.module


def test_linear_layers_in_a_row_stay_maps():
    form = linear_as_convolution(make_plan(make_network("lenet")))
    kinds = {layer.name: (layer.kind, layer.inputs) for layer in form.network.layers}
    assert kinds["ip1"] == ("conv", ("pool2",))
    assert kinds["ip2"] == ("conv", ("relu1",))
    sizes = {layer.name: form.network.module.get_submodule(layer.target).kernel_size for layer in form.weighted}
    assert (sizes["ip1"], sizes["ip2"]) == ((4, 4), (1, 1))
    views = [node for node in form.network.module.graph.nodes if form.network.kinds.get(node.name) == "view"]
    assert len(views) == 1  # in front of the softmax


def test_a_layer_kept_in_float_reads_a_flat_value():
    form = linear_as_convolution(make_plan(make_network("lenet"), keep_fp=("ip2",)))
    kinds = {layer.name: layer.kind for layer in form.network.layers}
    assert (kinds["ip1"], kinds["ip2"]) == ("conv", "linear")


def test_linear_layers_on_positions_stay():
    form = linear_as_convolution(make_plan(make_network("tokens")))
    assert {layer.name: layer.kind for layer in form.weighted}["mlp"] == "linear"


class Sum(nn.Module):
    """A residual sum of linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.first = nn.Linear(4 * 6 * 6, 12)
        self.second = nn.Linear(12, 12)
        self.last = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(self.conv(x).flatten(1)))
        return self.last(F.relu(self.second(x) + x))


def test_a_sum_of_linear_layers():
    torch.manual_seed(0)
    network = trace(Sum(), input_shape=(3, 8, 8))
    batch = torch.randn(32, 3, 8, 8)
    plan = plan_int8(network, calibrate(network, [batch]))
    form = for_tensorrt(plan)
    torch.testing.assert_close(IntegerNetwork(form)(batch), IntegerNetwork(fuse(plan))(batch), atol=1e-6, rtol=1e-5)
    (add,) = (layer for layer in form.network.layers if layer.kind == "add")
    assert sum(form.reads_int8(add, node) for node in add.inputs) == 1


def test_without_an_input_shape_the_linear_layers_stay():
    torch.manual_seed(0)
    network = trace(Sum())
    plan = plan_int8(network, calibrate(network, [torch.randn(4, 3, 8, 8)]))
    assert linear_as_convolution(plan) is plan


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("option", ["default", "output", "kept"])
def test_explicit_quantization_in_front_of_the_layers_is_the_simulation(name, option):
    network = make_network(name)
    keep = (network.layers[1].name,) if option == "kept" else ()
    form: Int8Plan = for_tensorrt(make_plan(network, keep, quantize_output=option == "output"))
    batch = images(name, 32, seed=5)
    with torch.inference_mode():
        result = fake_quantize(form, place_in_front(form))(batch)
    expected = IntegerNetwork(form)(batch)
    step = form.output_scale or 0.0
    assert float((result - expected).abs().max()) <= 1.01 * step + 0.01
    assert classes_agree(result, expected) >= 0.96
