"""Our table beside TensorRT's own."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calib.counterparts import compare
from calib.table import CalibrationTable

LENET = {
    "data": "input",
    "conv1": "conv",
    "pool1": "maxpool",
    "conv2": "conv",
    "pool2": "maxpool",
    "ip1": "relu",
    "ip2": "linear",
    "prob": "softmax",
}
OURS = CalibrationTable({name: 0.01 * (index + 1) for index, name in enumerate(LENET)})


def unnamed(number, layer):
    return f"(Unnamed Layer* {number}) [{layer}]_output"


def names(pairs):
    return [(pair.reference, pair.tensorrt) for pair in pairs]


def test_lenet_through_the_torchscript_front_end():
    theirs = CalibrationTable(
        {
            "input_0": 0.011,
            unnamed(0, "Convolution"): 0.02,
            unnamed(1, "Pooling"): 0.03,
            unnamed(2, "Convolution"): 0.04,
            unnamed(3, "Pooling"): 0.05,
            unnamed(4, "Shuffle"): 0.05,
            unnamed(6, "Matrix Multiply"): 0.5,
            unnamed(8, "ElementWise"): 0.6,
            unnamed(9, "Activation"): 0.06,
            unnamed(11, "Matrix Multiply"): 0.9,
            unnamed(13, "ElementWise"): 0.07,
            "output_0": 0.08,
        }
    )
    pairs = compare(OURS, theirs, LENET)
    assert [pair for pair in names(pairs) if None not in pair] == [
        ("data", "input_0"),
        ("conv1", unnamed(0, "Convolution")),
        ("pool1", unnamed(1, "Pooling")),
        ("conv2", unnamed(2, "Convolution")),
        ("pool2", unnamed(3, "Pooling")),
        ("ip1", unnamed(9, "Activation")),
        ("ip2", unnamed(13, "ElementWise")),
        ("prob", "output_0"),
    ]
    assert [pair.tensorrt for pair in pairs if pair.reference is None] == [
        unnamed(4, "Shuffle"),
        unnamed(6, "Matrix Multiply"),
        unnamed(8, "ElementWise"),
        unnamed(11, "Matrix Multiply"),
    ]
    assert pairs[0].ratio == pytest.approx(1.1)


def test_the_numbers_in_the_names_give_the_order_not_the_file():
    theirs = CalibrationTable(
        {"output_0": 0.08, unnamed(2, "Convolution"): 0.04, unnamed(0, "Convolution"): 0.02, "input_0": 0.01}
    )
    pairs = {pair.reference: pair.tensorrt for pair in compare(OURS, theirs, LENET)}
    assert pairs["data"] == "input_0"
    assert pairs["conv1"] == unnamed(0, "Convolution")
    assert pairs["conv2"] == unnamed(2, "Convolution")
    assert pairs["prob"] == "output_0"
    assert pairs["ip1"] is None


def test_a_table_by_our_own_names_pairs_them_all():
    pairs = compare(OURS, OURS, LENET)
    assert all(pair.reference == pair.tensorrt and pair.ratio == 1 for pair in pairs)


def test_a_tensor_that_was_zero_in_both_agrees():
    zero = CalibrationTable({"data": 0.0})
    (pair,) = compare(zero, CalibrationTable({"input_0": 0.0}), {"data": "input"})
    assert pair.ratio == 1
    (pair,) = compare(zero, CalibrationTable({"input_0": 0.5}), {"data": "input"})
    assert pair.ratio is None


LAYERS = st.sampled_from(["Convolution", "Pooling", "ElementWise", "Activation", "SoftMax", "Shuffle", "odd: name"])


@given(st.lists(LAYERS, min_size=1, max_size=12), st.booleans())
def test_every_tensor_appears_once_and_in_order(layers, ends):
    scales = {unnamed(number, layer): 0.1 for number, layer in enumerate(layers)}
    theirs = CalibrationTable({"input_0": 0.1, **scales, **({"output_0": 0.1} if ends else {})})
    pairs = compare(OURS, theirs, LENET)
    assert [pair.reference for pair in pairs if pair.reference] == list(OURS.scales)
    assert [pair.tensorrt for pair in pairs if pair.tensorrt] == list(theirs.scales)
    assert ("data", "input_0") in names(pairs)
