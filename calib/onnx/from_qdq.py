"""The table of an ONNX network with quantize/dequantize pairs (Q/DQ), and the float network that it goes with.

Imports onnx inside functions: it is slow to load.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from calib.onnx.graph import ACTIVATIONS, RESHAPES, Graph
from calib.onnx.model import QUANTIZERS, constant, no_floats, replace_items
from calib.table import LEVELS
from common.errors import InputError

if TYPE_CHECKING:
    import onnx

_SAME_SCALE: Final = RESHAPES | {
    "DepthToSpace",
    "Dropout",
    "Expand",
    "MaxPool",
    "Pad",
    "SpaceToDepth",
    "Tile",
    "Transpose",
}


@dataclass(frozen=True)
class FromQdq:
    """What :func:`table_of_quantized` found.

    Attributes:
        scales: Tensor -> scale, in the network's order.
        asymmetric: Tensors whose zero point is not that of a symmetric range, which their scale here covers.
        unknown: Tensors that the pairs say nothing about.
        model: The float network that the table goes with: without the pairs, weights rounded as they were.
    """

    scales: Mapping[str, float]
    asymmetric: tuple[str, ...]
    unknown: tuple[str, ...]
    model: onnx.ModelProto


def table_of_quantized(model: onnx.ModelProto, path: Path) -> FromQdq:
    """The scales of a network that was trained with quantization, or quantized by another tool.

    A value that is quantized in several places takes the largest scale. Values without a pair take the scale of what
    they are reshaped or pooled from, or, where an activation alone reads them, that of the activation.

    Args:
        model: The network with pairs, as :func:`calib.onnx.model.read_model` reads it.
        path: Its file, in whose folder external weights lie.

    Raises:
        InputError: the network has no pairs around its values, or scales that are no constants or per channel.
    """
    quantizers = [node for node in model.graph.node if node.op_type in QUANTIZERS]
    if not quantizers:
        raise InputError(f"{path} has no quantize/dequantize operators: python -m calib calibrate makes its table")
    graph = Graph(model)
    scales: dict[str, float] = {}
    asymmetric: dict[str, None] = {}
    for node in quantizers:
        if node.op_type != "QuantizeLinear" or node.input[0] in graph.constant:
            continue
        scale = _constant(model, node, 1, path)
        zero = _constant(model, node, 2, path) if len(node.input) > 2 and node.input[2] else np.array(0, np.uint8)
        if scale.size != 1 or zero.size != 1:
            raise InputError(f"{path}: {node.input[0]!r} is quantized per channel, which no calibration table can hold")
        if zero.dtype not in (np.int8, np.uint8):
            raise InputError(f"{path}: {node.input[0]!r} is quantized to {zero.dtype}, and a table is of int8")
        offset = int(zero.item()) - (128 if zero.dtype == np.uint8 else 0)
        if offset:
            asymmetric.setdefault(node.input[0])
        found = float(scale.item()) * (LEVELS + abs(offset)) / LEVELS
        averaged = _averaged_codes(graph, node.input[0]) if found == 1 else None
        found = scales.get(averaged or "", found)
        scales[node.input[0]] = max(found, scales.get(node.input[0], 0.0))
    if not scales:
        raise InputError(f"{path} quantizes its weights alone, and no value that a table could name")
    stripped = _without_pairs(model, path)
    graph = Graph(stripped)
    _spread(graph, scales)
    tensors = [*graph.inputs, *(name for node in graph.nodes for name in node.output if name not in graph.constant)]
    ordered = {name: scales[name] for name in tensors if name in scales}
    others = no_floats(stripped)
    unknown = tuple(name for name in tensors if name and name not in scales and name not in others)
    return FromQdq(ordered, tuple(name for name in asymmetric if name in ordered), unknown, stripped)


def _averaged_codes(graph: Graph, value: str) -> str | None:
    """The value whose codes an average pooling reads that makes ``value``: written so, it computes with scale 1."""
    kinds = iter(("AveragePool", "DequantizeLinear", "QuantizeLinear"))
    wanted = next(kinds)
    while (node := graph.producer.get(value)) is not None and node.op_type in (wanted, "Pad"):
        value = node.input[0]
        if node.op_type == "QuantizeLinear":
            return value
        if node.op_type != "Pad":
            wanted = next(kinds)
    return None


def _constant(model: onnx.ModelProto, node: onnx.NodeProto, slot: int, path: Path) -> NDArray[Any]:
    array = constant(model, node.input[slot], path.parent)
    if array is None:
        raise InputError(f"{path}: the scale or zero point of {node.input[0]!r} is no constant")
    return array


def _spread(graph: Graph, scales: dict[str, float]) -> None:
    """Give values without a scale the one that their neighbours determine, until nothing changes."""
    changed = True
    while changed:
        changed = False
        for node in graph.nodes:
            if not node.input or not node.output:
                continue
            source, result = node.input[0], node.output[0]
            if source in graph.constant or not result:
                continue
            if node.op_type in _SAME_SCALE and source in scales and result not in scales:
                scales[result], changed = scales[source], True
            moved = node.op_type in _SAME_SCALE or (node.op_type in ACTIVATIONS and graph.sole_reader(source) is node)
            if moved and result in scales and source not in scales:
                scales[source], changed = scales[result], True


def _without_pairs(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """The float network: values are read directly, weights are what they were rounded to."""
    import onnx

    result = onnx.ModelProto()
    result.CopyFrom(model)
    producer = {name: node for node in result.graph.node for name in node.output}
    outputs = {value.name for value in result.graph.output}
    direct: dict[str, str] = {}
    nodes = []
    for node in result.graph.node:
        if node.op_type == "QuantizeLinear":
            direct[node.output[0]] = direct.get(node.input[0], node.input[0])
        elif node.op_type == "DequantizeLinear":
            source = direct.get(node.input[0])
            if source is None or (source not in producer and _is_weight(result, source)):
                weight = _rounded(model, node, source, path)
                result.graph.initializer.append(onnx.numpy_helper.from_array(weight, node.output[0]))
            elif node.output[0] in outputs:
                nodes.append(onnx.helper.make_node("Identity", [source], [node.output[0]], node.name))
            else:
                direct[node.output[0]] = source
        else:
            nodes.append(node)
    for node in nodes:
        node.input[:] = [direct.get(name, name) for name in node.input]
    replace_items(result.graph.node, nodes)
    read = {name for node in result.graph.node for name in node.input} | outputs
    replace_items(result.graph.initializer, [weight for weight in result.graph.initializer if weight.name in read])
    return result


def _is_weight(model: onnx.ModelProto, name: str) -> bool:
    return any(weight.name == name for weight in model.graph.initializer)


def _rounded(model: onnx.ModelProto, node: onnx.NodeProto, source: str | None, path: Path) -> NDArray[Any]:
    """The value of a weight behind its DequantizeLinear: of int8 codes, or of a float weight that is quantized."""
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
    scale = _constant(model, node, 1, path)
    zero = _constant(model, node, 2, path) if len(node.input) > 2 and node.input[2] else np.array(0, np.uint8)
    array = constant(model, source or node.input[0], path.parent)
    if array is None:
        raise InputError(f"{path}: {node.input[0]!r} is dequantized, and is neither a weight nor quantized before")
    if scale.size > 1:
        shape = [-1 if other == axis % array.ndim else 1 for other in range(array.ndim)]
        scale, zero = scale.reshape(shape), zero.reshape(shape) if zero.size > 1 else zero
    offset = zero.astype(np.float32)
    if source is not None:
        limits = np.iinfo(zero.dtype)
        array = np.clip(np.rint(array / scale) + offset, limits.min, limits.max)
    rounded: NDArray[Any] = ((array.astype(np.float32) - offset) * scale).astype(scale.dtype)
    return rounded
