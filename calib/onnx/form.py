"""Linear layers of an ONNX network as convolutions, which TensorRT computes faster in INT8 than matrix products.

As ``engines.tensorrt.form.linear_as_convolution`` does it for PyTorch's networks. Imports onnx inside functions: it is
slow to load.
"""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calib.onnx.graph import ACTIVATIONS, Graph
from calib.onnx.model import attributes, constant, drop_unread, free_name, replace_items, value_shapes
from common.errors import InputError

if TYPE_CHECKING:
    import onnx


_BATCH = 97
"""A free batch size, while shapes are inferred: no other size is the same by accident, as one of 1 could be."""


@dataclass(frozen=True)
class Convolutional:
    """A network whose linear layers are convolutions.

    Attributes:
        model: With the values of the given network under their names.
        maps: Feature map -> the value [B, C * H * W] of the given network that holds the same numbers.
    """

    model: onnx.ModelProto
    maps: dict[str, str]


def linear_as_convolution(model: onnx.ModelProto, chosen: Container[str], folder: Path) -> Convolutional:
    """Turn each Gemm that reads a flattened feature map into a convolution of the map's size, where shapes are known.

    What it gives stays [B, channels, 1, 1] for its activation and the Gemm behind that, and is flattened for everything
    else, under the name that it had.

    Args:
        model: The network; it is not changed.
        chosen: Values that are quantized: a Gemm that reads another one stays.
        folder: Where external weights lie.
    """
    import onnx

    result = onnx.ModelProto()
    result.CopyFrom(model)
    try:
        rewriting = _Rewriting(result, value_shapes(model, {}, _BATCH), folder)
    except InputError:  # shapes that contradict each other
        return Convolutional(model, {})
    for node in list(result.graph.node):
        rewriting.visit(node, chosen)
    return Convolutional(rewriting.finish(), rewriting.maps)


class _Rewriting:
    """Takes a network over node by node."""

    def __init__(self, model: onnx.ModelProto, shapes: dict[str, list[int | None]], folder: Path) -> None:
        self._model, self._shapes, self._folder = model, shapes, folder
        self._graph = Graph(model)
        self._taken = {*self._graph.producer, *self._graph.constant, *self._graph.inputs}
        self._nodes: list[onnx.NodeProto] = []
        self._flattened: dict[str, str] = {}  # [B, C * H * W] -> its map
        self._small: set[str] = set()  # those of [B, C] whose map is [B, C, 1, 1]
        self.maps: dict[str, str] = {}

    def visit(self, node: onnx.NodeProto, chosen: Container[str]) -> None:
        """Take a node over, or what replaces it; those that it reads have been visited."""
        source = node.input[0] if node.input else ""
        if node.op_type == "Gemm" and source in self._flattened and source in chosen:
            convolution = self._convolution(node)
            if convolution is not None:
                self._nodes += [convolution, self._flatten(convolution, node.output[0])]
                return
        elif node.op_type in ACTIVATIONS and source in self._small and self._reads_constants(node):
            activation = type(node).FromString(node.SerializeToString())
            activation.input[0] = self._flattened[source]
            activation.output[0] = free_name(f"{node.output[0]}_map", self._taken)
            self._nodes += [activation, self._flatten(activation, node.output[0])]
            return
        elif node.op_type in ("Flatten", "Reshape") and self._flattens(source, node.output[0]):
            self._flattened[node.output[0]] = source
            self.maps.setdefault(source, node.output[0])
        self._nodes.append(node)

    def _reads_constants(self, node: onnx.NodeProto) -> bool:
        """Whether all that a node reads but its first input is constant."""
        return self._graph.constant.issuperset(filter(None, node.input[1:]))

    def _flattens(self, source: str, result: str) -> bool:
        """Whether a value [B, C, H, W] becomes [B, C * H * W]."""
        before, after = self._shapes.get(source), self._shapes.get(result)
        if before is None or after is None or source in self._graph.constant or len(before) != 4 or len(after) != 2:
            return False
        sizes = [size for size in before if size is not None]
        return len(sizes) == 4 and before[0] == after[0] and math.prod(sizes[1:]) == after[1]

    def _convolution(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """The convolution of a Gemm's input as a map, or None where the Gemm is no linear layer."""
        import onnx

        given = attributes(node)
        plain = not given.get("transA") and given.get("alpha", 1.0) == 1 and given.get("beta", 1.0) == 1
        weight = constant(self._model, node.input[1], self._folder)
        bias = node.input[2] if len(node.input) > 2 else ""
        offsets = constant(self._model, bias, self._folder) if bias else None
        if not plain or weight is None or weight.ndim != 2 or (bias and offsets is None):
            return None
        weight = weight if given.get("transB") else weight.T
        source = self._flattened[node.input[0]]
        size = [1, 1] if node.input[0] in self._small else self._shapes[source][2:]
        shaped = np.ascontiguousarray(weight).reshape(len(weight), -1, *size)
        inputs = [source, self._store(f"{node.input[1]}_convolution", shaped)]
        if offsets is not None:
            # A Gemm broadcasts its bias, such as [1, M] or [1].
            row = np.broadcast_to(offsets.reshape(-1), len(weight)) if offsets.size in (1, len(weight)) else None
            if row is None:
                return None
            inputs.append(self._store(f"{bias}_convolution", np.ascontiguousarray(row)))
        return onnx.helper.make_node("Conv", inputs, [free_name(f"{node.output[0]}_map", self._taken)], node.name)

    def _flatten(self, node: onnx.NodeProto, name: str) -> onnx.NodeProto:
        """What gives a node's map as [B, channels], under the old name."""
        import onnx

        self._flattened[name] = node.output[0]
        self._small.add(name)
        self.maps[node.output[0]] = name
        return onnx.helper.make_node("Flatten", [node.output[0]], [name], f"{name}_flatten", axis=1)

    def _store(self, name: str, array: Any) -> str:
        import onnx

        name = free_name(name, self._taken)
        self._model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
        return name

    def finish(self) -> onnx.ModelProto:
        """The network, without what nothing reads any more."""
        replace_items(self._model.graph.node, self._nodes)
        drop_unread(self._model.graph)
        return self._model
