"""Weights in the type whose sums are exact on the CPU at hand, which the file chooses itself while it is loaded.

ONNX Runtime's kernels for uint8 values with int8 weights are the fastest where the CPU has instructions for them (VNNI,
AMX, Arm); on other x86 CPUs they add two products in 16 bits, which saturate. Those for uint8 weights are exact
everywhere. So the graph holds a product whose sums show which CPU it is, and an If for each weight. All of it is
constant: ONNX Runtime computes it when it loads the file, and what it then runs has weights of one type and no If.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from calib.int8 import WEIGHT_MAX
from calib.onnx.graph import WEIGHTED, Graph
from calib.onnx.model import attributes, free_name, replace_items
from calib.onnx.pairs import MIDDLE

_ROWS, _TERMS, _COLUMNS = 4, 100, 16
"""Of the product that is tried. Versions up to 1.25 sum wrongly with AMX where the terms are no multiple of 64."""

_VALUE: Final = 255


def choose_weights(model: onnx.ModelProto) -> None:
    """Let layers that read values of both signs have int8 weights where their sums are exact, else uint8 ones.

    Layers that read codes of 0 to 127, as behind a ReLU, keep their int8 weights: 2 * 127 * 127 fits into 16 bits.

    Args:
        model: With pairs around the layers that run in INT8, their weights in int8; changed in place.
    """
    graph = Graph(model)
    chosen = [weight for layer in graph.nodes if (weight := _int8_weight(layer, graph)) and _is_wide(layer, graph)]
    if not chosen:
        return
    writer = _Writer(model, graph)
    exact = writer.probe()
    instead = {weight.output[0]: writer.either(weight, exact, graph) for weight in chosen}
    nodes = [instead.get(node.output[0], node) for node in graph.nodes]
    replace_items(model.graph.node, [*writer.nodes, *nodes])


def _int8_weight(layer: onnx.NodeProto, graph: Graph) -> onnx.NodeProto | None:
    """The DequantizeLinear of a layer's weight."""
    node = graph.producer.get(layer.input[1]) if layer.op_type in WEIGHTED else None
    return node if node is not None and node.op_type == "DequantizeLinear" and node.input[0] in graph.weights else None


def _is_wide(layer: onnx.NodeProto, graph: Graph) -> bool:
    """Whether the codes that a layer reads may exceed 127."""
    values = graph.producer.get(layer.input[0])
    if values is None or values.op_type != "DequantizeLinear":
        return True
    return bool(numpy_helper.to_array(graph.weights[values.input[2]]))


class _Writer:
    """Makes the nodes, and stores their constants in the model."""

    def __init__(self, model: onnx.ModelProto, graph: Graph) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._initializers = model.graph.initializer
        self._taken = {*graph.producer, *graph.weights, *graph.inputs, *(node.name for node in graph.nodes)}
        self._middle = self._store("weight_middle", np.array(MIDDLE, np.int32))

    def probe(self) -> str:
        """Try a product at the ends of both ranges; gives the name of whether its sums are exact."""
        sums = np.array(_ROWS * _COLUMNS * _TERMS * _VALUE * WEIGHT_MAX, np.int32)
        values = self._store("probe_values", np.full((_ROWS, _TERMS), _VALUE, np.uint8))
        weights = self._store("probe_weights", np.full((_TERMS, _COLUMNS), WEIGHT_MAX, np.int8))
        product = self._compute("MatMulInteger", [values, weights], "probe_product")
        total = self._compute("ReduceSum", [product], "probe_sum", keepdims=0)
        return self._compute("Equal", [total, self._store("probe_exact_sum", sums)], "int8_sums_are_exact")

    def either(self, weight: onnx.NodeProto, exact: str, graph: Graph) -> onnx.NodeProto:
        """What gives the same weight from int8 codes or, moved up, from uint8 ones, under the name that it has."""
        codes, scales, _ = weight.input
        (output,) = weight.output
        axis = attributes(weight)["axis"]
        shape = list(graph.weights[codes].dims)
        middles = np.full(tuple(graph.weights[scales].dims), MIDDLE, np.uint8)
        names = [free_name(f"{codes}_{part}", self._taken) for part in ("int32", "moved_up", "uint8")]
        given = [free_name(f"{output}_{kind}", self._taken) for kind in ("int8", "uint8")]
        moved = [
            helper.make_node("Cast", [codes], [names[0]], to=TensorProto.INT32),
            helper.make_node("Add", [names[0], self._middle], [names[1]]),
            helper.make_node("Cast", [names[1]], [names[2]], to=TensorProto.UINT8),
        ]
        unsigned = [names[2], scales, self._store(f"{codes}_middle", middles)]
        branches = [
            helper.make_graph(
                [*before, helper.make_node("DequantizeLinear", inputs, [value], axis=axis)],
                value,
                [],
                [helper.make_tensor_value_info(value, TensorProto.FLOAT, shape)],
            )
            for before, inputs, value in (([], weight.input, given[0]), (moved, unsigned, given[1]))
        ]
        return helper.make_node("If", [exact], [output], weight.name, then_branch=branches[0], else_branch=branches[1])

    def _compute(self, operator: str, inputs: list[str], name: str, **settings: Any) -> str:
        name = free_name(name, self._taken)
        self.nodes.append(helper.make_node(operator, inputs, [name], name, **settings))
        return name

    def _store(self, name: str, array: NDArray[Any]) -> str:
        name = free_name(name, self._taken)
        self._initializers.append(numpy_helper.from_array(array, name))
        return name
