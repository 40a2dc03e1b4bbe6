"""Operators divided into the layers that TensorRT makes of them (:mod:`calib.onnx.layers`) compute the same."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from calib.onnx.observe import Observed
from calib.onnx.rules import entries
from tests.calib.onnx.networks import model, node

X = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
WEIGHTS = {"w": X[:, :3].reshape(6, 2), "b": X[0, :2]}

CASES = {
    "celu": (("Celu", ["x"], {"alpha": 0.7}), 6),
    "gemm": (("Gemm", ["x", "w", "b"], {}), 1),
    "gemm, transposed": (("Gemm", ["w", "x", "c"], {"transA": 1, "transB": 1}), 1),
    "gemm, scaled": (("Gemm", ["x", "w", "b"], {"alpha": 0.5, "beta": 2.0}), 1),
    "gemm, scaled, no bias": (("Gemm", ["x", "w"], {"alpha": 0.5}), 1),
    "gemm, no bias": (("Gemm", ["x", "w"], {}), 0),
    "hard swish": (("HardSwish", ["x"], {}), 1),
    "max of three": (("Max", ["x", "y", "z"], {}), 1),
    "max of two": (("Max", ["x", "y"], {}), 0),
    "mean of four": (("Mean", ["x", "y", "z", "x"], {}), 3),
    "mean of one": (("Mean", ["x"], {}), 0),
    "min of three": (("Min", ["x", "y", "z"], {}), 1),
    "mish": (("Mish", ["x"], {}), 2),
    "sum of absolute values": (("ReduceL1", ["x", "axes"], {"keepdims": 0}), 1),
    "root of squares": (("ReduceL2", ["x", "axes"], {}), 1),
    "log of the sum of powers": (("ReduceLogSumExp", ["x"], {}), 2),
    "sum of four": (("Sum", ["x", "y", "z", "x"], {}), 2),
}


@pytest.mark.parametrize("case", CASES)
def test_a_divided_operator_computes_the_same(case, tmp_path):
    (operator, inputs, attributes), inside = CASES[case]
    before = [helper.make_node("Neg", ["x"], ["y"], "neg"), helper.make_node("Exp", ["x"], ["z"], "exp")]
    node = helper.make_node(operator, inputs, ["found"], "divided", **attributes)
    constants = {**WEIGHTS, "c": X[:2, :1], "axes": np.array([1])}
    graph = helper.make_graph(
        [*before, node],
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 6])],
        [helper.make_tensor_value_info("found", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items() if name in inputs],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)

    found, divided = entries(model, "entropy2", tmp_path)
    inner = [entry.value for entry in found if entry.value not in ("x", "y", "z", "found", None)]
    assert len(inner) == inside
    assert all(name.startswith("divided_") and name.endswith("_output") for name in inner)
    assert (divided is model) == (not inside)
    wanted = Observed(tmp_path, model, ["found"]).run({"x": X})["found"]
    run = Observed(tmp_path, divided, ["found", *inner]).run({"x": X})
    assert run.keys() == {"found", *inner}
    np.testing.assert_allclose(run["found"], wanted, rtol=1e-5, atol=1e-6)


def test_an_operator_whose_inner_value_would_take_a_name_of_the_network_stays_whole(tmp_path):
    nodes = [
        helper.make_node("Neg", ["x"], ["swish_output"], "neg"),
        helper.make_node("HardSwish", ["swish_output"], ["found"], "swish"),
    ]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 6]) for name in ("x", "found")]
    model = helper.make_model(helper.make_graph(nodes, "network", value[:1], value[1:]))
    found, divided = entries(model, "entropy2", tmp_path)
    assert [entry.name for entry in found] == ["x", "swish_output", "found"]
    assert divided is model


def test_entries_of_a_weight_that_two_norms_share(tmp_path):
    """PyTorch exports it through an Identity; TensorRT so named those of a network as ConvNeXt."""
    nodes = [
        node("Identity", ["n.weight"], ["m.weight"]),
        node("LayerNormalization", ["x", "n.weight"], ["a"]),
        node("LayerNormalization", ["a", "m.weight"], ["b"]),
    ]
    network = model(nodes, {"x": [2, 3, 4]}, {"b": [2, 3, 4]}, {"n.weight": X[0, :4]})
    found, _ = entries(network, "entropy2", tmp_path)
    constants = [entry.name for entry in found if entry.array is not None]
    assert constants == ["n.weight_output", "m.weight", "ONNXTRT_Broadcast_4_output"]
