"""Average pooling between quantize/dequantize pairs, written so that its codes are the same wherever it is computed.

Imports onnx inside functions: it is slow to load.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from calib.onnx.graph import Graph
from calib.onnx.model import attributes, free_name, replace_items

if TYPE_CHECKING:
    import onnx


def pad_in_front(model: onnx.ModelProto, codes: bool = False) -> None:
    """Let no average pooling with ``ceil_mode`` count padding, in place; the numbers stay the same.

    Windows that hang over the padded border are divided by what lies within it. ONNX Runtime's integer kernel divides
    them by the whole window where padding counts (1.32; its float kernel does not). Padding goes into an operator in
    front.

    Args:
        model: Its nodes have names.
        codes: Pad what is dequantized, not the values: before 1.32, ONNX Runtime takes zeros in front of a pooling back
            into it. TensorRT has no kernel for codes.
    """
    import onnx
    from onnx import numpy_helper

    graph = Graph(model)
    taken = {*graph.producer, *graph.weights, *graph.inputs} | {node.name for node in graph.nodes}
    nodes: list[onnx.NodeProto] = []
    for node in graph.nodes:
        settings = attributes(node)
        if node.op_type == "AveragePool" and settings.get("ceil_mode") and settings.get("count_include_pad"):
            kept = [item for item in node.attribute if item.name not in ("count_include_pad", "pads")]
            replace_items(node.attribute, kept)
            pads = settings.get("pads", [])
            if any(pads):
                begin, end = pads[: len(pads) // 2], pads[len(pads) // 2 :]
                amounts = free_name(f"{node.name}_pads", taken)
                model.graph.initializer.append(numpy_helper.from_array(np.array([0, 0, *begin, 0, 0, *end]), amounts))
                pad = onnx.helper.make_node("Pad", [node.input[0], amounts], [""], f"{node.name}_Pad")
                pad.output[0] = node.input[0] = free_name(f"{node.input[0]}_padded", taken)
                before = graph.producer.get(pad.input[0])
                if codes and before is not None and before.op_type == "DequantizeLinear":
                    nodes.extend(_before_dequantizing(pad, before, taken))
                else:
                    nodes.append(pad)
        nodes.append(node)
    replace_items(model.graph.node, nodes)


def _before_dequantizing(pad: onnx.NodeProto, before: onnx.NodeProto, taken: set[str]) -> list[onnx.NodeProto]:
    """Padding of codes with their zero point, and their dequantizing, instead of padding behind ``before``."""
    import onnx

    behind = onnx.NodeProto()
    behind.CopyFrom(before)
    behind.name, behind.output[0] = f"{pad.name}_dequantized", pad.output[0]
    pad.input[0] = before.input[0]
    pad.input.append(before.input[2])
    pad.output[0] = behind.input[0] = free_name(f"{pad.input[0]}_padded", taken)
    return [pad, behind]


def average_codes(model: onnx.ModelProto) -> None:
    """Let average pooling between two pairs of the same scale compute as if that were 1, in place.

    The mean of an even number of codes is often the middle between two. Sums of whole numbers are exact, so that it is
    rounded to even, as TensorRT rounds it; with another scale, the last bits of float32 decide, and kernels differ.
    """
    import onnx
    from onnx import numpy_helper

    graph = Graph(model)
    scales = {name: numpy_helper.to_array(item) for name, item in graph.weights.items() if not item.dims}
    taken = {*graph.producer, *graph.weights, *graph.inputs}
    one = free_name("scale_of_codes", taken)
    nodes: list[onnx.NodeProto] = []
    for node in graph.nodes:
        before = graph.producer.get(node.input[0]) if node.op_type == "AveragePool" else None
        behind = graph.sole_reader(node.output[0])
        if before is not None and behind is not None and _is_pair(before, behind, scales):
            codes = onnx.NodeProto()
            codes.CopyFrom(before)
            codes.name, codes.input[1] = f"{node.name}_codes", one
            codes.output[0] = node.input[0] = free_name(f"{node.input[0]}_codes", taken)
            behind.input[1] = one
            nodes.append(codes)
        nodes.append(node)
    if len(nodes) > len(graph.nodes):
        read = {name for node in nodes for name in node.input} | graph.outputs
        replace_items(model.graph.node, [node for node in nodes if not read.isdisjoint(node.output)])
        model.graph.initializer.append(numpy_helper.from_array(np.array(1, np.float32), one))


def _is_pair(before: onnx.NodeProto, behind: onnx.NodeProto, scales: Mapping[str, NDArray[Any]]) -> bool:
    """Whether what stands before and behind an operator dequantizes and quantizes with one scale."""
    if (before.op_type, behind.op_type) != ("DequantizeLinear", "QuantizeLinear"):
        return False
    return scales.get(before.input[1]) == scales.get(behind.input[1])
