"""The main graph of an ONNX model, by name, and kinds of operators.

Imports onnx inside functions: it is slow to load.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from calib.onnx.model import constant_value, inner_graphs, values_read

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

ELEMENTWISE: Final = frozenset({"Add", "Div", "Max", "Min", "Mul", "Pow", "Sub"})
WEIGHTED: Final = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
ACTIVATIONS: Final = frozenset({"Clip", "LeakyRelu", "Relu"})
RESHAPES: Final = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})


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
            if all(name in self.constant for name in read) and not _draws(node):
                self.constant.update(node.output)

    def used(self, value: str) -> bool:
        """Whether a node reads ``value`` or it is an output."""
        return value in self.readers or value in self.outputs

    def sole_reader(self, value: str) -> onnx.NodeProto | None:
        """The only node that reads ``value``, or None if there are others or it is an output."""
        readers = self.readers.get(value, [])
        return readers[0] if len(readers) == 1 and value not in self.outputs else None


def _draws(node: onnx.NodeProto) -> bool:
    """Whether a node, or one inside it, gives random numbers."""
    inner = (each for graph in inner_graphs(node) for each in graph.node)
    return node.op_type.startswith("Random") or any(map(_draws, inner))


def dequantizer(node: onnx.NodeProto) -> onnx.NodeProto | None:
    """The DequantizeLinear that gives a node's value, or None; of an If with one in each branch, the shorter one's."""
    if node.op_type != "If":
        return node if node.op_type == "DequantizeLinear" else None
    branches = sorted((list(graph.node) for graph in inner_graphs(node)), key=len)
    return branches[0][-1] if all(each and each[-1].op_type == "DequantizeLinear" for each in branches) else None


def stored(graph: Graph, name: str, folder: Path) -> NDArray[Any] | None:
    """A constant that the file holds, or None where ``name`` is none."""
    from onnx import numpy_helper

    if name in graph.weights:
        return numpy_helper.to_array(graph.weights[name], base_dir=str(folder))
    if name in graph.producer and graph.producer[name].op_type == "Constant":
        return constant_value(graph.producer[name])
    return None
