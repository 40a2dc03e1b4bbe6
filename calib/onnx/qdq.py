"""Explicit quantization of any ONNX network: quantize/dequantize pairs (Q/DQ) at a table's scales.

The layout is what TensorRT fuses (developer guide, "Working with Quantized Types"): pairs in front of convolutions,
matrix products and pooling, and on the shortcut of a residual sum; none between a convolution and its activation or
sum, and none behind the last layer; linear layers are convolutions (:mod:`calib.onnx.form`). Where two convolutions
meet in a sum, the second is the shortcut, as in ``engines.tensorrt.form``. Weights are int8, symmetric, per output
channel; biases stay in float.

Imports onnx inside functions: it is slow to load.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from calib.int8 import weight_scales
from calib.onnx.form import linear_as_convolution
from calib.onnx.graph import RESHAPES, WEIGHTED, Graph
from calib.onnx.model import constant, element_types, name_nodes, no_floats
from calib.onnx.pairs import Activation, Weight, channel_axis, write_pairs
from calib.onnx.pools import pad_in_front
from calib.table import CalibrationTable
from common.errors import InputError, first_line

if TYPE_CHECKING:
    import onnx

PER_CHANNEL_OPSET: Final = 13
"""First operator set whose DequantizeLinear takes a scale for each channel."""

_HALF_OPSET: Final = 19
"""First operator set whose QuantizeLinear takes float16."""

_BIAS_CODES: Final = 2**15
"""Codes of a bias at most, in steps of input scale * weight scale, where these are float16, which ends at 2**16."""

_NEWEST_OPSET: Final = 20
"""From 21 on, ONNX Runtime (1.32) mixes up the types of the pairs that it adds itself on x86, and refuses the network:
behind a pooling, and behind the reshape that it puts in front of a matrix product with a bias."""

_POOLING: Final = frozenset({"AveragePool", "GlobalAveragePool", "MaxPool"})
_NO_ARITHMETIC: Final = RESHAPES | {
    *("Cast", "Concat", "ConcatFromSequence", "Constant", "ConstantOfShape", "Dropout", "Expand", "Gather"),
    *("OptionalGetElement", "Pad", "SequenceAt", "Shape", "Slice", "Split", "Tile", "Transpose"),
}


@dataclass(frozen=True)
class QuantizedModel:
    """A network with explicit quantization.

    Attributes:
        model: With pairs of QuantizeLinear and DequantizeLinear, and int8 weights.
        int8: Kind of operator -> how many compute in INT8.
        floats: Kind of operator -> how many compute in float; what only moves values is not counted.
        missing: Operator that could compute in INT8 -> the tensor for which the table has no usable scale.
    """

    model: onnx.ModelProto
    int8: Mapping[str, int]
    floats: Mapping[str, int]
    missing: Mapping[str, str]


def quantize(model: onnx.ModelProto, table: CalibrationTable, path: Path) -> QuantizedModel:
    """Put the pairs into a float network.

    Args:
        model: The network, as :func:`calib.onnx.model.read_float_model` reads it.
        table: Its calibration table.
        path: Its file, in whose folder external weights lie.

    Raises:
        InputError: the operator set is too old and cannot be converted, or nothing can be quantized.
    """
    import onnx

    usable = {name: scale for name, scale in table.scales.items() if name not in table.unusable}
    form = linear_as_convolution(_with_opset(model, path), usable, path.parent)
    model = form.model
    usable = {**{map_: usable[flat] for map_, flat in form.maps.items() if flat in usable}, **usable}
    result = onnx.ModelProto()
    result.CopyFrom(model)
    chosen = _Choice(model, usable, name_nodes(result), path)
    chosen.take_layers()
    chosen.take_others()
    if not chosen.nodes and chosen.missing:
        raise InputError(f"nothing in {path} can be quantized with this table: it has no scale for what layers read")
    if not chosen.nodes:
        raise InputError(
            f"nothing in {path} can be quantized: it has no convolution and no matrix product with float32 weights "
            "or float16 ones"
        )
    write_pairs(result, chosen.activations, list(chosen.weights.values()), folder=path.parent)
    pad_in_front(result)
    others = chosen.graph.constant | no_floats(model)
    kinds = Counter(chosen.graph.nodes[index].op_type for index in chosen.nodes)
    rest = Counter(
        node.op_type
        for index, node in enumerate(chosen.graph.nodes)
        if index not in chosen.nodes and node.op_type not in _NO_ARITHMETIC and not others.issuperset(node.output)
    )
    return QuantizedModel(result, dict(kinds.most_common()), dict(rest.most_common()), chosen.missing)


class _Choice:
    """What of a network is quantized.

    Args:
        model: The network.
        usable: Scales of its values.
        names: Of its nodes, in order.
        path: Its file, in whose folder external weights lie.

    Attributes:
        graph: The network by name.
        nodes: Positions of the operators that compute in INT8.
        activations: Value -> how it is quantized.
        weights: Weight and its axis of channels -> how it is quantized.
        missing: As :attr:`QuantizedModel.missing`.
    """

    def __init__(self, model: onnx.ModelProto, usable: Mapping[str, float], names: Sequence[str], path: Path) -> None:
        self.graph = Graph(model)
        self.nodes: set[int] = set()
        self.activations: dict[str, Activation] = {}
        self.weights: dict[tuple[str, int | None], Weight] = {}
        self.missing: dict[str, str] = {}
        self._model, self._usable, self._names, self._path = model, usable, names, path
        self._types = element_types(model)
        self._newest = _opset(model) > _NEWEST_OPSET

    def take_layers(self) -> None:
        """Take the layers with weights."""
        for index, node in enumerate(self.graph.nodes):
            weight = _weight(node, self._model, self.graph, self._path)
            if weight is None or (self._newest and _has_bias_behind(self.graph, node)):
                continue
            if self._takes(node.input[0], index):
                self._quantize_weight(node, weight, self._names[index])

    def take_others(self) -> None:
        """Take the pooling and the residual sums that belong to the layers."""
        for index, slot in _others(self.graph, self.nodes):
            node = self.graph.nodes[index]
            if not (self._newest and node.op_type in _POOLING):
                self._takes(node.input[slot], index)

    def _takes(self, value: str, index: int) -> bool:
        """Quantize a value for an operator that reads it, if it has a scale."""
        import onnx

        if value not in self._usable:
            node = self.graph.nodes[index]
            self.missing[node.name or node.op_type] = value
            return False
        self.nodes.add(index)
        half = self._types.get(value) == onnx.TensorProto.FLOAT16
        activation = self.activations.setdefault(value, Activation(self._usable[value], set(), half=half))
        activation.readers.add(self._names[index])
        return True

    def _quantize_weight(self, node: onnx.NodeProto, weight: NDArray[Any], reader: str) -> None:
        value, name = node.input[:2]
        axis = channel_axis(node, weight.ndim)
        scales: NDArray[Any] = _scales(weight, axis)
        if weight.dtype == np.float16:
            bias = constant(self._model, node.input[2], self._path.parent) if any(node.input[2:]) else None
            scales = _half_scales(scales, bias, self._usable[value])
        before = self.weights.get((name, axis))
        readers = {reader, *(before.readers or () if before is not None else ())}
        self.weights[name, axis] = Weight(name, axis, scales, None, self._usable[value], readers)


def _opset(model: onnx.ModelProto) -> int:
    return next((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), 1)


def _with_opset(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """The model in an operator set whose pairs can hold its values, and that ONNX Runtime loads with pairs."""
    import onnx

    version = _opset(model)
    half = onnx.TensorProto.FLOAT16 in element_types(model).values()
    least, what = (_HALF_OPSET, "pairs in float16") if half else (PER_CHANNEL_OPSET, "int8 weights per channel")
    if least <= version <= _NEWEST_OPSET:
        return model
    given = onnx.ModelProto()
    given.CopyFrom(model)
    # Before version 4 all weights are inputs as well; the converter insists on it, ONNX Runtime does not.
    given.ir_version = max(model.ir_version, 4)
    try:
        converted = onnx.version_converter.convert_version(given, min(max(version, least), _NEWEST_OPSET))
    except Exception as error:  # it raises what its C++ side raises
        if version > _NEWEST_OPSET:
            return model
        raise InputError(
            f"{path} has operator set {version}, and {what} need {least}, to which it cannot be converted: "
            f"{first_line(error)}"
        ) from error
    converted.ir_version = model.ir_version
    _keep_names(converted, model)
    return converted


def _keep_names(converted: onnx.ModelProto, model: onnx.ModelProto) -> None:
    """Give the values of a converted network, whose operators may have become others, the names that the table has."""
    known = {name for node in model.graph.node for name in (*node.input, *node.output)}
    before = {node.output[0]: node for node in model.graph.node if node.output}
    names: dict[str, str] = {}
    for node in converted.graph.node:
        given = before.get(node.output[0])
        if given is not None and given.op_type == node.op_type:
            pairs = zip(node.input, given.input, strict=False)
            names.update({new: old for new, old in pairs if new not in known and old in before})
    for node in converted.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]


def _weight(node: onnx.NodeProto, model: onnx.ModelProto, graph: Graph, path: Path) -> NDArray[Any] | None:
    """The constant weight of a layer that can compute in INT8, float32 or float16, or None."""
    if node.op_type not in WEIGHTED or len(node.input) < 2 or node.input[0] in graph.constant:
        return None
    if node.op_type == "Gemm" and any(attribute.name == "transA" and attribute.i for attribute in node.attribute):
        return None
    array = constant(model, node.input[1], path.parent) if node.input[1] in graph.constant else None
    if array is None or array.dtype not in (np.float32, np.float16) or array.ndim < 2 or not np.isfinite(array).all():
        return None
    return array


def _half_scales(scales: NDArray[np.float32], bias: NDArray[Any] | None, input_scale: float) -> NDArray[np.float16]:
    """The scales of a float16 weight, in float16.

    ONNX Runtime divides the bias by input scale * weight scale, in float16: the scales are so large that the product is
    not 0 and the quotient not infinite. That takes larger steps where the bias of a channel is far above its products.
    """
    smallest = np.float32(np.finfo(np.float16).smallest_subnormal)
    steps: NDArray[Any] = np.full_like(scales, smallest)
    if bias is not None:
        offsets = np.abs(bias.astype(np.float32))
        # A Gemm may broadcast its bias, and a weight of one scale has it for all channels.
        offsets = offsets.reshape(scales.shape) if offsets.size == scales.size else offsets.max()
        steps = np.maximum(steps, offsets / _BIAS_CODES)
    return np.maximum(scales, np.maximum(steps / input_scale, smallest)).astype(np.float16)


def _has_bias_behind(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether ONNX Runtime makes one operator of a matrix product and the sum behind it."""
    reader = graph.sole_reader(node.output[0])
    return node.op_type == "MatMul" and reader is not None and reader.op_type == "Add"


def _scales(weight: NDArray[Any], axis: int | None) -> NDArray[np.float32]:
    """The scales of a weight, float32 [channels] along ``axis``; the single one of the whole weight if None."""
    channels = weight[np.newaxis] if axis is None else np.moveaxis(weight, axis, 0)
    scales: NDArray[np.float32] = weight_scales(torch.from_numpy(channels.astype(np.float32))).numpy()
    return scales[0] if axis is None else scales


def _others(graph: Graph, chosen: set[int]) -> Iterable[tuple[int, int]]:
    """Pooling and residual sums that belong to INT8 layers: (node, the input that is quantized)."""
    position = {id(node): index for index, node in enumerate(graph.nodes)}
    for index in reversed(range(len(graph.nodes))):
        node = graph.nodes[index]
        if node.op_type in _POOLING and node.input[0] not in graph.constant:
            if any(position[id(reader)] in chosen for reader in _readers(graph, node.output[0])):
                yield index, 0
        elif node.op_type == "Add" and len({*node.input} - graph.constant) == 2:
            inner = [
                slot
                for slot, name in enumerate(node.input)
                if name in graph.producer
                and graph.producer[name].op_type in ("Conv", "ConvTranspose")
                and position[id(graph.producer[name])] in chosen
                and graph.sole_reader(name) is not None
            ]
            if inner:
                yield index, 1 - inner[0]


def _readers(graph: Graph, value: str) -> Iterable[onnx.NodeProto]:
    """What reads a value, also behind reshapes."""
    for node in graph.readers.get(value, ()):
        yield node
        if node.op_type in RESHAPES:
            yield from _readers(graph, node.output[0])
