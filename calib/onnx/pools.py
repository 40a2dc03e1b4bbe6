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


def pad_in_front(model: onnx.ModelProto) -> None:
    """Let no average pooling with ``ceil_mode`` count padding, in place; the numbers stay the same.

    Windows that hang over the padded border are divided by what lies within it. ONNX Runtime's integer kernel divides
    them by the whole window where padding counts (1.30; its float kernel does not). Padding goes into an operator in
    front, behind which the pooling is computed in float.
    """
    import onnx
    from onnx import numpy_helper

    graph = model.graph
    taken = {name for node in graph.node for name in (*node.input, *node.output)} | {node.name for node in graph.node}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        settings = attributes(node)
        if node.op_type == "AveragePool" and settings.get("ceil_mode") and settings.get("count_include_pad"):
            kept = [item for item in node.attribute if item.name not in ("count_include_pad", "pads")]
            pads = settings.get("pads", [])
            if any(pads):
                begin, end = pads[: len(pads) // 2], pads[len(pads) // 2 :]
                amounts = free_name(f"{node.name}_pads", taken)
                padded = free_name(f"{node.input[0]}_padded", taken)
                graph.initializer.append(numpy_helper.from_array(np.array([0, 0, *begin, 0, 0, *end]), amounts))
                nodes.append(onnx.helper.make_node("Pad", [node.input[0], amounts], [padded], f"{node.name}_Pad"))
                node.input[0] = padded
            replace_items(node.attribute, kept)
        nodes.append(node)
    replace_items(graph.node, nodes)


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
