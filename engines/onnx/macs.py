"""What a plan makes of a network's multiply-accumulates, counted on its ONNX export."""

from __future__ import annotations

import logging

from calib.network import Network
from calib.onnx.macs import count_macs
from calib.plan import Int8Plan, plan_int8
from calib.table import CalibrationTable
from common.config import QuantizationConfig
from common.errors import InputError
from common.macs import MacCount
from engines.base import Compiled
from engines.onnx.int8 import int8_model

logger = logging.getLogger(__name__)


def exported_macs(plan: Int8Plan) -> MacCount:
    """Export the network with quantize/dequantize pairs, and count what they make INT8.

    An engine that builds from the same pairs may still choose float for a layer.

    Args:
        plan: Of a network traced with an ``input_shape``.

    Raises:
        InputError: the network cannot be exported.
    """
    return count_macs(int8_model(plan), "in its ONNX form with quantize/dequantize pairs", plan.kept)


def macs_of(
    compiled: Compiled, network: Network, table: CalibrationTable, quantization: QuantizationConfig
) -> MacCount | None:
    """What INT8 multiplies in INT8: as its engine executes it, else as its ONNX form says.

    Args:
        compiled: The network in INT8.
        network: What it was compiled from.
        table: Likewise.
        quantization: Likewise.

    Returns:
        None where the network cannot be exported.
    """
    if compiled.macs is not None:
        return compiled.macs
    try:
        return exported_macs(plan_int8(network, table, quantization.keep_fp, quantization.quantize_output))
    except InputError as error:
        logger.warning("multiply-accumulates are not counted: %s", error)
        return None
