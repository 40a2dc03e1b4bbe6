"""Which entries TensorRT's calibrators give an ONNX network, under which names, and which entries share a scale.

Read from the tables that TensorRT 10.6 wrote for 27 networks (tests/calib/tensorrt). ``entropy2`` and ``minmax``
calibrate the network as the parser made it: every float value has an entry, window pooling takes its input's scale,
constants and what the parser adds have entries as well. ``entropy`` and ``legacy`` calibrate after layer fusion: what
is fused away has no entry, and pooling has a histogram of its own (:mod:`calib.onnx.fusion`).

Imports onnx inside functions: it is slow to load.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from calib.algorithms import ALGORITHMS
from calib.onnx.fusion import Fusion
from calib.onnx.graph import ELEMENTWISE, Graph, stored
from calib.onnx.layers import inner_values, layers_of
from calib.onnx.model import replace_items
from calib.onnx.parser_names import ParserNames

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

FUSED_ALGORITHMS: Final = frozenset(name for name, one in ALGORITHMS.items() if one.after_fusion)
"""Algorithms with which TensorRT calibrates after layer fusion."""

WINDOW_POOLING: Final = frozenset({"AveragePool", "MaxPool"})
RESHAPED_AFTERWARDS: Final = frozenset({"DepthToSpace", "Softmax", "SpaceToDepth"})
"""Operators to which TensorRT's parser adds a reshape, so that the same values have two names."""


@dataclass(frozen=True)
class TableEntry:
    """An entry of the calibration table.

    Attributes:
        name: In the table.
        value: The ONNX value whose histogram it takes, or None for a constant.
        array: The constant, float32, or None.
        whole: Values, channels behind each other, in whose memory TensorRT keeps this one, and from whose beginning it
            counts as many values as this one has; none elsewhere.
    """

    name: str
    value: str | None = None
    array: NDArray[Any] | None = None
    whole: tuple[str, ...] = ()


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
        fusion = Fusion(graph, folder)
        wholes, left = fusion.wholes(), fusion.values(ALGORITHMS[algorithm].concatenations)
        return [TableEntry(name, name, whole=wholes.get(name, ())) for name in left], model
    source = {name: name for name in graph.inputs}
    found = [TableEntry(name, name) for name in graph.inputs]
    names = ParserNames(model, frozenset(graph.constant))
    nodes = []
    for node in graph.nodes:
        if all(name in graph.constant for name in node.output):
            nodes.append(node)
            if node.op_type != "Constant":
                names.read(node)
            shared = _entry(graph, node.input[0], folder) if node.op_type == "Identity" else None
            if shared is not None:
                found += [shared, TableEntry(node.output[0], array=shared.array)]
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
    own = node.op_type in ELEMENTWISE | {"Gemm", "MatMul", "Mean", "PRelu", "Sum"}
    own = own or (node.op_type == "Clip" and bool(broadcasts))
    before: list[TableEntry] = []
    after: list[TableEntry] = []
    for index, name in enumerate(node.input):
        # One that several operators share passes an Identity, which has given it its entries; it is not folded then.
        producer = graph.producer.get(name)
        shared = producer is not None and producer.op_type == "Identity"
        if name not in graph.constant or not (own or (shared and node.op_type == "LayerNormalization")):
            continue
        entry = _entry(graph, producer.input[0] if producer is not None and shared else name, folder)
        if entry is not None:
            entries = after if node.op_type == "Gemm" and index == 2 else before
            if not shared:
                entries.append(entry)
            if index in broadcasts:
                entries.append(TableEntry(f"{broadcasts[index]}_output", array=entry.array))
    return before, after


def _entry(graph: Graph, name: str, folder: Path) -> TableEntry | None:
    """The entry of a constant, or None where it is computed or no float."""
    import numpy as np

    array = stored(graph, name, folder)
    if array is None or array.dtype not in (np.float32, np.float16) or not np.isfinite(array).all():
        return None
    return TableEntry(f"{name}_output", array=array.astype(np.float32))
