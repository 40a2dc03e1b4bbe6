"""What a plan makes of a network's multiply-accumulates, counted on its ONNX export."""

from __future__ import annotations

from calib.onnx_macs import count_macs
from calib.plan import Int8Plan
from common.macs import MacCount
from engines.onnx_export import int8_model


def exported_macs(plan: Int8Plan) -> MacCount:
    """Export the network with quantize/dequantize pairs, and count what they make INT8.

    An engine that builds from the same pairs may still choose float for a layer.

    Args:
        plan: Of a network traced with an ``input_shape``.

    Raises:
        InputError: the network cannot be exported.
    """
    return count_macs(int8_model(plan), "in its ONNX form with quantize/dequantize pairs", plan.kept)
