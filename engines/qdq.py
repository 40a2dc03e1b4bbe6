"""Writing quantize/dequantize pairs (Q/DQ) and 8-bit weights into an ONNX graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from calib.int8 import WEIGHT_MAX

_MIDDLE: Final = 128
"""Zero point of values and weights in uint8: their codes are those of int8, moved up by it."""


@dataclass
class Activation:
    """A value that INT8 layers read: its scale, and the names of the ONNX nodes that read it quantized."""

    scale: float
    readers: set[str]


@dataclass(frozen=True)
class Weight:
    """The weight of a layer in INT8.

    Attributes:
        name: The initializer, which no other layer reads.
        axis: Of its output channels.
        scales: One for each of them, float32 [channels].
        bias: The initializer of the layer's bias, or None.
        input_scale: Of the value that the layer reads.
    """

    name: str
    axis: int
    scales: NDArray[np.float32]
    bias: str | None
    input_scale: float


def write_pairs(
    model: onnx.ModelProto,
    activations: Mapping[str, Activation],
    weights: Sequence[Weight],
    *,
    unsigned: bool = False,
    unsigned_weights: bool = False,
    integer_biases: bool = False,
) -> None:
    """Quantize values and weights of a float network, in place.

    A pair follows each value; weights are stored as codes, with their DequantizeLinear. Names are those that ONNX
    Runtime's quantizer gives: ``<value>_QuantizeLinear_Output``, ``<weight>_quantized``, ``<value>_scale``, ...

    Args:
        model: The network.
        activations: Value -> how it is quantized.
        weights: The weights to quantize.
        unsigned: Whether values are uint8 with zero point 128 instead of int8 with zero point 0.
        unsigned_weights: Likewise for weights.
        integer_biases: Whether the layers' biases become int32, of scale input scale * weight scale.
    """
    graph = model.graph
    pairs = _Pairs(graph)
    for weight in weights:
        pairs.weight(weight, unsigned_weights)
        if integer_biases and weight.bias is not None:
            pairs.bias(weight, weight.bias)
    for value, activation in activations.items():
        pairs.activation(value, activation, unsigned)
    pairs.finish()


class _Pairs:
    """Collects what is written into a graph, and writes it."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph
        self._nodes = {node.name: node for node in graph.node}
        self._weights = {weight.name: weight for weight in graph.initializer}
        self._outputs = {value.name for value in graph.output}
        self._constants: dict[str, onnx.NodeProto] = {}
        self._after: dict[str, list[onnx.NodeProto]] = {}
        self._renamed: dict[str, str] = {}
        self._made: list[onnx.TensorProto] = []

    def weight(self, weight: Weight, unsigned: bool) -> None:
        """Store a weight as codes: rint(weight / scale) in [-127, 127]."""
        values = onnx.numpy_helper.to_array(self._weights[weight.name])
        shape = [-1 if axis == weight.axis else 1 for axis in range(values.ndim)]
        codes = values / weight.scales.reshape(shape)
        np.rint(codes, out=codes)
        np.clip(codes, -WEIGHT_MAX, WEIGHT_MAX, out=codes)
        if unsigned:
            codes += _MIDDLE
        stored = codes.astype(np.uint8 if unsigned else np.int8)
        zero_points = np.full(weight.scales.shape, _MIDDLE if unsigned else 0, stored.dtype)
        name = weight.name
        inputs = [
            self._store(f"{name}_quantized", stored),
            self._store(f"{name}_scale", weight.scales),
            self._store(f"{name}_zero_point", zero_points),
        ]
        self._constants[name] = _dequantize(name, inputs, axis=weight.axis)

    def bias(self, weight: Weight, bias: str) -> None:
        """Store a bias as int32."""
        scales = np.float32(weight.input_scale) * weight.scales
        values = onnx.numpy_helper.to_array(self._weights[bias]).astype(np.float64)
        limits = np.iinfo(np.int32)
        codes = np.rint(values / scales.astype(np.float64)).clip(limits.min, limits.max).astype(np.int32)
        inputs = [
            self._store(f"{bias}_quantized", codes),
            self._store(f"{bias}_quantized_scale", scales),
            self._store(f"{bias}_quantized_zero_point", np.zeros(scales.shape, np.int32)),
        ]
        self._constants[bias] = _dequantize(bias, inputs, axis=0)

    def activation(self, value: str, activation: Activation, unsigned: bool) -> None:
        """Put a pair behind a value."""
        zero_point = np.array(_MIDDLE, np.uint8) if unsigned else np.array(0, np.int8)
        parameters = [
            self._store(f"{value}_scale", np.array(activation.scale, np.float32)),
            self._store(f"{value}_zero_point", zero_point),
        ]
        is_output = value in self._outputs
        source = f"{value}_QuantizeLinear_Input" if is_output else value
        codes = f"{value}_QuantizeLinear_Output"
        pair = [
            onnx.helper.make_node("QuantizeLinear", [source, *parameters], [codes], f"{value}_QuantizeLinear"),
            _dequantize(value, [codes, *parameters]),
        ]
        self._after[value] = pair
        if is_output:
            # The output keeps its name, and is what comes out of the pair.
            self._renamed[value] = source
            pair[1].output[0] = value
            return
        for reader in activation.readers:
            node = self._nodes[reader]
            node.input[:] = [pair[1].output[0] if name == value else name for name in node.input]

    def finish(self) -> None:
        """Write the new nodes and initializers, and drop the weights that nothing reads any more."""
        graph = self._graph
        nodes = [*self._constants.values()]
        for value in graph.input:
            nodes += self._after.get(value.name, [])
        for node in graph.node:
            node.input[:] = [
                self._constants[name].output[0] if name in self._constants else name for name in node.input
            ]
            nodes.append(node)
            for value in list(node.output):
                nodes += self._after.get(value, [])
            node.output[:] = [self._renamed.get(name, name) for name in node.output]
        _replace(graph.node, nodes)
        read = {name for node in graph.node for name in node.input}
        _replace(graph.initializer, [weight for weight in (*graph.initializer, *self._made) if weight.name in read])

    def _store(self, name: str, array: NDArray[Any]) -> str:
        self._made.append(onnx.numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name))
        return name


def _dequantize(name: str, inputs: Sequence[str], axis: int | None = None) -> onnx.NodeProto:
    return onnx.helper.make_node(
        "DequantizeLinear", inputs, [f"{name}_DequantizeLinear_Output"], f"{name}_DequantizeLinear", axis=axis
    )


def _replace(field: Any, items: Iterable[Any]) -> None:
    """Replace what a repeated field of a protocol buffer holds, possibly by some of the same."""
    copies = [type(item).FromString(item.SerializeToString()) for item in items]
    del field[:]
    field.extend(copies)
