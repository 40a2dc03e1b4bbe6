"""Multiply-accumulates of small graphs whose numbers are known."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx.helper import make_node

from calib.onnx.macs import count_macs
from tests.calib.onnx import networks

SCALE, CODES = np.float32(0.1), np.int8


def model(nodes: Sequence[onnx.NodeProto], inputs: Mapping[str, Any], weights: Mapping[str, Any]) -> onnx.ModelProto:
    return networks.model(nodes, inputs, {nodes[-1].output[0]: None}, weights)


def pair(value: str) -> list[onnx.NodeProto]:
    return [
        make_node("QuantizeLinear", [value, "scale", "zero"], [f"{value}_q"]),
        make_node("DequantizeLinear", [f"{value}_q", "scale", "zero"], [f"{value}_dq"]),
    ]


def weight(name: str) -> onnx.NodeProto:
    return make_node("DequantizeLinear", [name, "scale", "zero"], [f"{name}_dq"])


CONSTANTS = {"scale": SCALE, "zero": np.int8(0)}
CONV = np.ones((8, 3, 3, 3), CODES)


@pytest.mark.parametrize(
    ("node", "inputs", "weights", "macs"),
    [
        (make_node("Conv", ["x", "w"], ["y"]), {"x": ["batch", 3, 10, 12]}, {"w": (8, 3, 3, 3)}, 8 * 80 * 27),
        (
            make_node("Conv", ["x", "w"], ["y"], group=3, strides=[2, 2], pads=[1, 1, 1, 1]),
            {"x": ["batch", 3, 10, 12]},
            {"w": (3, 1, 3, 3)},
            3 * 5 * 6 * 9,
        ),
        (
            make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2]),
            {"x": ["batch", 3, 5, 5]},
            {"w": (3, 4, 2, 2)},
            3 * 25 * 16,
        ),
        (make_node("Gemm", ["x", "w"], ["y"], transB=1), {"x": ["batch", 20]}, {"w": (7, 20)}, 140),
        (make_node("Gemm", ["x", "w"], ["y"], transA=1), {"x": [20, 5]}, {"w": (20, 7)}, 700),
        (make_node("MatMul", ["x", "w"], ["y"]), {"x": ["batch", 6, 20]}, {"w": (20, 7)}, 6 * 140),
        (make_node("MatMul", ["x", "z"], ["y"]), {"x": ["b", 2, 6, 5], "z": ["b", 2, 5, 6]}, {}, 2 * 36 * 5),
        (
            make_node("Einsum", ["x", "w"], ["y"], equation="bij,jk->bik"),
            {"x": ["b", 6, 5]},
            {"w": (5, 3)},
            6 * 5 * 3,
        ),
        (
            make_node("LSTM", ["x", "w", "r"], ["", "y"], hidden_size=4, direction="bidirectional"),
            {"x": [7, 1, 6]},
            {"w": (2, 16, 6), "r": (2, 16, 4)},
            7 * 2 * 16 * (6 + 4),
        ),
    ],
    ids=lambda value: value.op_type if isinstance(value, onnx.NodeProto) else "",
)
def test_what_an_operator_multiplies(
    node: onnx.NodeProto, inputs: dict[str, list[Any]], weights: dict[str, Any], macs: int
) -> None:
    made = model([node], inputs, {name: np.ones(shape, np.float32) for name, shape in weights.items()})
    count = count_macs(made, "here")

    assert [(layer.layer, layer.macs, layer.int8) for layer in count.layers] == [("y", macs, False)]
    assert (count.source, count.uncounted) == ("here", [])


def test_a_layer_counts_as_int8_where_both_operands_come_out_of_pairs() -> None:
    nodes = [
        *pair("x"),
        weight("w"),
        make_node("MaxPool", ["x_dq"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        make_node("Conv", ["p", "w_dq"], ["y"]),
        make_node("Relu", ["y"], ["r"]),
        make_node("Conv", ["r", "v_dq"], ["z"]),
    ]
    made = model(
        [*nodes[:2], weight("v"), *nodes[2:]],
        {"x": ["b", 3, 12, 12]},
        {**CONSTANTS, "w": CONV, "v": np.ones((2, 8, 1, 1), CODES)},
    )
    first, second = count_macs(made, "").layers

    assert (first.layer, first.int8, first.reason) == ("y", True, "")
    assert (second.layer, second.int8, second.reason) == ("z", False, "the value r is not quantized")


def test_a_float_weight_is_no_int8_and_a_known_reason_is_given() -> None:
    made = model(
        [*pair("x"), make_node("Conv", ["x_dq", "w"], ["y"])],
        {"x": ["b", 3, 12, 12]},
        {**CONSTANTS, "w": CONV.astype(np.float32)},
    )

    assert [layer.reason for layer in count_macs(made, "").layers] == ["the weight is not quantized"]
    assert [layer.reason for layer in count_macs(made, "", {"y": "as asked"}).layers] == ["as asked"]


def test_the_product_of_two_values_needs_both() -> None:
    product = make_node("MatMul", ["x_dq", "t"], ["y"])
    turn = make_node("Transpose", ["x_dq"], ["t"], perm=[0, 2, 1])
    both = model([*pair("x"), turn, product], {"x": ["b", 4, 5]}, CONSTANTS)
    one = model(
        [*pair("x"), make_node("MatMul", ["x_dq", "z"], ["y"])], {"x": ["b", 4, 5], "z": ["b", 5, 4]}, CONSTANTS
    )

    assert [layer.int8 for layer in count_macs(both, "").layers] == [True]
    assert [(layer.int8, layer.reason) for layer in count_macs(one, "").layers] == [
        (False, "the value z is not quantized")
    ]


def test_a_linear_layer_has_the_name_of_its_sum() -> None:
    made = model(
        [make_node("MatMul", ["x", "w"], ["p"]), make_node("Add", ["b", "p"], ["fc"])],
        {"x": ["n", 4, 5]},
        {"w": np.ones((5, 3), np.float32), "b": np.ones(3, np.float32)},
    )

    assert [layer.layer for layer in count_macs(made, "").layers] == ["fc"]


def test_integer_operators_count_as_int8_and_constants_not_at_all() -> None:
    nodes = [
        make_node("MatMul", ["a", "a"], ["c"]),
        make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        make_node("MatMulInteger", ["q", "w"], ["y"]),
        make_node("Cast", ["y"], ["float"], to=TensorProto.FLOAT),
    ]
    made = model(nodes, {"x": ["n", 5]}, {**CONSTANTS, "w": np.ones((5, 3), CODES), "a": np.ones((9, 9), np.float32)})

    assert [(layer.layer, layer.macs, layer.int8) for layer in count_macs(made, "").layers] == [("y", 15, True)]


def test_a_free_size_is_not_counted_unless_it_is_given() -> None:
    made = model(
        [make_node("Conv", ["x", "w"], ["y"])],
        {"x": ["b", 3, "height", "width"]},
        {"w": np.ones((8, 3, 3, 3), np.float32)},
    )

    assert (count_macs(made, "").layers, count_macs(made, "").uncounted) == ([], ["y"])
    assert count_macs(made, "", shapes={"x": (1, 3, 10, 12)}).total == 8 * 80 * 27


def test_sizes_that_the_network_computes_are_seen_in_a_run() -> None:
    """As torch.chunk is exported: half of the channels, computed from the shape."""
    constants = {
        "one": np.array(1),
        "two": np.array(2),
        "axes": np.array([1]),
        "zero": np.array([0]),
        "w": np.ones((5, 2, 3, 3), np.float32),
    }
    nodes = [
        make_node("Shape", ["x"], ["shape"]),
        make_node("Gather", ["shape", "one"], ["channels"]),
        make_node("Div", ["channels", "two"], ["half"]),
        make_node("Mul", ["half", "one"], ["end"]),
        make_node("Cast", ["end"], ["rounded"], to=TensorProto.FLOAT),
        make_node("Cast", ["rounded"], ["whole"], to=TensorProto.INT64),
        make_node("Unsqueeze", ["whole", "zero"], ["ends"]),
        make_node("Slice", ["x", "zero", "ends", "axes"], ["part"]),
        make_node("Conv", ["part", "w"], ["y"]),
        make_node("Slice", ["y", "zero", "ends", "axes"], ["some"]),
        make_node("Conv", ["some", "w"], ["z"]),
    ]
    count = count_macs(model(nodes, {"x": ["b", 4, 10, 10]}, constants), "")

    assert [(layer.layer, layer.macs) for layer in count.layers] == [("y", 5 * 64 * 18), ("z", 5 * 36 * 18)]
    assert count.uncounted == []
