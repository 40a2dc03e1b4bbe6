"""What is written into a graph with pairs: names that are free, outputs that stay, weights that others read."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from calib.onnx.pairs import Activation, Weight, write_pairs
from tests.calib.onnx.networks import model, node


def network(weights_as_nodes=False):
    """Two products with one weight; the first one's result is an output as well, and its name is nearly taken."""
    nodes = [
        node("MatMul", ["data", "w"], ["a"]),
        node("MatMul", ["a", "w"], ["b"]),
        node("Add", ["b", "w_scale"], ["out"]),
    ]
    weight = np.random.default_rng(1).standard_normal((4, 4)).astype(np.float32)
    weights = {"w": weight, "w_scale": np.ones(4, np.float32)}
    if weights_as_nodes:
        del weights["w"]
        nodes.insert(0, onnx.helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(weight)))
    return model(nodes, {"data": ["N", 4]}, {"a": ["N", 4], "out": ["N", 4]}, weights), weight


def written(made, weight, readers=None, axis=1, put_out=False, zero_point=None):
    scales = np.abs(weight).max(axis=0) / np.float32(127) if axis == 1 else np.abs(weight).max() / np.float32(127)
    activations = {
        "data": Activation(0.5, {"/a/MatMul"}, zero_point=zero_point),
        "a": Activation(0.25, {"/b/MatMul"}, put_out),
    }
    write_pairs(made, activations, [Weight("w", axis, scales, None, 0.5, readers)])
    onnx.checker.check_model(made, full_check=True)
    return {item.name: item for item in made.graph.node}


@pytest.mark.parametrize("as_node", [False, True])
@pytest.mark.parametrize("axis", [1, None])
def test_names_that_the_network_has_stay_its_own(as_node, axis):
    made, weight = network(as_node)
    nodes = written(made, weight, axis=axis)
    constants = {item.name: numpy_helper.to_array(item) for item in made.graph.initializer}
    np.testing.assert_array_equal(constants["w_scale"], np.ones(4))
    back = nodes["w_DequantizeLinear"]
    codes, scales = (constants[name] for name in back.input[:2])
    np.testing.assert_allclose(codes * scales, weight, atol=scales.max() * 0.501)
    assert nodes["/a/MatMul"].input[1] == back.output[0]
    # Each layer has its own, of the same numbers.
    other = nodes["w_DequantizeLinear_"]
    assert nodes["/b/MatMul"].input[1] == other.output[0]
    for name, same in zip(back.input, other.input, strict=True):
        assert name != same
        np.testing.assert_array_equal(constants[name], constants[same])
    # The float weight is gone.
    assert "w" not in constants
    assert not [item for item in made.graph.node if item.op_type == "Constant"]


def test_who_else_reads_a_weight_keeps_it_in_float():
    made, weight = network()
    nodes = written(made, weight, {"/b/MatMul"})
    assert nodes["/a/MatMul"].input[1] == "w"
    assert nodes["/b/MatMul"].input[1] == nodes["w_DequantizeLinear"].output[0]
    assert "w" in {item.name for item in made.graph.initializer}


@pytest.mark.parametrize("in_float", [False, True])
def test_an_output_that_an_int8_layer_reads(in_float):
    made, weight = network()
    nodes = written(made, weight, put_out=not in_float)
    assert [value.name for value in made.graph.output] == ["a", "out"]
    assert (nodes["/a/MatMul"].output[0] == "a") is in_float
    assert nodes["/b/MatMul"].input[0] == nodes["a_DequantizeLinear"].output[0]
    assert (nodes["a_DequantizeLinear"].output[0] == "a") is not in_float


@pytest.mark.parametrize(("zero_point", "kind"), [(None, np.int8), (128, np.uint8), (0, np.uint8)])
def test_codes_of_values_are_signed_or_moved_up(zero_point, kind):
    made, weight = network()
    nodes = written(made, weight, zero_point=zero_point)
    constants = {item.name: numpy_helper.to_array(item) for item in made.graph.initializer}
    stored = constants[nodes["data_QuantizeLinear"].input[2]]
    assert (stored, stored.dtype) == (zero_point or 0, kind)
    codes = constants[nodes["w_DequantizeLinear"].input[0]]
    assert codes.dtype == np.int8
    assert np.abs(codes).max() == 127
