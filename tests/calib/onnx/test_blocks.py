"""Values in the blocks of channels in which ONNX Runtime computes convolutions on a CPU."""

import numpy as np
import pytest
import torch

from calib.onnx.observe import Observed
from common.errors import InputError
from tests.calib.onnx.networks import model, node, save, weight

X = np.random.default_rng(0).standard_normal((3, 3, 12, 12), dtype=np.float32)
VALUES = ["c", "r", "odd", "sum", "flat"]


@pytest.fixture
def network(tmp_path):
    """Of values with 32 channels, and with 5, which fill no block."""
    generator = np.random.default_rng(1)
    nodes = [
        node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        node("Relu", ["c"], ["r"]),
        node("Conv", ["r", "v"], ["odd"]),
        node("Conv", ["r", "u"], ["d"]),
        node("Add", ["r", "d"], ["sum"]),
        node("Flatten", ["sum"], ["flat"]),
    ]
    weights = {"w": weight(generator, 32, 3, 3, 3), "v": weight(generator, 5, 32, 1, 1)}
    weights["u"] = weight(generator, 32, 32, 1, 1)
    made = model(nodes, {"x": ["N", 3, 12, 12]}, {"odd": ["N", 5, 12, 12], "flat": ["N", 4608]}, weights)
    return save(made, tmp_path / "network.onnx"), made


def test_elements_are_the_same_in_another_order(network):
    path, made = network
    wanted = Observed(path, made, VALUES).run({"x": X})
    found = Observed(path, made, VALUES, in_order=["r"]).run({"x": X})
    assert list(found) == list(wanted) == VALUES
    for name in VALUES:
        assert torch.equal(found[name].flatten().sort()[0], wanted[name].flatten().sort()[0]), name
    for name in ("r", "odd", "flat"):
        assert torch.equal(found[name], wanted[name]), name


def test_a_network_that_cannot_be_written_is_run_as_it_is(network, monkeypatch):
    def full(*_):
        raise InputError("no space left")

    path, made = network
    monkeypatch.setattr("calib.onnx.observe.in_blocks", full)
    assert torch.equal(
        Observed(path, made, ["c"], in_order=[]).run({"x": X})["c"], Observed(path, made, ["c"]).run({"x": X})["c"]
    )
