"""Linear layers as convolutions: the same numbers, the same outputs, and what stays."""

import numpy as np
import onnx
import onnxruntime
import pytest

from calib.onnx.form import linear_as_convolution
from tests.calib.onnx.networks import model, node, weight

SHAPES = {"data": ["N", 3, 4, 5]}


def perceptron(first=None, **changes):
    """Two linear layers behind a flattened map; the first one's activation is an output as well."""
    generator = np.random.default_rng(2)
    nodes = [
        node("Flatten", ["data"], ["flat"]),
        first or node("Gemm", ["flat", "w", "b"], ["hidden"], transB=1),
        node("Clip", ["hidden", "", "six"], ["clipped"]),
        node("Gemm", ["clipped", "v"], ["out"]),
    ]
    weights = {
        "w": weight(generator, 7, 60),
        "b": weight(generator, 7, 1)[:, 0],
        "six": np.array(0.5, np.float32),
        "v": weight(generator, 7, 2),
        **changes,
    }
    outputs = {"clipped": ["N", 7], "out": ["N", 2]}
    return model(nodes, SHAPES, outputs, weights)


def kinds(made):
    return [item.op_type for item in made.graph.node]


def outputs(made, batch=3):
    data = np.random.default_rng(4).standard_normal((batch, 3, 4, 5)).astype(np.float32)
    return onnxruntime.InferenceSession(made.SerializeToString()).run(None, {"data": data})


EVERYTHING = {"flat", "clipped"}


@pytest.mark.parametrize("changes", [{}, {"b": np.ones((1, 7), np.float32)}, {"b": np.ones(1, np.float32)}])
def test_the_numbers_and_the_outputs_are_the_same(tmp_path, changes):
    given = perceptron(**changes)
    made = linear_as_convolution(given, EVERYTHING, tmp_path)
    assert kinds(made.model) == ["Conv", "Clip", "Flatten", "Conv", "Flatten"]
    onnx.checker.check_model(made.model, full_check=True)
    for found, expected in zip(outputs(made.model), outputs(given), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert made.maps == {"data": "flat", "hidden_map": "hidden", "clipped_map": "clipped", "out_map": "out"}
    assert kinds(given) == ["Flatten", "Gemm", "Clip", "Gemm"]


@pytest.mark.parametrize(
    "first",
    [
        node("Gemm", ["flat", "w", "b"], ["hidden"], transB=1, alpha=2.0),
        node("Gemm", ["flat", "w", "b"], ["hidden"], transB=1, beta=0.5),
        node("Gemm", ["flat", "w", "matrix"], ["hidden"], transB=1),
    ],
)
def test_what_is_no_linear_layer_stays(tmp_path, first):
    given = perceptron(first, matrix=np.ones((3, 7), np.float32))
    made = linear_as_convolution(given, EVERYTHING, tmp_path)
    assert kinds(made.model) == kinds(given)
    for found, expected in zip(outputs(made.model), outputs(given), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_layer_that_stays_in_float_stays_what_it_is(tmp_path):
    made = linear_as_convolution(perceptron(), {"clipped"}, tmp_path)
    assert kinds(made.model) == ["Flatten", "Gemm", "Clip", "Gemm"]


def test_rows_that_are_no_map_of_one_image_stay(tmp_path):
    nodes = [node("Reshape", ["data", "shape"], ["rows"]), node("Gemm", ["rows", "w"], ["out"], transB=1)]
    weights = {"shape": np.array([-1, 20]), "w": weight(np.random.default_rng(3), 2, 20)}
    given = model(nodes, SHAPES, {"out": ["M", 2]}, weights)
    assert kinds(linear_as_convolution(given, {"rows"}, tmp_path).model) == ["Reshape", "Gemm"]


def test_rows_of_a_sequence_before_the_batch_stay(tmp_path):
    # [L, N, heads, size] of attention becomes [L * N, heads * size], which for one image looks like a flattened map.
    nodes = [
        node("Transpose", ["data"], ["sequence"], perm=[2, 0, 1, 3]),
        node("Reshape", ["sequence", "shape"], ["rows"]),
        node("Gemm", ["rows", "w"], ["out"], transB=1),
    ]
    weights = {"shape": np.array([-1, 15]), "w": weight(np.random.default_rng(3), 2, 15)}
    given = model(nodes, SHAPES, {"out": ["M", 2]}, weights)
    assert kinds(linear_as_convolution(given, {"rows"}, tmp_path).model) == ["Transpose", "Reshape", "Gemm"]
