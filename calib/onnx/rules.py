"""Which entries TensorRT's calibrators give an ONNX network, under which names, and which entries share a scale.

Read from the tables that TensorRT 10.6 wrote for 27 networks (tests/calib/tensorrt). ``entropy2`` and ``minmax``
calibrate the network as the parser made it: every float value has an entry, window pooling takes its input's scale,
constants and what the parser adds have entries as well. ``entropy`` and ``legacy`` calibrate after layer fusion: what
is fused away has no entry, and pooling has a histogram of its own.

Imports onnx inside functions: it is slow to load.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from calib.algorithms import ALGORITHMS
from calib.onnx.layers import inner_values, layers_of
from calib.onnx.model import constant_value, replace_items, values_read
from calib.onnx.parser_names import ParserNames

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

FUSED_ALGORITHMS: Final = frozenset(name for name, one in ALGORITHMS.items() if one.after_fusion)
"""Algorithms with which TensorRT calibrates after layer fusion."""

WINDOW_POOLING: Final = frozenset({"AveragePool", "MaxPool"})
ELEMENTWISE: Final = frozenset({"Add", "Div", "Max", "Min", "Mul", "Pow", "Sub"})
WEIGHTED: Final = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
ACTIVATIONS: Final = frozenset({"Clip", "LeakyRelu", "Relu"})
RESHAPED_AFTERWARDS: Final = frozenset({"DepthToSpace", "Softmax", "SpaceToDepth"})
"""Operators to which TensorRT's parser adds a reshape, so that the same values have two names."""
RESHAPES: Final = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})


@dataclass(frozen=True)
class TableEntry:
    """An entry of the calibration table.

    Attributes:
        name: In the table.
        value: The ONNX value whose histogram it takes, or None for a constant.
        array: The constant, float32, or None.
        whole: A larger value, in whose memory TensorRT keeps this one, and from whose beginning it counts as many
            values as this one has; None elsewhere.
    """

    name: str
    value: str | None = None
    array: NDArray[Any] | None = None
    whole: str | None = None


class Graph:
    """The main graph of a model, by name.

    Attributes:
        nodes: In order.
        producer: Value -> the node that computes it.
        readers: Value -> the nodes that read it; graphs inside of nodes count for the node, outputs do not.
        outputs: The network's outputs.
        inputs: Its inputs, without weights.
        constant: Values that do not depend on the inputs.
        fixed: Whether the inputs' dimensions are.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self.producer: dict[str, onnx.NodeProto] = {}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        self.weights = {weight.name: weight for weight in model.graph.initializer}
        self.inputs = [value.name for value in model.graph.input if value.name not in self.weights]
        self.outputs = {value.name for value in model.graph.output}
        self.fixed = all(
            size.HasField("dim_value")
            for value in model.graph.input
            if value.name not in self.weights
            for size in value.type.tensor_type.shape.dim
        )
        self.constant = set(self.weights)
        for node in self.nodes:
            read = values_read(node)
            for name in dict.fromkeys(read):
                self.readers.setdefault(name, []).append(node)
            self.producer.update((name, node) for name in node.output if name)
            if all(name in self.constant for name in read) and not node.op_type.startswith("Random"):
                self.constant.update(node.output)

    def used(self, value: str) -> bool:
        """Whether a node reads ``value`` or it is an output."""
        return value in self.readers or value in self.outputs

    def sole_reader(self, value: str) -> onnx.NodeProto | None:
        """The only node that reads ``value``, or None if there are others or it is an output."""
        readers = self.readers.get(value, [])
        return readers[0] if len(readers) == 1 and value not in self.outputs else None


def entries(model: onnx.ModelProto, algorithm: str, folder: Path) -> tuple[list[TableEntry], onnx.ModelProto]:
    """The entries of the table, and the network that has their values.

    Args:
        model: The float network.
        algorithm: As line 1 of the table names it; ``percentile`` is as ``minmax``.
        folder: Where its external weights lie.

    Returns:
        The entries in order of the graph, those of values that are no float tensors among them; and the network itself,
        or, where TensorRT's parser makes several layers of an operator, one whose operators are divided likewise.
    """
    import onnx

    graph = Graph(model)
    if algorithm in FUSED_ALGORITHMS:
        wholes = _wholes(graph, folder)
        return [TableEntry(name, name, whole=wholes.get(name)) for name in [*graph.inputs, *_fused(graph)]], model
    source = {name: name for name in graph.inputs}
    found = [TableEntry(name, name) for name in graph.inputs]
    names = ParserNames(model, frozenset(graph.constant))
    nodes = []
    for node in graph.nodes:
        if all(name in graph.constant for name in node.output):
            nodes.append(node)
            if node.op_type != "Constant":
                names.read(node)
            continue
        broadcasts = names.read(node)
        before, after = _constants(graph, node, folder, broadcasts)
        layers = layers_of(node, names.layers, names.types.get(node.output[0], 1))
        inside = inner_values(layers)
        if not graph.producer.keys().isdisjoint(inside):
            layers, inside = [node], []
        nodes += layers
        found += before
        found += [TableEntry(f"{name}_output", array=array) for name, array in names.made]
        found += [
            TableEntry(f"{name}_output", node.input[index])
            for index, name in broadcasts.items()
            if node.input[index] not in graph.constant
        ]
        found += [TableEntry(name, name) for name in inside]
        found += after
        for index, name in enumerate(node.output):
            if name:
                pooled = node.op_type in WINDOW_POOLING and not index
                source[name] = source.get(node.input[0], node.input[0]) if pooled else name
                if node.op_type in RESHAPED_AFTERWARDS:
                    found.append(TableEntry(f"{names.layers[0]}_output", name))
                if graph.used(name):
                    found.append(TableEntry(name, source[name]))
    divided = model
    if len(nodes) > len(graph.nodes):
        divided = onnx.ModelProto()
        divided.CopyFrom(model)
        replace_items(divided.graph.node, nodes)
    return list({entry.name: entry for entry in found}.values()), divided


def _constants(
    graph: Graph, node: onnx.NodeProto, folder: Path, broadcasts: Mapping[int, str]
) -> tuple[list[TableEntry], list[TableEntry]]:
    """Entries of the constants that a node reads: those before a product's own entry, and those behind it.

    Args:
        graph: Knows which values are constants.
        node: One of its nodes.
        folder: Where external weights lie.
        broadcasts: Names of the constants' broadcasts, by the input's position.
    """
    if node.op_type not in ELEMENTWISE | {"Gemm", "MatMul", "PRelu"} and not (node.op_type == "Clip" and broadcasts):
        return [], []
    before: list[TableEntry] = []
    after: list[TableEntry] = []
    for index, name in enumerate(node.input):
        entry = _entry(graph, name, folder) if name in graph.constant else None
        if entry is not None:
            entries = after if node.op_type == "Gemm" and index == 2 else before
            entries.append(entry)
            if index in broadcasts:
                entries.append(TableEntry(f"{broadcasts[index]}_output", array=entry.array))
    return before, after


def _entry(graph: Graph, name: str, folder: Path) -> TableEntry | None:
    """The entry of a constant, or None where it is computed or no float."""
    import numpy as np

    array = _stored(graph, name, folder)
    if array is None or array.dtype not in (np.float32, np.float16) or not np.isfinite(array).all():
        return None
    return TableEntry(f"{name}_output", array=array.astype(np.float32))


def _fused(graph: Graph) -> Iterator[str]:
    """The values that are left after layer fusion."""
    taken: set[str] = set()
    for node in graph.nodes:
        if node.op_type == "Add" and not graph.constant.intersection(node.input):
            # One of the two operands' convolutions takes the sum into itself: the later one.
            own = [name for name in node.input if _is(graph.producer.get(name), {"Conv"}) and graph.sole_reader(name)]
            taken.update(sorted(own, key=lambda name: graph.nodes.index(graph.producer[name]))[-1:])
    for node in graph.nodes:
        for name in filter(None, node.output):
            reader = graph.sole_reader(name)
            gone = name in graph.constant or name in taken or not graph.used(name)
            # A reshape copies nothing, except into its place in a concatenation where the batch is open, and out of
            # another layout.
            copies = (_is(reader, {"Concat"}) and not graph.fixed) or name in graph.outputs
            copies = copies or (bool(node.input) and _is(graph.producer.get(node.input[0]), {"Transpose"}))
            gone = gone or (node.op_type in RESHAPES and not copies)
            if reader is not None and node.op_type in WEIGHTED | {"Add", "BatchNormalization"}:
                scaled = reader.op_type in ELEMENTWISE and bool(graph.constant.intersection(reader.input))
                gone = gone or reader.op_type in ACTIVATIONS | {"BatchNormalization"}
                gone = gone or (node.op_type in ("Conv", "ConvTranspose") and scaled)
            # Two matrix products become one kernel.
            product = node if node.op_type == "Gemm" else graph.producer.get(node.input[0]) if node.input else None
            if _is(reader, {"Gemm"}) and node.op_type in {"Gemm", *ACTIVATIONS} and _is(product, {"Gemm"}):
                gone = True
            if not gone:
                yield name


def _wholes(graph: Graph, folder: Path) -> dict[str, str]:
    """Value -> the larger one in whose memory TensorRT keeps it after layer fusion, where it counts the wrong values.

    That is the first operand of a concatenation of channels, and the first channels that a slice or a split takes.
    Their histogram is of as many values, but of those that follow one another from the beginning of the larger one's
    memory, so of all its channels and the first images alone. What lies further behind has its own values. A
    concatenation that is sliced again is none in memory.
    """
    found: dict[str, str] = {}
    for node in reversed(graph.nodes):
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
        if node.op_type == "Concat" and axis == 1 and len(node.input) > 1:
            first, whole = _unreshaped(graph, node.input[0]), node.output[0]
            placed = [reader for reader in graph.readers[first] if reader.op_type in {"Concat", *RESHAPES}]
            if len(placed) == 1 and not _is(graph.sole_reader(whole), {"Slice", "Split"}):
                found[first] = found.get(whole, whole)
        elif (node.op_type == "Split" and axis == 1) or (
            node.op_type == "Slice" and _first_channels(graph, node, folder)
        ):
            found[node.output[0]] = found.get(node.input[0], node.input[0])
    return {name: whole for name, whole in found.items() if not {name, whole} & graph.constant}


def _unreshaped(graph: Graph, value: str) -> str:
    """The value that ``value`` is a reshape of, where the batch is fixed and a reshape copies nothing; else itself."""
    while graph.fixed and _is(graph.producer.get(value), RESHAPES) and graph.sole_reader(value) is not None:
        value = graph.producer[value].input[0]
    return value


def _first_channels(graph: Graph, node: onnx.NodeProto, folder: Path) -> bool:
    """Whether a Slice takes neighbouring channels from the first one on."""
    given = dict(zip(("data", "starts", "ends", "axes", "steps"), node.input, strict=False))
    starts, axes, steps = (_integers(graph, given.get(key, ""), folder) for key in ("starts", "axes", "steps"))
    return starts == [0] and axes == [1] and steps in ([1], None)


def _integers(graph: Graph, name: str, folder: Path) -> list[int] | None:
    """A constant vector of integers, or None where it is none."""
    array = _stored(graph, name, folder)
    return None if array is None or array.dtype.kind != "i" else [int(number) for number in array.reshape(-1)]


def _stored(graph: Graph, name: str, folder: Path) -> NDArray[Any] | None:
    """A constant that the file holds, or None where ``name`` is none."""
    from onnx import numpy_helper

    if name in graph.weights:
        return numpy_helper.to_array(graph.weights[name], base_dir=str(folder))
    if name in graph.producer and graph.producer[name].op_type == "Constant":
        return constant_value(graph.producer[name])
    return None


def _is(node: onnx.NodeProto | None, kinds: AbstractSet[str]) -> bool:
    return node is not None and node.op_type in kinds
