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

from calib.onnx.graph import ACTIVATIONS, RESHAPES, Graph, dequantizer
from calib.onnx.model import (
    QUANTIZERS,
    attributes,
    constant,
    drop_unread,
    free_name,
    integer_operators,
    no_floats,
    replace_items,
    values_read,
)
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

_POSITIVE: Final = frozenset({"Abs", "Exp", "HardSigmoid", "Relu", "Sigmoid", "Softmax", "Sqrt"})
"""Operators whose result is never below zero."""

_KEEPS_SIGN: Final = (
    _SAME_SCALE | QUANTIZERS | {"AveragePool", "Gather", "GlobalAveragePool", "Resize", "Slice", "Split"}
)
"""Operators whose result is not below zero where the first value that they read is not."""

_JOINS: Final = frozenset({"Add", "Concat", "Max", "Mul", "Sum"})
"""The same of all values that they read."""


@dataclass(frozen=True)
class FromQdq:
    """What :func:`table_of_quantized` found.

    Attributes:
        scales: Tensor -> scale, in the network's order.
        asymmetric: Tensors whose zero point is not that of a symmetric range, which their scale here covers.
        unknown: Tensors that the pairs say nothing about.
        model: The float network that the table goes with: without the pairs, weights rounded as they were, and a ReLU
            where only the codes, which begin at zero, kept a value from being negative.
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
    if integers := integer_operators(model):
        raise InputError(f"{path} computes on integers ({', '.join(integers)}): quantize it in the Q/DQ format instead")
    if not any(node.op_type in QUANTIZERS for node in model.graph.node):
        raise InputError(f"{path} has no quantize/dequantize operators: python -m calib calibrate makes its table")
    scales, asymmetric, clamped = _scales_of_pairs(model, path)
    clamping = _with_relus(model, clamped, path)
    names = _name_by_outputs(clamping)
    stripped = _without_pairs(clamping, path)
    scales = {names.get(value, value): scale for value, scale in scales.items()}
    asymmetric = [names.get(value, value) for value in asymmetric]
    if not scales:
        raise InputError(f"{path} quantizes its weights alone, and no value that a table could name")
    graph = Graph(stripped)
    _spread(graph, scales)
    tensors = [*graph.inputs, *(name for node in graph.nodes for name in node.output if name not in graph.constant)]
    ordered = {name: scales[name] for name in tensors if name in scales}
    others = no_floats(stripped)
    unknown = tuple(name for name in tensors if name and name not in scales and name not in others)
    return FromQdq(ordered, tuple(name for name in asymmetric if name in ordered), unknown, stripped)


def _scales_of_pairs(model: onnx.ModelProto, path: Path) -> tuple[dict[str, float], list[str], set[str]]:
    """The scales of values that are quantized, those of an asymmetric range, and those that have no code below 0."""
    graph = Graph(model)
    scales: dict[str, float] = {}
    lowest_codes: dict[str, int] = {}
    asymmetric: list[str] = []
    for node in model.graph.node:
        if node.op_type != "QuantizeLinear" or node.input[0] in graph.constant:
            continue
        value = node.input[0]
        scale = _constant(model, node, 1, path)
        if scale.size != 1:
            raise InputError(f"{path}: {value!r} is quantized per channel, which no calibration table can hold")
        lowest, highest = _codes(model, graph, node, path)
        # int8 has one code more below zero than above, which a symmetric range leaves out.
        largest = max(highest, -lowest - 1)
        if largest > LEVELS and value not in asymmetric:
            asymmetric.append(value)
        found = float(scale.item()) * largest / LEVELS
        averaged = _averaged_codes(graph, value) if found == 1 else None
        found = scales.get(averaged or "", found)
        scales[value] = max(found, scales.get(value, found))
        lowest_codes[value] = min(lowest, lowest_codes.get(value, lowest))
    return scales, asymmetric, {value for value, lowest in lowest_codes.items() if lowest == 0}


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


def _codes(model: onnx.ModelProto, graph: Graph, node: onnx.NodeProto, path: Path) -> tuple[int, int]:
    """The lowest and highest code that a QuantizeLinear gives, and a Clip behind it leaves, less the zero point."""
    import onnx

    kind = attributes(node).get("output_dtype", onnx.TensorProto.UINT8)
    zero = np.zeros((), onnx.helper.tensor_dtype_to_np_dtype(kind))
    if len(node.input) > 2 and node.input[2]:
        zero = _constant(model, node, 2, path)
    if zero.dtype not in (np.int8, np.uint8):
        raise InputError(f"{path}: {node.input[0]!r} is quantized to {zero.dtype}, and a table is of int8")
    limits = np.iinfo(zero.dtype)
    lowest, highest = int(limits.min), int(limits.max)
    clip = graph.sole_reader(node.output[0])
    if clip is not None and clip.op_type == "Clip":
        bounds = [*clip.input[1:], "", ""]
        lowest = max(lowest, int(_constant(model, clip, 1, path).item())) if bounds[0] else lowest
        highest = min(highest, int(_constant(model, clip, 2, path).item())) if bounds[1] else highest
    return lowest - int(zero.item()), highest - int(zero.item())


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


def _with_relus(model: onnx.ModelProto, clamped: set[str], path: Path) -> onnx.ModelProto:
    """The network with a ReLU for each of the ``clamped`` values that could be below zero without their pairs.

    ONNX Runtime's quantizer leaves out a ReLU whose result it quantizes to codes from zero up, which clamp as well.
    """
    import onnx

    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = Graph(result)
    taken = {*graph.producer, *graph.constant, *graph.inputs}
    positive: set[str] = set()
    nodes: list[onnx.NodeProto] = []
    for node in graph.nodes:
        nodes.append(node)
        read = [*filter(None, node.input)]
        kept = read if node.op_type in _JOINS else read[:1] if node.op_type in _KEEPS_SIGN else []
        if node.op_type in _POSITIVE or (kept and positive.issuperset(kept)) or _stops_at_zero(model, node, path):
            positive.update(node.output)
        for index, value in enumerate(node.output):
            quantized = all(reader.op_type == "QuantizeLinear" for reader in graph.readers.get(value, ()))
            if value not in clamped or value in positive or not quantized or value in graph.outputs:
                continue
            node.output[index] = free_name(f"{value}_before_relu", taken)
            nodes.append(onnx.helper.make_node("Relu", [node.output[index]], [value], f"{value}_Relu"))
            positive.add(value)
    replace_items(result.graph.node, nodes)
    return result


def _stops_at_zero(model: onnx.ModelProto, node: onnx.NodeProto, path: Path) -> bool:
    """Whether an activation gives nothing below zero, by its parameters."""
    given = attributes(node)
    if node.op_type == "LeakyRelu":  # as a ReLU is written for ONNX Runtime's integer kernels
        return given.get("alpha") == 0
    lowest = given.get("min") if node.op_type == "Clip" else None
    if node.op_type == "Clip" and any(node.input[1:2]):
        lowest = constant(model, node.input[1], path.parent)
    return lowest is not None and bool(np.all(np.asarray(lowest) >= 0))


def _name_by_outputs(model: onnx.ModelProto) -> dict[str, str]:
    """Put outputs in front of the pairs that give them, in place, as the network before quantization has them.

    Returns:
        Value in front of such a pair -> the output whose name it has now.
    """
    graph = Graph(model)
    taken = {*graph.producer, *graph.constant, *graph.inputs}
    names: dict[str, str] = {}
    kept = graph.outputs | _read_inside(graph)
    for node in graph.nodes:
        codes = graph.producer.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        value = codes.input[0] if codes is not None and codes.op_type == "QuantizeLinear" else ""
        output = node.output[0]
        if output in graph.outputs and value in graph.producer and value not in kept:
            kept.add(value)
            names[value] = output
            names[output] = free_name(f"{output}_dequantized", taken)
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    return names


def _without_pairs(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """The float network: values are read directly, weights are what they were rounded to."""
    import onnx

    result = onnx.ModelProto()
    result.CopyFrom(model)
    for node in result.graph.node:
        dequantized = dequantizer(node)
        if node.op_type == "If" and dequantized is not None:
            chosen = onnx.helper.make_node("DequantizeLinear", dequantized.input, node.output, node.name)
            chosen.attribute.extend(dequantized.attribute)
            node.CopyFrom(chosen)
    graph = Graph(result)
    constants, named = graph.constant, graph.outputs | _read_inside(graph)
    direct: dict[str, str] = {}  # codes, or what they are dequantized to -> the value
    codes: set[str] = set()
    nodes = []
    for node in result.graph.node:
        source = direct.get(node.input[0]) if node.input else None
        if node.op_type == "QuantizeLinear" or (node.op_type == "Clip" and node.input[0] in codes):
            direct[node.output[0]] = source or node.input[0]
            codes.add(node.output[0])
            if node.output[0] in graph.outputs:  # codes, which become values under the same name
                nodes.append(onnx.helper.make_node("Identity", [direct[node.output[0]]], [node.output[0]], node.name))
        elif node.op_type != "DequantizeLinear":
            if node.op_type in _SAME_SCALE and node.input[0] in codes:  # moves values now
                direct[node.output[0]] = node.output[0]
                codes.add(node.output[0])
                if node.op_type == "Pad" and len(node.input) > 2:
                    node.input[2] = ""  # from the codes' zero point to 0
            nodes.append(node)
        elif (weight := _weight(result, node, constants, path)) is not None:
            result.graph.initializer.append(onnx.numpy_helper.from_array(weight, node.output[0]))
        elif source is None:
            raise InputError(
                f"{path}: {node.input[0]!r} is dequantized, and is neither a weight nor quantized before: give the "
                "network float inputs"
            )
        elif node.output[0] in named:
            nodes.append(onnx.helper.make_node("Identity", [source], [node.output[0]], node.name))
        else:
            direct[node.output[0]] = source
    for node in nodes:
        node.input[:] = [direct.get(name, name) for name in node.input]
    for value in result.graph.output:
        if value.name in codes:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    replace_items(result.graph.node, nodes)
    drop_unread(result.graph)
    return result


def _read_inside(graph: Graph) -> set[str]:
    """What the graphs inside of nodes read, as If's branches, where no name is replaced."""
    return {name for node in graph.nodes for name in values_read(node) if name not in node.input}


def _weight(model: onnx.ModelProto, node: onnx.NodeProto, constants: set[str], path: Path) -> NDArray[Any] | None:
    """What a DequantizeLinear makes of a weight, be it stored as codes or quantized in the network; None of a value."""
    return constant(model, node.output[0], path.parent) if node.output[0] in constants else None
