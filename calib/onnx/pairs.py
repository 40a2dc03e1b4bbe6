"""Writing quantize/dequantize pairs (Q/DQ) and 8-bit weights into an ONNX graph.

Imports onnx inside functions: it is slow to load.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from calib.int8 import WEIGHT_MAX
from calib.onnx.graph import Graph
from calib.onnx.model import attributes, constant, free_name, replace_items, values_read

if TYPE_CHECKING:
    import onnx

MIDDLE: Final = 128
"""Zero point of values and weights in uint8 whose codes are those of int8, moved up by it."""

_WEIGHTS_ALONE: Final = 4
"""First version of the file format in which weights need not be inputs as well."""

_LEAST_IR: Final = 7
"""Version of the file format that came with operator set 13, whose DequantizeLinear takes a scale for each channel."""


@dataclass
class Activation:
    """A value that INT8 layers read.

    Attributes:
        scale: Its scale.
        readers: Names of the ONNX nodes that read it quantized.
        put_out: Whether it is put out quantized, too, if it is an output of the network.
        half: Whether the value is float16, and so its scale is.
        zero_point: Of its codes in uint8: 128 where they are those of int8, moved up; 0 where they are 0 to 127
            already. None for int8 with zero point 0.
    """

    scale: float
    readers: set[str]
    put_out: bool = False
    half: bool = False
    zero_point: int | None = None


@dataclass(frozen=True)
class Weight:
    """The weight of a layer in INT8.

    Attributes:
        name: The initializer, or what a Constant node gives.
        axis: Of its output channels, or None where there is one scale for all.
        scales: One for each of them, [channels] or []; of float16 where the weight is, else of float32.
        bias: The initializer of the layer's bias, or None.
        input_scale: Of the value that the layer reads.
        readers: Names of the ONNX nodes that read it quantized; None for all.
    """

    name: str
    axis: int | None
    scales: NDArray[Any]
    bias: str | None
    input_scale: float
    readers: Set[str] | None = None


def channel_axis(node: onnx.NodeProto, dimensions: int) -> int | None:
    """The axis of the output channels in a weight of so many dimensions, or None where there is one scale for all."""
    given = attributes(node)
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1 if given.get("group", 1) == 1 else None
    if node.op_type == "Gemm":
        return 0 if given.get("transB") else 1
    return 1 if dimensions == 2 else None


def write_pairs(
    model: onnx.ModelProto,
    activations: Mapping[str, Activation],
    weights: Sequence[Weight],
    *,
    folder: Path | None = None,
    integer_biases: bool = False,
) -> None:
    """Quantize values and weights of a float network, in place.

    A pair follows each value; weights are stored as codes, with their DequantizeLinear. Names are those that ONNX
    Runtime's quantizer gives: ``<value>_QuantizeLinear_Output``, ``<weight>_quantized``, ``<value>_scale``, ...

    Args:
        model: The network. Readers are told by their nodes' names, which must differ.
        activations: Value -> how it is quantized.
        weights: The weights to quantize.
        folder: Where external weights lie.
        integer_biases: Whether the layers' biases become int32, of scale input scale * weight scale.
    """
    pairs = _Pairs(model, folder or Path())
    for weight in weights:
        pairs.weight(weight)
        if integer_biases and weight.bias is not None:
            pairs.bias(weight, weight.bias)
    for value, activation in activations.items():
        pairs.activation(value, activation)
    pairs.finish()


class _Pairs:
    """Collects what is written into a graph, and writes it."""

    def __init__(self, model: onnx.ModelProto, folder: Path) -> None:
        self._model = model
        self._folder = folder
        self._weights = {weight.name: weight for weight in model.graph.initializer}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in dict.fromkeys(node.input):
                self._readers.setdefault(name, []).append(node)
        self._outputs = {value.name for value in model.graph.output}
        self._first: list[onnx.NodeProto] = []
        self._after: dict[str, list[onnx.NodeProto]] = {}
        self._renamed: dict[str, str] = {}
        self._made: list[onnx.TensorProto] = []
        self._taken = {name for node in model.graph.node for name in (*node.input, *node.output)}
        self._taken.update(self._weights)
        self._node_names = {node.name for node in model.graph.node}

    def weight(self, weight: Weight) -> None:
        """Store a weight as codes: rint(weight / scale) in [-127, 127].

        What several layers read is stored for each of them: ONNX Runtime's ``session.x64quantprecision`` makes codes
        unsigned layer by layer, and fails where another one did so before.
        """
        values = self._constant(weight.name)
        shape = [-1 if axis == weight.axis else 1 for axis in range(values.ndim)]
        scales = weight.scales.astype(np.float32)
        codes = values / (scales if weight.axis is None else scales.reshape(shape))
        np.rint(codes, out=codes)
        np.clip(codes, -WEIGHT_MAX, WEIGHT_MAX, out=codes)
        stored, zero_points = codes.astype(np.int8), np.zeros(weight.scales.shape, np.int8)
        name = weight.name
        for reader in [node.name for node in self._readers.get(name, ())]:
            if weight.readers is None or reader in weight.readers:
                inputs = [
                    self._store(f"{name}_quantized", stored),
                    self._store(f"{name}_scale", weight.scales),
                    self._store(f"{name}_zero_point", zero_points),
                ]
                self._dequantized_constant(name, inputs, weight.axis, {reader})

    def bias(self, weight: Weight, bias: str) -> None:
        """Store a bias as int32."""
        scales = np.float32(weight.input_scale) * weight.scales
        limits = np.iinfo(np.int32)
        quotients = self._constant(bias).astype(np.float64) / scales.astype(np.float64)
        codes = np.rint(quotients).clip(limits.min, limits.max).astype(np.int32)
        inputs = [
            self._store(f"{bias}_quantized", codes),
            self._store(f"{bias}_quantized_scale", scales),
            self._store(f"{bias}_quantized_zero_point", np.zeros(scales.shape, np.int32)),
        ]
        self._dequantized_constant(bias, inputs, 0, weight.readers)

    def activation(self, value: str, activation: Activation) -> None:
        """Put a pair behind a value."""
        import onnx

        signed = activation.zero_point is None
        zero_point = np.array(activation.zero_point or 0, np.int8 if signed else np.uint8)
        parameters = [
            self._store(f"{value}_scale", np.array(activation.scale, np.float16 if activation.half else np.float32)),
            self._store(f"{value}_zero_point", zero_point),
        ]
        is_output = activation.put_out and value in self._outputs
        source = free_name(f"{value}_QuantizeLinear_Input", self._taken) if is_output else value
        codes = free_name(f"{value}_QuantizeLinear_Output", self._taken)
        pair = [
            onnx.helper.make_node(
                "QuantizeLinear", [source, *parameters], [codes], self._named(value, "QuantizeLinear")
            ),
            self._dequantize(value, [codes, *parameters]),
        ]
        self._after[value] = pair
        if is_output:
            # The output keeps its name, and is what comes out of the pair.
            self._renamed[value] = source
            pair[1].output[0] = value
        else:
            self._let_read(activation.readers, value, pair[1].output[0])

    def finish(self) -> None:
        """Write the new nodes and initializers, and drop the constants that nothing reads any more."""
        graph = self._model.graph
        nodes = [*self._first]
        for item in graph.input:
            nodes += self._after.get(item.name, [])
        for node in graph.node:
            nodes.append(node)
            for value in list(node.output):
                nodes += self._after.get(value, [])
            node.output[:] = [self._renamed.get(name, name) for name in node.output]
        replace_items(graph.node, nodes)
        written = Graph(self._model)
        read, kept = set(written.outputs), []
        for node in reversed(written.nodes):
            if not (written.constant.issuperset(node.output) and read.isdisjoint(node.output)):
                kept.append(node)
                read.update(values_read(node))
        replace_items(graph.node, reversed(kept))
        weights = [*graph.initializer, *self._made]
        # In old files all weights must be inputs as well; in others those are, which a user may replace.
        old = self._model.ir_version < _WEIGHTS_ALONE
        dropped = {weight.name for weight in weights if old or weight.name not in read}
        self._model.ir_version = max(self._model.ir_version, _LEAST_IR)
        replace_items(graph.input, [item for item in graph.input if item.name not in dropped])
        replace_items(graph.initializer, [weight for weight in weights if weight.name in read])

    def _constant(self, name: str) -> NDArray[Any]:
        from onnx import numpy_helper

        if name in self._weights:
            return numpy_helper.to_array(self._weights[name], base_dir=str(self._folder))
        array = constant(self._model, name, self._folder)
        assert array is not None, f"{name} is no constant"
        return array

    def _dequantized_constant(
        self, name: str, inputs: Sequence[str], axis: int | None, readers: Set[str] | None
    ) -> None:
        node = self._dequantize(name, inputs, axis)
        self._first.append(node)
        self._let_read(readers, name, node.output[0])

    def _let_read(self, readers: Set[str] | None, value: str, instead: str) -> None:
        """Let nodes read another value instead; all that read it if None."""
        for node in self._readers.get(value, ()):
            if readers is None or node.name in readers:
                node.input[:] = [instead if name == value else name for name in node.input]

    def _dequantize(self, name: str, inputs: Sequence[str], axis: int | None = None) -> onnx.NodeProto:
        import onnx

        output = free_name(f"{name}_DequantizeLinear_Output", self._taken)
        return onnx.helper.make_node(
            "DequantizeLinear", inputs, [output], self._named(name, "DequantizeLinear"), axis=axis
        )

    def _named(self, value: str, operator: str) -> str:
        """A name for a node, which no other one has."""
        return free_name(f"{value}_{operator}", self._node_names)

    def _store(self, name: str, array: NDArray[Any]) -> str:
        import onnx

        name = free_name(name, self._taken)
        self._made.append(onnx.numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name))
        return name
