"""Explicit quantization of any ONNX network: quantize/dequantize pairs (Q/DQ) at a table's scales, and back.

The layout is what TensorRT fuses (developer guide, "Working with Quantized Types"): pairs in front of convolutions,
matrix products and pooling, and on the shortcut of a residual sum; none between a convolution and its activation or
sum, and none behind the last layer. Where two convolutions meet in a sum, the second is the shortcut, as in
``engines.tensorrt.form``. Weights are int8, symmetric, per output channel; biases stay in float.

Imports onnx inside functions: it is slow to load.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from calib.onnx_model import QUANTIZERS, constant, no_floats
from calib.onnx_rules import ACTIVATIONS, RESHAPES, WEIGHTED, Graph
from calib.table import LEVELS, CalibrationTable
from common.errors import InputError, first_line

if TYPE_CHECKING:
    import onnx

PER_CHANNEL_OPSET: Final = 13
"""First operator set whose DequantizeLinear takes a scale for each channel."""

_NEWEST_OPSET: Final = 20
"""From 21 on, ONNX Runtime (1.32) refuses pairs around pooling on x86: it mixes up the types of those that it adds."""

_POOLING: Final = frozenset({"AveragePool", "GlobalAveragePool", "MaxPool"})
_SAME_SCALE: Final = RESHAPES | {"MaxPool", "Transpose", "Pad", "Dropout"}
_NO_ARITHMETIC: Final = RESHAPES | {
    "Cast",
    "Concat",
    "Constant",
    "Dropout",
    "Gather",
    "Pad",
    "Shape",
    "Slice",
    "Split",
    "Transpose",
}


@dataclass(frozen=True)
class Quantized:
    """A network with explicit quantization.

    Attributes:
        model: The network.
        int8: Kind of operator -> how many compute in INT8.
        floats: Kind of operator -> how many compute in float; what only moves values is not counted.
        missing: Operator that could compute in INT8 -> the tensor for which the table has no usable scale.
    """

    model: onnx.ModelProto
    int8: Mapping[str, int]
    floats: Mapping[str, int]
    missing: Mapping[str, str]


def quantize(model: onnx.ModelProto, table: CalibrationTable, path: Path) -> Quantized:
    """Put the pairs into a float network.

    Args:
        model: The network, as :func:`calib.onnx_model.read_float_model` reads it.
        table: Its calibration table.
        path: Its file, in whose folder external weights lie.

    Raises:
        InputError: the operator set is too old and cannot be converted, or nothing can be quantized.
    """
    import onnx

    model = _with_opset(model, path)
    graph = Graph(model)
    usable = {name: scale for name, scale in table.scales.items() if name not in table.unusable}
    result = onnx.ModelProto()
    result.CopyFrom(model)
    insert = _Insertion(result)
    missing: dict[str, str] = {}
    chosen: set[int] = set()
    for index, node in enumerate(graph.nodes):
        weight = _weight(node, graph, path)
        if weight is None:
            continue
        if node.input[0] not in usable:
            missing[node.name or node.op_type] = node.input[0]
            continue
        chosen.add(index)
        insert.activation(index, 0, usable[node.input[0]])
        insert.weight(index, 1, weight, _channel_axis(node, weight))
    for index, slot in _others(graph, chosen):
        name = graph.nodes[index].input[slot]
        if name in usable:
            chosen.add(index)
            insert.activation(index, slot, usable[name])
        else:
            missing[graph.nodes[index].name or graph.nodes[index].op_type] = name
    if not chosen:
        raise InputError(f"nothing in {path} can be quantized with this table: it has no scale for what layers read")
    insert.finish()
    others = graph.constant | no_floats(model)
    kinds = Counter(graph.nodes[index].op_type for index in chosen)
    rest = Counter(
        node.op_type
        for index, node in enumerate(graph.nodes)
        if index not in chosen and node.op_type not in _NO_ARITHMETIC and not others.issuperset(node.output)
    )
    return Quantized(result, dict(kinds.most_common()), dict(rest.most_common()), missing)


def _with_opset(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """The model in an operator set that knows a scale for each channel, and that ONNX Runtime loads with pairs."""
    import onnx

    version = next((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), 1)
    if PER_CHANNEL_OPSET <= version <= _NEWEST_OPSET:
        return model
    try:
        return onnx.version_converter.convert_version(model, min(max(version, PER_CHANNEL_OPSET), _NEWEST_OPSET))
    except Exception as error:  # it raises what its C++ side raises
        if version > _NEWEST_OPSET:
            return model
        raise InputError(
            f"{path} has operator set {version}, and int8 weights per channel need {PER_CHANNEL_OPSET}, to which it "
            f"cannot be converted: {first_line(error)}"
        ) from error


def _weight(node: onnx.NodeProto, graph: Graph, path: Path) -> NDArray[np.float32] | None:
    """The constant weight of a layer that can compute in INT8, or None."""
    from onnx import numpy_helper

    if node.op_type not in WEIGHTED or len(node.input) < 2 or node.input[0] in graph.constant:
        return None
    if node.op_type == "Gemm" and any(attribute.name == "transA" and attribute.i for attribute in node.attribute):
        return None
    name = node.input[1]
    if name in graph.weights:
        array = numpy_helper.to_array(graph.weights[name], base_dir=str(path.parent))
    elif name in graph.producer and graph.producer[name].op_type == "Constant":
        from calib.onnx_model import constant_value

        found = constant_value(graph.producer[name])
        if found is None:
            return None
        array = found
    else:
        return None
    return array if array.dtype == np.float32 and array.ndim >= 2 and np.isfinite(array).all() else None


def _channel_axis(node: onnx.NodeProto, weight: NDArray[Any]) -> int | None:
    """The output channels' axis, or None where there is one scale for all."""
    integers = {attribute.name: attribute.i for attribute in node.attribute}
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1 if integers.get("group", 1) == 1 else None
    if node.op_type == "Gemm":
        return 0 if integers.get("transB") else 1
    return 1 if weight.ndim == 2 else None


def _others(graph: Graph, chosen: set[int]) -> Iterable[tuple[int, int]]:
    """Pooling and residual sums that belong to INT8 layers: (node, the input that is quantized)."""
    position = {id(node): index for index, node in enumerate(graph.nodes)}
    for index in reversed(range(len(graph.nodes))):
        node = graph.nodes[index]
        if node.op_type in _POOLING and node.input[0] not in graph.constant:
            if any(position[id(reader)] in chosen for reader in _readers(graph, node.output[0])):
                yield index, 0
        elif node.op_type == "Add" and not graph.constant.intersection(node.input):
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


class _Insertion:
    """Collects what is put into a model, and puts it in."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model
        self._before: dict[int, list[onnx.NodeProto]] = {}
        self._replaced: dict[str, str] = {}
        self._taken = {name for node in model.graph.node for name in (*node.input, *node.output)}
        self._taken.update(weight.name for weight in model.graph.initializer)

    def activation(self, index: int, slot: int, scale: float) -> None:
        """Let a node read an input through a pair."""
        import onnx

        name = self._model.graph.node[index].input[slot]
        if name not in self._replaced:
            factor = self._initializer(f"{name}_scale", np.array(scale, np.float32))
            zero = self._initializer(f"{name}_zero_point", np.array(0, np.int8))
            codes, values = self._name(f"{name}_quantized"), self._name(f"{name}_dequantized")
            first = self._first_reader(name)
            self._before.setdefault(first, []).extend(
                [
                    onnx.helper.make_node("QuantizeLinear", [name, factor, zero], [codes], f"{name}_QuantizeLinear"),
                    onnx.helper.make_node(
                        "DequantizeLinear", [codes, factor, zero], [values], f"{name}_DequantizeLinear"
                    ),
                ]
            )
            self._replaced[name] = values
        self._model.graph.node[index].input[slot] = self._replaced[name]

    def weight(self, index: int, slot: int, weight: NDArray[np.float32], axis: int | None) -> None:
        """Let a node read its weight from int8."""
        import onnx

        name = self._model.graph.node[index].input[slot]
        key = f"{name} {axis}"
        if key not in self._replaced:
            over = None if axis is None else tuple(other for other in range(weight.ndim) if other != axis)
            scales = np.abs(weight).max(axis=over) / np.float32(LEVELS)
            # A channel of zeros takes any scale.
            scales = np.where(scales < np.finfo(np.float32).tiny, np.float32(1), scales).astype(np.float32)
            shape = [-1 if other == axis else 1 for other in range(weight.ndim)]
            quotients = weight / (scales if axis is None else scales.reshape(shape))
            codes = np.clip(np.rint(quotients), -LEVELS, LEVELS).astype(np.int8)
            inputs = [
                self._initializer(f"{name}_quantized", codes),
                self._initializer(f"{name}_scale", scales),
                self._initializer(f"{name}_zero_point", np.zeros(scales.shape, np.int8)),
            ]
            values = self._name(f"{name}_dequantized")
            attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
            made = onnx.helper.make_node("DequantizeLinear", inputs, [values], f"{name}_DequantizeLinear", **attributes)
            self._before.setdefault(0, []).append(made)
            self._replaced[key] = values
        self._model.graph.node[index].input[slot] = self._replaced[key]

    def finish(self) -> None:
        """Put the new nodes in, and drop weights that nothing reads any more."""
        import onnx

        nodes = []
        for index, node in enumerate(self._model.graph.node):
            nodes += [*self._before.get(index, ()), node]
        kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del self._model.graph.node[:]
        self._model.graph.node.extend(kept)
        graph = Graph(self._model)
        read = {*graph.readers, *graph.outputs}
        weights = [weight for weight in self._model.graph.initializer if weight.name in read]
        copies = [onnx.TensorProto.FromString(weight.SerializeToString()) for weight in weights]
        del self._model.graph.initializer[:]
        self._model.graph.initializer.extend(copies)
        inputs = [value for value in self._model.graph.input if value.name in read or value.name in graph.inputs]
        values = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in inputs]
        del self._model.graph.input[:]
        self._model.graph.input.extend(values)

    def _first_reader(self, name: str) -> int:
        return next(index for index, node in enumerate(self._model.graph.node) if name in node.input)

    def _initializer(self, name: str, array: NDArray[Any]) -> str:
        import onnx

        name = self._name(name)
        self._model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
        return name

    def _name(self, name: str) -> str:
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name


@dataclass(frozen=True)
class FromQdq:
    """What :func:`table_of_quantized` found.

    Attributes:
        scales: Tensor -> scale, in the network's order.
        asymmetric: Tensors whose zero point is not that of a symmetric range, which their scale here covers.
        unknown: Tensors that the pairs say nothing about.
        model: The float network that the table goes with: without the pairs, weights rounded as they were.
    """

    scales: Mapping[str, float]
    asymmetric: tuple[str, ...]
    unknown: tuple[str, ...]
    model: onnx.ModelProto


def table_of_quantized(model: onnx.ModelProto, path: Path) -> FromQdq:
    """The scales of a network that was trained with quantization, or quantized by another tool.

    A value that is quantized in several places takes the largest scale. Values without a pair take the scale of what
    they are reshaped or pooled from, or, where an activation alone reads them, that of the activation.

    Args:
        model: The network with pairs, as :func:`calib.onnx_model.read_model` reads it.
        path: Its file, in whose folder external weights lie.

    Raises:
        InputError: the network has no pairs around its values, or scales that are no constants or per channel.
    """
    quantizers = [node for node in model.graph.node if node.op_type in QUANTIZERS]
    if not quantizers:
        raise InputError(f"{path} has no quantize/dequantize operators: python -m calib calibrate makes its table")
    graph = Graph(model)
    scales: dict[str, float] = {}
    asymmetric: dict[str, None] = {}
    for node in quantizers:
        if node.op_type != "QuantizeLinear" or node.input[0] in graph.constant:
            continue
        scale = _constant(model, node, 1, path)
        zero = _constant(model, node, 2, path) if len(node.input) > 2 and node.input[2] else np.array(0, np.uint8)
        if scale.size != 1 or zero.size != 1:
            raise InputError(f"{path}: {node.input[0]!r} is quantized per channel, which no calibration table can hold")
        if zero.dtype not in (np.int8, np.uint8):
            raise InputError(f"{path}: {node.input[0]!r} is quantized to {zero.dtype}, and a table is of int8")
        offset = int(zero.item()) - (128 if zero.dtype == np.uint8 else 0)
        if offset:
            asymmetric.setdefault(node.input[0])
        found = float(scale.item()) * (LEVELS + abs(offset)) / LEVELS
        scales[node.input[0]] = max(found, scales.get(node.input[0], 0.0))
    if not scales:
        raise InputError(f"{path} quantizes its weights alone, and no value that a table could name")
    stripped = _without_pairs(model, path)
    graph = Graph(stripped)
    _spread(graph, scales)
    tensors = [*graph.inputs, *(name for node in graph.nodes for name in node.output if name not in graph.constant)]
    ordered = {name: scales[name] for name in tensors if name in scales}
    others = no_floats(stripped)
    unknown = tuple(name for name in tensors if name and name not in scales and name not in others)
    return FromQdq(ordered, tuple(name for name in asymmetric if name in ordered), unknown, stripped)


def _constant(model: onnx.ModelProto, node: onnx.NodeProto, slot: int, path: Path) -> NDArray[Any]:
    array = constant(model, node.input[slot], path.parent)
    if array is None:
        raise InputError(f"{path}: the scale or zero point of {node.input[0]!r} is no constant")
    return array


def _spread(graph: Graph, scales: dict[str, float]) -> None:
    """Give values without a scale the one that their neighbours determine, until nothing changes."""
    changed = True
    while changed:
        changed = False
        for node in graph.nodes:
            if not node.input or not node.output:
                continue
            source, result = node.input[0], node.output[0]
            if source in graph.constant or not result:
                continue
            if node.op_type in _SAME_SCALE and source in scales and result not in scales:
                scales[result], changed = scales[source], True
            moved = node.op_type in _SAME_SCALE or (node.op_type in ACTIVATIONS and graph.sole_reader(source) is node)
            if moved and result in scales and source not in scales:
                scales[source], changed = scales[result], True


def _without_pairs(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """The float network: values are read directly, weights are what they were rounded to."""
    import onnx

    result = onnx.ModelProto()
    result.CopyFrom(model)
    producer = {name: node for node in result.graph.node for name in node.output}
    outputs = {value.name for value in result.graph.output}
    direct: dict[str, str] = {}
    nodes = []
    for node in result.graph.node:
        if node.op_type == "QuantizeLinear":
            direct[node.output[0]] = direct.get(node.input[0], node.input[0])
        elif node.op_type == "DequantizeLinear":
            source = direct.get(node.input[0])
            if source is None or (source not in producer and _is_weight(result, source)):
                weight = _rounded(model, node, source, path)
                result.graph.initializer.append(onnx.numpy_helper.from_array(weight, node.output[0]))
            elif node.output[0] in outputs:
                nodes.append(onnx.helper.make_node("Identity", [source], [node.output[0]], node.name))
            else:
                direct[node.output[0]] = source
        else:
            nodes.append(node)
    for node in nodes:
        node.input[:] = [direct.get(name, name) for name in node.input]
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del result.graph.node[:]
    result.graph.node.extend(kept)
    read = {name for node in result.graph.node for name in node.input} | outputs
    weights = [onnx.TensorProto.FromString(weight.SerializeToString()) for weight in result.graph.initializer]
    del result.graph.initializer[:]
    result.graph.initializer.extend(weight for weight in weights if weight.name in read)
    return result


def _is_weight(model: onnx.ModelProto, name: str) -> bool:
    return any(weight.name == name for weight in model.graph.initializer)


def _rounded(model: onnx.ModelProto, node: onnx.NodeProto, source: str | None, path: Path) -> NDArray[np.float32]:
    """The value of a weight behind its DequantizeLinear: of int8 codes, or of a float weight that is quantized."""
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
    scale = _constant(model, node, 1, path)
    zero = _constant(model, node, 2, path) if len(node.input) > 2 and node.input[2] else np.array(0, np.uint8)
    array = constant(model, source or node.input[0], path.parent)
    if array is None:
        raise InputError(f"{path}: {node.input[0]!r} is dequantized, and is neither a weight nor quantized before")
    if scale.size > 1:
        shape = [-1 if other == axis % array.ndim else 1 for other in range(array.ndim)]
        scale, zero = scale.reshape(shape), zero.reshape(shape) if zero.size > 1 else zero
    offset = zero.astype(np.float32)
    if source is not None:
        limits = np.iinfo(zero.dtype)
        array = np.clip(np.rint(array / scale) + offset, limits.min, limits.max)
    rounded: NDArray[np.float32] = ((array.astype(np.float32) - offset) * scale).astype(np.float32)
    return rounded
