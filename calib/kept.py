"""Layers kept in float: whether they are layers, and what they leave to INT8."""

from __future__ import annotations

import logging

from calib.network import Network
from calib.plan import Int8Plan, plan_int8
from calib.table import CalibrationTable
from common.config import QuantizationConfig
from common.macs import MacCount

logger = logging.getLogger(__name__)


def plan_without_scales(network: Network, quantization: QuantizationConfig) -> Int8Plan:
    """What runs in INT8, for questions whose answer does not depend on the scales: all are 1.

    Raises:
        InputError: a layer to be kept in float is no layer of the network.
    """
    scales = CalibrationTable(dict.fromkeys(network.tensors, 1.0))
    return plan_int8(network, scales, quantization.keep_fp, quantization.quantize_output)


def check_layers(network: Network, quantization: QuantizationConfig) -> None:
    """Check the names of the layers to keep in float; raises as :func:`plan_without_scales` does."""
    plan_without_scales(network, quantization)


def warn_of_little_int8(network: Network, quantization: QuantizationConfig, macs: MacCount | None) -> None:
    """Say so where every layer that could run in INT8 is kept in float, or else where little is multiplied in INT8.

    Args:
        network: The float network.
        quantization: Layers kept in float.
        macs: What is multiplied in INT8; None where it was not counted.
    """
    able = {layer.name for layer in network.layers if layer.kind != "softmax" or quantization.quantize_output}
    if able <= set(quantization.keep_fp):
        logger.warning("no layer of %s is left in INT8: what is prepared as INT8 computes in float", network.name)
    elif macs is not None and (warning := macs.warning()) is not None:
        logger.warning("%s", warning)
