"""The names that TensorRT's ONNX parser gives to what it adds to a network.

A layer or tensor whose name is taken gets a number behind it, and one counter numbers them all. So the number in
``ONNXTRT_Broadcast_23`` depends on every name that was taken twice before: those of layers that share an operator's
name, and those of the layers that compute shapes where a dimension (the batch) is not fixed. The rules are those of
onnx-tensorrt 10.1, checked with what TensorRT 10.6 named in 109 networks: 106 agree. Not counted here are the layers of
CumSum, those in the branches of If, and a temporary weight where a mean of everything is compared: numbers behind them
are too low.

Imports onnx inside functions: it is slow to load.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from calib.onnx.model import without_weights

if TYPE_CHECKING:
    import onnx

Shape = Sequence[int | None]
"""Dimensions; None for one that is not fixed."""

_ELEMENTWISE = frozenset(
    {"Add", "And", "Div", "Equal", "Greater", "Less", "Max", "Mean", "Min", "Mul", "Or", "Pow", "Sub", "Sum", "Xor"}
)
_LAYERS = {
    "Celu": 7,
    "Constant": 0,
    "Dropout": 0,
    "HardSwish": 2,
    "Mish": 3,
    "ReduceL1": 2,
    "ReduceL2": 2,
    "ReduceLogSum": 2,
    "ReduceLogSumExp": 3,
}
"""Layers that an operator becomes under one name, where they are not one."""


def layer_name(node: onnx.NodeProto) -> str:
    """The name that the parser asks for, for each layer of an operator."""
    return node.name or f"node_of_{node.output[0]}"


class ParserNames:
    """The parser's counter, driven by the network's nodes in order.

    Args:
        model: The network.
        constant: Its values that are constants.

    Attributes:
        types: The element types of the values, as far as they are known.
        layers: The names of the layers that the parser made of the node read last and named after it.
        made: The constants that it made for that node: name and value.
    """

    def __init__(self, model: onnx.ModelProto, constant: frozenset[str]) -> None:
        import onnx

        graph = onnx.shape_inference.infer_shapes(without_weights(model)).graph
        self._shapes = _shapes(graph)
        self._ones, self._negative = _integers_of(model.graph)
        weights = {weight.name for weight in model.graph.initializer}
        self._stored = weights | {node.output[0] for node in graph.node if node.op_type == "Constant"}
        self.types = {
            value.name: value.type.tensor_type.elem_type
            for value in [*graph.input, *graph.value_info, *graph.output]
            if value.name not in weights
        }
        self._constant = constant
        self._layers: set[str] = set()
        self._weights: set[str] = set()
        self._number = 0
        self._node = ""
        self.layers: list[str] = []
        self.made: list[tuple[str, NDArray[np.float32]]] = []

    def read(self, node: onnx.NodeProto) -> dict[int, str]:
        """Count the layers of the next node; names of its inputs' broadcasts, by position."""
        self._node = layer_name(node)
        self.layers, self.made = [], []
        rule = _RULES.get(node.op_type)
        if rule is None:
            self._own(_LAYERS.get(node.op_type, 1))
            return {}
        return rule(self, node) or {}

    def _layer(self, name: str, again: bool = True) -> str:
        """Name a layer; where ``again`` is not set, one layer serves all that ask for it."""
        if not again and name in self._layers:
            return name
        chosen = self._unique(self._layers, name)
        if name == self._node:
            self.layers.append(chosen)
        return chosen

    def _own(self, count: int = 1) -> None:
        """Layers that are named after the operator."""
        self._all(self._node, count)

    def _all(self, name: str, count: int) -> None:
        for _ in range(count):
            self._layer(name)

    def _unique(self, taken: set[str], name: str) -> str:
        chosen = name
        while chosen in taken:
            chosen = f"{name}_{self._number}"
            self._number += 1
        taken.add(chosen)
        return chosen

    def _temporary(self, count: int = 1) -> list[str]:
        return [self._unique(self._weights, "tmp_weight") for _ in range(count)]

    def _shape(self, value: str) -> Shape:
        return self._shapes.get(value, ())

    def _unsqueezed(self, values: Sequence[str]) -> None:
        for value in values:
            self._layer(value, again=False)
            self._layer("ONNXTRT_ShapeShuffle")
            self._layer("ONNXTRT_unsqueezeTensor")

    def _operands(
        self, node: onnx.NodeProto, positions: Sequence[int], broadcast: bool = True, rank: int = 0
    ) -> dict[int, str]:
        """Count operands: constants become layers, and what has fewer dimensions than another is reshaped."""
        shapes = {index: self._shape(node.input[index]) for index in positions}
        rank = max([rank, *map(len, shapes.values())])
        found = {}
        for index, shape in shapes.items():
            constant = node.input[index] in self._constant
            if constant:
                self._layer(node.input[index], again=False)
            if broadcast and len(shape) < rank and (constant or node.input[index] in self._shapes):
                found[index] = self._broadcast(shape)
        return found

    def _broadcast(self, shape: Shape) -> str:
        if None in shape:
            self._known()
            self._of_tensor()
            self._layer("ONNXTRT_ShapeConcat")
        self._layer("ONNXTRT_ShapeShuffle")
        return self._layer("ONNXTRT_Broadcast")

    def _known(self) -> None:
        """A shape that is known becomes a constant layer."""
        self._temporary()
        self._layer("ONNXTRT_ShapeTensorFromDims")

    def _of_tensor(self) -> None:
        """A tensor's shape is computed."""
        self._layer("ONNXTRT_ShapeTensor")
        self._layer("ONNXTRT_castHelper")

    def _gather(self) -> None:
        """Some dimensions of a tensor, not all of them fixed."""
        self._known()
        self._of_tensor()
        self._layer("ONNXTRT_ShapeGather")

    def _reshape(self, shape: Shape, gathered: bool = False, longer: bool = False) -> None:
        """The shape that a reshape takes: a tensor's, or some of its dimensions, with one more between them."""
        if None in shape:
            if longer:
                self._known()
                self._of_tensor()
                self._layer("ONNXTRT_ShapeConcat")
                self._known()
                self._layer("ONNXTRT_ShapeGather")
            elif gathered:
                self._gather()
            else:
                self._of_tensor()
        self._layer("ONNXTRT_ShapeShuffle")

    def _read_elementwise(self, node: onnx.NodeProto) -> dict[int, str]:
        found: dict[int, str] = {}
        if len(node.input) == 1:
            self._layer("ONNXTRT_identity")
        else:
            found = self._operands(node, range(len(node.input)))
            self._own(len(node.input) - 1)
        if node.op_type == "Mean":
            self._temporary()  # one divided by the number of operands
        return found

    def _read_broadcasting(self, node: onnx.NodeProto) -> dict[int, str]:
        found = self._operands(node, range(len(node.input)))
        self._own()
        return found

    def _read_or_equal(self, node: onnx.NodeProto) -> dict[int, str]:
        found = self._operands(node, range(2))
        self._own(3)
        return found

    def _read_softmax(self, node: onnx.NodeProto) -> None:
        self._own()
        self._reshape(self._shape(node.input[0]))

    def _read_reshape(self, node: onnx.NodeProto) -> None:
        self._layer("ONNXTRT_ShapeShuffle")
        self._own()

    def _read_squeeze(self, node: onnx.NodeProto) -> None:
        self._reshape(self._shape(node.input[0]), gathered=True, longer=node.op_type == "Unsqueeze")
        self._own()

    def _read_instance_normalization(self, node: onnx.NodeProto) -> None:
        self._unsqueezed(node.input[1:3])
        self._own()

    def _read_layer_normalization(self, node: onnx.NodeProto) -> dict[int, str]:
        self._temporary(2)
        found = self._operands(node, range(1, len(node.input)), rank=len(self._shape(node.input[0])))
        self._own()
        return found

    def _read_batch_normalization(self, node: onnx.NodeProto) -> None:
        if not self._stored.issuperset(node.input[1:]):
            self._unsqueezed(node.input[1:])
            self._temporary()
        self._own()

    def _read_arg(self, node: onnx.NodeProto) -> None:
        self._own()
        self._all("ONNXTRT_castHelper", 2)

    def _read_gather(self, node: onnx.NodeProto) -> None:
        import onnx

        self._operands(node, range(2), broadcast=False)
        if self.types.get(node.input[0]) != onnx.TensorProto.INT64:
            self._layer("ONNXTRT_castHelper")
        self._own()

    def _read_constant_of_shape(self, node: onnx.NodeProto) -> None:
        self._operands(node, [0], broadcast=False)
        self._temporary()
        self._layer("ONNXTRT_ShapeShuffle")
        self._layer("ONNXTRT_ShapeSlice")
        self._own()

    def _read_tile(self, node: onnx.NodeProto) -> None:
        self._known()
        self._of_tensor()
        self._layer("ONNXTRT_ShapeElementWise")
        self._layer("ONNXTRT_ShapeSlice")
        self._own()

    def _read_top_k(self, node: onnx.NodeProto) -> None:
        self._own()
        self._operands(node, [1], broadcast=False)
        self._layer("ONNXTRT_convertToScalar")
        self._layer("ONNXTRT_castHelper")

    def _read_joined(self, node: onnx.NodeProto) -> None:
        self._operands(node, range(len(node.input)), broadcast=False)
        self._own()

    def _read_flatten(self, node: onnx.NodeProto) -> None:
        shape = self._shape(node.input[0])
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
        axis += len(shape) if axis < 0 else 0
        if len(shape) == 2 and axis == 1:
            return
        if None in shape:
            for part in (shape[:axis], shape[axis:]):
                self._product(part)
                if None not in part:
                    self._known()
            self._layer("ONNXTRT_ShapeConcat")
        self._layer("ONNXTRT_ShapeShuffle")
        self._own()

    def _product(self, shape: Shape) -> None:
        """The product of dimensions, one after the other; a factor of 1 is left out."""
        known: int | None = 1
        for size in shape:
            if size is None:
                self._gather()
            if known != 1 and size != 1 and (known is None or size is None):
                if known is not None or size is not None:
                    self._known()
                self._layer("ONNXTRT_ShapeElementWise")
            known = None if known is None or size is None else known * size

    def _read_depth_to_space(self, node: onnx.NodeProto) -> None:
        # With the batch open, it is gathered once and put before the other dimensions, which are known, twice.
        free = self._shape(node.input[0])[:1] == (None,)
        if free:
            self._gather()
        for own in (1, 0):
            if free:
                self._known()
                self._layer("ONNXTRT_ShapeConcat")
            self._layer("ONNXTRT_ShapeShuffle")
            self._own(own)

    def _read_slice(self, node: onnx.NodeProto) -> None:
        self._operands(node, range(1, min(len(node.input), 3)), broadcast=False)
        self._all("ONNXTRT_castHelper", 2)
        # The elementwise operations that turn starts, ends and steps into sizes.
        stepped = len(node.input) > 4 and node.input[4] not in self._ones
        backwards = len(node.input) > 4 and node.input[4] in self._negative
        bounds = (1, 1, 2, 1, 1) if backwards else (1, 1, 2, 2)
        for operations in (*bounds, 1, 3, 3, 1, *((1, 1) if stepped else ())):
            self._known()
            self._all("ONNXTRT_ShapeElementWise", operations)
        self._layer("ONNXTRT_ShapeSlice")
        self._own()

    def _read_pad(self, node: onnx.NodeProto) -> None:
        if len(node.input) > 1 and node.input[1] not in self._stored:
            # What is computed is divided into the sizes before and those behind.
            for _ in range(2):
                self._layer("ONNXTRT_ShapeSlice")
                self._own()
            if None in self._shape(node.input[0]):
                self._gather()
            else:
                self._known()
            self._known()
            self._all("ONNXTRT_ShapeElementWise", 3)
            self._layer("ONNXTRT_ShapeSlice")
        self._own()

    def _read_split(self, node: onnx.NodeProto) -> None:
        if None in self._shape(node.input[0]):
            self._of_tensor()
            self._known()  # which of the dimensions to take
        for _ in node.output:
            if None in self._shape(node.input[0]):
                self._known()
                self._layer("ONNXTRT_ShapeConcat")
                self._layer("ONNXTRT_ShapeGather")
            self._layer("ONNXTRT_ShapeSlice")
            self._own()

    def _read_clip(self, node: onnx.NodeProto) -> dict[int, str]:
        bounds = node.input[1:3]
        if "" not in bounds:
            self._own()
            return {}
        # A bound that is left empty makes it two elementwise layers without a name, and is a constant, too.
        for bound in bounds:
            if bound:
                self._layer(bound, again=False)
            else:
                self._temporary()
        found = {}
        for position, bound in enumerate(bounds, 1):
            broadcast = self._broadcast(())
            if bound:
                found[position] = broadcast
            else:
                largest = np.finfo(np.float32).max
                self.made.append((broadcast, np.full((), -largest if position == 1 else largest, np.float32)))
        return found

    def _read_expand(self, node: onnx.NodeProto) -> None:
        self._operands(node, [1], broadcast=False)
        # Sizes: the larger of both shapes; steps: 0 along what is repeated.
        self._known()
        self._layer("ONNXTRT_ShapeElementWise")
        self._of_tensor()
        self._all("ONNXTRT_ShapeElementWise", 3)
        self._known()
        self._all("ONNXTRT_ShapeElementWise", 2)
        self._layer("ONNXTRT_ShapeSlice")
        self._own()

    def _read_gemm(self, node: onnx.NodeProto) -> dict[int, str]:
        factors = {attribute.name: attribute.f for attribute in node.attribute}
        alpha, beta = factors.get("alpha", 1.0), factors.get("beta", 1.0)
        self._operands(node, range(2), broadcast=False)
        self._own()
        if alpha != 1:
            self._temporary()
            self.made.append((self._broadcast(()), np.full((), alpha, np.float32)))
        if len(node.input) < 3 or not node.input[2]:
            return {}
        if beta == 1:
            return self._operands(node, [2], rank=2)
        self._operands(node, [2], broadcast=False)
        self._temporary()
        if self._shape(node.input[2]):
            self.made.append((self._broadcast(()), np.full((), beta, np.float32)))
        if len(self._shape(node.input[2])) < 2:
            self._broadcast(())
        return {}

    def _read_celu(self, node: onnx.NodeProto) -> None:
        alpha = next((attribute.f for attribute in node.attribute if attribute.name == "alpha"), 1.0)
        for weight, value in zip(self._temporary(3), (0.0, 1.0, alpha), strict=True):
            array = np.full((), value, np.float32)
            self.made.append((self._layer(weight), array))
            if self._shape(node.input[0]):
                self.made.append((self._broadcast(()), array))
        self._own(_LAYERS["Celu"])


_RULES: Mapping[str, Callable[[ParserNames, onnx.NodeProto], dict[int, str] | None]] = {
    **dict.fromkeys(_ELEMENTWISE, ParserNames._read_elementwise),
    **dict.fromkeys(("MatMul", "PRelu", "Where"), ParserNames._read_broadcasting),
    **dict.fromkeys(("GreaterOrEqual", "LessOrEqual"), ParserNames._read_or_equal),
    **dict.fromkeys(("LogSoftmax", "Softmax"), ParserNames._read_softmax),
    **dict.fromkeys(("Squeeze", "Unsqueeze"), ParserNames._read_squeeze),
    **dict.fromkeys(("ArgMax", "ArgMin"), ParserNames._read_arg),
    **dict.fromkeys(("DepthToSpace", "SpaceToDepth"), ParserNames._read_depth_to_space),
    **dict.fromkeys(("Concat", "Erf"), ParserNames._read_joined),
    "BatchNormalization": ParserNames._read_batch_normalization,
    "Celu": ParserNames._read_celu,
    "Clip": ParserNames._read_clip,
    "ConstantOfShape": ParserNames._read_constant_of_shape,
    "Expand": ParserNames._read_expand,
    "Flatten": ParserNames._read_flatten,
    "Gather": ParserNames._read_gather,
    "Gemm": ParserNames._read_gemm,
    "InstanceNormalization": ParserNames._read_instance_normalization,
    "LayerNormalization": ParserNames._read_layer_normalization,
    "Pad": ParserNames._read_pad,
    "Reshape": ParserNames._read_reshape,
    "Slice": ParserNames._read_slice,
    "Split": ParserNames._read_split,
    "Tile": ParserNames._read_tile,
    "TopK": ParserNames._read_top_k,
}
"""Operator -> what counts its layers, and names its inputs' broadcasts; others are as many as :data:`_LAYERS` says."""


def _shapes(graph: onnx.GraphProto) -> Mapping[str, Shape]:
    """The dimensions of the values that have a shape."""
    found: dict[str, Shape] = {weight.name: tuple(weight.dims) for weight in graph.initializer}
    for value in [*graph.input, *graph.value_info, *graph.output]:
        if value.name not in found and value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            found[value.name] = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in dims)
    for node in graph.node:
        if node.op_type == "Constant":
            found.setdefault(
                node.output[0], next((tuple(item.t.dims) for item in node.attribute if item.name == "value"), ())
            )
    return found


def _integers_of(graph: onnx.GraphProto) -> tuple[frozenset[str], frozenset[str]]:
    """Constants that are all 1, and those that hold a negative number."""
    from onnx import numpy_helper

    tensors = {weight.name: weight for weight in graph.initializer if len(weight.dims) < 2}
    for node in graph.node:
        if node.op_type == "Constant":
            tensors.update((node.output[0], item.t) for item in node.attribute if item.name == "value")
    arrays = {
        name: numpy_helper.to_array(tensor)
        for name, tensor in tensors.items()
        if tensor.data_location != tensor.EXTERNAL
    }
    return (
        frozenset(name for name, array in arrays.items() if (array == 1).all()),
        frozenset(name for name, array in arrays.items() if array.dtype.kind == "i" and (array < 0).any()),
    )
