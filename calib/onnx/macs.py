"""What an ONNX network multiplies, counted on the graph as it is written, with its quantize/dequantize operators.

A convolution or matrix product counts as INT8 where both operands come out of a DequantizeLinear, as they are or
through operators that only move or choose values: these are the patterns that TensorRT and ONNX Runtime replace by
integer kernels. Operators that take integers themselves (QLinearConv, MatMulInteger, ...) count as INT8, too.

Imports onnx inside functions: it is slow to load.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from calib.onnx.external import loadable
from calib.onnx.graph import RESHAPES, Graph, dequantizer
from calib.onnx.model import inner_graphs, subgraph_nodes, value_shapes
from common.macs import LayerMacs, MacCount

if TYPE_CHECKING:
    import onnx

_OPERANDS: Final[Mapping[str, tuple[int, int]]] = {
    "Conv": (0, 1),
    "ConvTranspose": (0, 1),
    "Gemm": (0, 1),
    "MatMul": (0, 1),
    "Einsum": (0, 1),
    "DeformConv": (0, 1),
    "LSTM": (0, 1),
    "GRU": (0, 1),
    "RNN": (0, 1),
    "ConvInteger": (0, 1),
    "MatMulInteger": (0, 1),
    "QLinearConv": (0, 3),
    "QLinearMatMul": (0, 3),
}
"""Operator -> positions of the two operands among its inputs."""

_INTEGER: Final = frozenset({"ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul"})
_RECURRENT: Final = frozenset({"LSTM", "GRU", "RNN"})
_ALWAYS_FLOAT: Final = _RECURRENT | {"DeformConv"}
"""Operators for which there is no integer kernel, whatever is quantized around them."""
_OPAQUE: Final = frozenset({"Attention"})
"""Operators that multiply, and whose inner products are not counted here."""

_MOVES: Final = RESHAPES | {
    "Concat",
    "DepthToSpace",
    "Expand",
    "Gather",
    "Identity",
    "MaxPool",
    "Pad",
    "Slice",
    "SpaceToDepth",
    "Split",
    "Tile",
    "Transpose",
}


def count_macs(
    model: onnx.ModelProto,
    source: str,
    reasons: Mapping[str, str] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> MacCount:
    """Count a network's multiply-accumulates, in INT8 and in float.

    Args:
        model: The network; external weights need not be there.
        source: What it is, for people.
        reasons: Layer -> why it is in float, where more is known than that it is.
        shapes: Input -> shape to count for; a free first dimension counts as 1 where it is not given.

    Raises:
        InputError: the shapes of the graph contradict each other.
    """
    sizes = value_shapes(model, shapes or {})
    graph = Graph(model)
    unknown = {
        value
        for _, node in products(graph)
        if _macs(node, sizes) is None
        for value in (*(node.input[slot] for slot in _OPERANDS[node.op_type]), _result(node))
    }
    if unknown:
        sizes |= _observed_shapes(model, unknown, sizes)
    layers: list[LayerMacs] = []
    uncounted = [node.name or node.op_type for node in subgraph_nodes(model) if _multiplies(node)]
    uncounted += [node.name or node.op_type for node in graph.nodes if node.op_type in _OPAQUE]
    for name, node in products(graph):
        macs = _macs(node, sizes)
        if macs is None:
            uncounted.append(name)
            continue
        missing = [] if node.op_type in _INTEGER else _in_float(node, graph)
        reason = (reasons or {}).get(name) or " and ".join(missing)
        layers.append(LayerMacs(name, node.op_type, macs, not missing, reason if missing else "", planned=not missing))
    return MacCount(source, layers, uncounted)


def products(graph: Graph) -> Iterator[tuple[str, onnx.NodeProto]]:
    """The convolutions and matrix products that depend on an input, each with its layer's name."""
    for node in graph.nodes:
        if node.op_type in _OPERANDS and _result(node) not in graph.constant:
            yield _layer(node, graph), node


def _observed_shapes(
    model: onnx.ModelProto, values: set[str], sizes: Mapping[str, list[int | None]]
) -> dict[str, list[int | None]]:
    """Value -> shape, seen in a run on zeros: shape inference does not compute sizes that the network computes itself.

    Empty where the network does not run on them: an input of a free size, weights elsewhere, no ONNX Runtime.
    """
    import numpy as np
    import onnx

    run = onnx.ModelProto()
    run.CopyFrom(model)
    outputs = {value.name for value in run.graph.output}
    wanted = sorted(values - {value.name for value in run.graph.input} - Graph(model).constant)
    run.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in wanted if name not in outputs)
    try:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are raised as well
        with loadable(run) as source:
            session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        inputs = {value.name: sizes[value.name] for value in session.get_inputs()}
        types = {value.name: value.type.tensor_type.elem_type for value in run.graph.input}
        zeros = {
            name: np.zeros(_known(shape), onnx.helper.tensor_dtype_to_np_dtype(types[name]))
            for name, shape in inputs.items()
        }
        found = session.run(wanted, zeros)
    except Exception:  # noqa: BLE001 - what ONNX Runtime raises has no base class of its own
        return {}
    return {name: list(array.shape) for name, array in zip(wanted, found, strict=True)}


def _known(shape: Sequence[int | None]) -> list[int]:
    """A shape all of whose sizes are known.

    Raises:
        ValueError: one is not.
    """
    sizes = [size for size in shape if size is not None]
    if len(sizes) != len(shape):
        raise ValueError("a size is not known")
    return sizes


def _multiplies(node: onnx.NodeProto) -> bool:
    """Whether a loop or branch holds a convolution or matrix product."""
    return any(inner.op_type in _OPERANDS or _multiplies(inner) for graph in inner_graphs(node) for inner in graph.node)


def _macs(node: onnx.NodeProto, shapes: Mapping[str, list[int | None]]) -> int | None:
    """Multiply-accumulates of an operator for its shapes; None where a size is not known."""
    first, second = (shapes.get(node.input[slot]) for slot in _OPERANDS[node.op_type])
    result = shapes.get(_result(node))
    if first is None or second is None:
        return None
    factors: list[int | None]
    if node.op_type == "Einsum":
        return _einsum(node, shapes)
    if node.op_type in _RECURRENT:
        # In each step, what is read and the state are multiplied by a matrix each: [directions, rows, columns].
        columns = [(shapes.get(name) or [None])[-1] for name in node.input[1:3]]
        factors = [*first[:2], *second[:2], None if None in columns else sum(size or 0 for size in columns)]
    elif node.op_type == "ConvTranspose":
        factors = [*first, *second[1:]]
    elif result is None:
        return None
    elif "Conv" in node.op_type:
        factors = [*result, *second[1:]]
    else:
        transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
        factors = [*result, first[0 if transposed else -1]]
    known = [factor for factor in factors if factor is not None]
    return math.prod(known) if len(known) == len(factors) else None


def _einsum(node: onnx.NodeProto, shapes: Mapping[str, list[int | None]]) -> int | None:
    """The product of the sizes of all indices; None with an ellipsis."""
    equation = next(attribute.s.decode() for attribute in node.attribute if attribute.name == "equation")
    sizes: dict[str, int | None] = {}
    for name, indices in zip(node.input, equation.replace(" ", "").partition("->")[0].split(","), strict=True):
        shape = shapes.get(name)
        if shape is None or len(shape) != len(indices):
            return None
        sizes.update(zip(indices, shape, strict=True))
    known = [size for size in sizes.values() if size is not None]
    return math.prod(known) if len(known) == len(sizes) else None


def _in_float(node: onnx.NodeProto, graph: Graph) -> list[str]:
    """What is in float of an operator's operands; empty where both are INT8."""
    if node.op_type in _ALWAYS_FLOAT:
        return [f"there is no integer kernel for {node.op_type}"]
    missing = []
    operands = range(len(node.input)) if node.op_type == "Einsum" else _OPERANDS[node.op_type]
    for name in (node.input[slot] for slot in operands):
        if not _is_dequantized(name, graph):
            what = "the weight" if name in graph.constant else f"the value {name}"
            missing.append(f"{what} is not quantized")
    return missing


def _is_dequantized(name: str, graph: Graph) -> bool:
    """Whether a value comes out of a DequantizeLinear, as it is or merely moved."""
    pending, seen = [name], set()
    while pending:
        value = pending.pop()
        node = graph.producer.get(value)
        if node is None:
            return False
        if dequantizer(node) is not None or value in seen:
            continue
        if node.op_type not in _MOVES:
            return False
        seen.add(value)
        pending.extend(node.input if node.op_type == "Concat" else node.input[:1])
    return True


def _result(node: onnx.NodeProto) -> str:
    """The value that an operator gives; a recurrent one may give its last state alone."""
    return next(str(name) for name in node.output if name)


def _layer(node: onnx.NodeProto, graph: Graph) -> str:
    """The layer's name: of the product's value or, where a bias is added to it alone, of that sum."""
    name = _result(node)
    after = graph.sole_reader(name)
    if node.op_type == "MatMul" and after is not None and after.op_type == "Add":
        other = next((value for value in after.input if value != name), name)
        if other in graph.constant:
            return str(after.output[0])
    return name
