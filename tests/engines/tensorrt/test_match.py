"""Our table beside TensorRT's own."""

from pathlib import Path

import pytest
import torchvision
from hypothesis import given
from hypothesis import strategies as st

from calib.table import CalibrationTable
from calib.tracing import trace
from engines.tensorrt.match import Operation, compare, made_by, short_name
from models import LeNet
from models.small_resnet import SmallResNet

TABLES = Path(__file__).with_name("tables")
LENET = {
    "data": Operation("input"),
    "conv1": Operation("conv", "conv1"),
    "pool1": Operation("maxpool", "pool1"),
    "conv2": Operation("conv", "conv2"),
    "pool2": Operation("maxpool", "pool2"),
    "ip1": Operation("relu", "relu1"),
    "ip2": Operation("linear", "ip2"),
    "prob": Operation("softmax", "prob"),
}
OURS = CalibrationTable({name: 0.01 * (index + 1) for index, name in enumerate(LENET)})


def unnamed(number, layer):
    return f"(Unnamed Layer* {number}) [{layer}]_output"


def names(pairs):
    return [(pair.reference, pair.tensorrt) for pair in pairs]


def test_the_table_that_tensorrt_wrote_for_lenet():
    """By Torch-TensorRT 2.8.0's DataLoaderCalibrator over TensorRT 10.6.0 on an H100."""
    theirs = CalibrationTable.read(TABLES / "LeNet.torch_tensorrt.cache")
    pairs = compare(OURS, theirs, made_by(trace(LeNet(), "LeNet")))
    assert len(pairs) == len(theirs.scales)
    assert [(pair.reference, short_name(pair.tensorrt)) for pair in pairs if pair.reference] == [
        ("data", "input_0"),
        ("conv1", "conv1 _convolution"),
        ("pool1", "pool1 max_pool2d"),
        ("conv2", "conv2 _convolution"),
        ("pool2", "pool2 max_pool2d"),
        ("ip1", "relu1 relu"),
        ("ip2", "add"),
        ("prob", "output_0"),
    ]
    reasons = [pair.note.partition(":")[0] for pair in pairs if pair.reference is None]
    constant, product = "weights or biases", "a matrix product before its bias"
    assert reasons == [
        "a reshaped value",
        *(constant, constant, product, constant, constant),
        "a value before the ReLU that overwrites it",
        *(constant, constant, product, constant, constant),
    ]


@pytest.mark.parametrize(
    ("name", "model", "shape", "apart"),
    [
        ("SmallResNet", SmallResNet, (1, 28, 28), {}),
        ("resnet18", lambda: torchvision.models.resnet18(num_classes=10), (3, 224, 224), {"add_7": 0.953}),
    ],
)
def test_the_tables_that_tensorrt_wrote_for_residual_networks(name, model, shape, apart):
    """Beside ours of the same images, from the same runs of the commands on an H100 (TensorRT 10.6.0).

    Every tensor has its counterpart, and all scales agree but one, for which the search has two equally good candidates
    (docs/hardware.md).
    """
    ours = CalibrationTable.read(TABLES / f"{name}.reference.cache")
    theirs = CalibrationTable.read(TABLES / f"{name}.torch_tensorrt.cache")
    network = trace(model(), name, shape)
    pairs = compare(ours, theirs, made_by(network))
    assert [pair.reference for pair in pairs if pair.reference] == list(ours.scales)
    assert [pair.reference for pair in pairs if pair.reference and pair.tensorrt is None] == []
    assert [short_name(pair.tensorrt) for pair in pairs if pair.reference is None and not pair.note] == []
    for pair in pairs:
        if pair.reference:
            expected = apart.get(pair.reference, 1)
            assert pair.ratio == pytest.approx(expected, rel=1e-3 if pair.reference in apart else 2e-5), pair
    modules = {node.name: node.target for node in network.module.graph.nodes if node.op == "call_module"}
    theirs_of = {pair.reference: pair.tensorrt for pair in pairs if pair.tensorrt and "scope: " in pair.tensorrt}
    scoped = [(node, tensor) for node, tensor in network.observed.items() if node in modules and tensor in theirs_of]
    assert len(scoped) > 10
    for node, tensor in scoped:
        assert short_name(theirs_of[tensor]).split()[0] == modules[node]


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
    (pair,) = compare(zero, CalibrationTable({"input_0": 0.0}), {"data": Operation("input")})
    assert pair.ratio == 1
    (pair,) = compare(zero, CalibrationTable({"input_0": 0.5}), {"data": Operation("input")})
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
