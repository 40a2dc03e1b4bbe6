"""Which layers run in INT8, and with which scales."""

import logging

import pytest

from calib.network import Network
from calib.plan import plan_int8
from calib.table import CalibrationTable
from calib.tracing import trace
from common.errors import InputError
from models import LeNet


def table(network: Network, scale: float = 0.1) -> CalibrationTable:
    return CalibrationTable(dict.fromkeys(network.tensors, scale))


def test_plan_quantizes_the_inputs_of_every_layer_and_leaves_the_softmax() -> None:
    network = trace(LeNet())
    plan = plan_int8(network, table(network))
    assert plan.layers == {"conv1", "conv2", "ip1", "ip2"}
    assert set(plan.scales) == {"data", "pool1", "flatten", "relu1"}
    assert plan.output_scale is None
    assert plan_int8(network, table(network), quantize_output=True).layers == plan.layers | {"prob"}


def test_plan_keeps_layers_in_float_as_asked() -> None:
    network = trace(LeNet())
    plan = plan_int8(network, table(network), keep_fp=["conv1", "ip2"])
    assert plan.layers == {"conv2", "ip1"}
    assert set(plan.kept) == {"conv1", "ip2"}
    with pytest.raises(InputError, match="no layer 'conv9' in LeNet: choose from conv1, conv2"):
        plan_int8(network, table(network), keep_fp=["conv9"])


@pytest.mark.parametrize("scale", [0.0, 2.0**-140])
def test_a_scale_that_cannot_divide_leaves_its_readers_in_float(scale: float, caplog: pytest.LogCaptureFixture) -> None:
    network = trace(LeNet())
    scales = {**table(network).scales, "pool1": scale}
    with caplog.at_level(logging.WARNING, "calib"):
        plan = plan_int8(network, CalibrationTable(scales))
    assert plan.layers == {"conv1", "ip1", "ip2"}
    assert "conv2 stays in float: no scale for pool1" in caplog.text


def test_a_table_of_another_network_is_refused_and_foreign_names_are_named(caplog: pytest.LogCaptureFixture) -> None:
    network = trace(LeNet())
    with pytest.raises(InputError, match="belongs to another network"):
        plan_int8(network, CalibrationTable({"input_0": 0.1, "output_0": 0.1}))
    with caplog.at_level(logging.WARNING, "calib"):
        plan_int8(network, CalibrationTable({**table(network).scales, "conv77": 0.1}))
    assert "does not have: conv77" in caplog.text
