"""Reading ONNX files: the graph without its external weights, and what cannot be calibrated in it."""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib.onnx.external import LARGEST_FILE
from common.errors import InputError, first_line

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

QUANTIZERS = frozenset({"QuantizeLinear", "DequantizeLinear"})

_INTEGER = re.compile(r"QLinear.+|Q(Attention|Gemm)|DynamicQuantize.+|.+Integer(ToFloat)?")
"""Operators that read codes and compute with them, as ONNX Runtime's quantizer writes them in its older formats."""

_SMALL = 1024
"""Values of a constant that may hold sizes."""


@dataclass(frozen=True)
class NetworkInput:
    """An input of a network.

    Attributes:
        name: Its name.
        shape: A number, or None where the size is free, for each dimension; None if the file does not say.
        dtype: As NumPy calls it.
    """

    name: str
    shape: tuple[int | None, ...] | None
    dtype: str

    @property
    def batch(self) -> int | None:
        """The fixed batch size, or None where it is free."""
        return self.shape[0] if self.shape else None

    def text(self) -> str:
        """Type and shape as in ``float32 [N, 3, 224, 224]``."""
        if self.shape is None:
            return f"{self.dtype} of any shape"
        sizes = [
            "N" if not index and size is None else "?" if size is None else str(size)
            for index, size in enumerate(self.shape)
        ]
        return f"{self.dtype} [{', '.join(sizes)}]"


def read_model(path: Path) -> onnx.ModelProto:
    """The network in the file ``path``, with its external weights left where they are.

    Functions are inlined, sparse weights are dense, nodes follow those whose results they read (TensorRT's parser sorts
    them, too), and free sizes have no number.

    Raises:
        InputError: the file cannot be read or is no ONNX network, or a file with its weights is missing.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        if path.stat().st_size >= LARGEST_FILE:
            raise InputError(f"{path} is larger than 2 GiB, which no ONNX file can be: save the weights beside it")
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except DecodeError as error:
        raise InputError(f"{path} is not an ONNX file, or a damaged one") from error
    if not model.graph.node or not model.opset_import:
        raise InputError(f"{path} is not an ONNX file, or an empty one")
    for weight in external_weights(model):
        where = {item.key: item.value for item in weight.external_data}
        stored = path.parent / where.get("location", "")
        if not stored.is_file():
            raise InputError(f"{stored}, which holds weights of {path.name}, is missing")
        try:
            end = int(where.get("offset", 0)) + int(where.get("length", 0))
        except ValueError as error:
            raise InputError(f"{path}: where weight {weight.name!r} lies in {stored} is no number") from error
        if stored.stat().st_size < end:
            raise InputError(f"{stored}, which holds weights of {path.name}, is cut short")
    if model.functions:
        from onnx import inliner

        try:
            model = inliner.inline_local_functions(model)
        except Exception as error:  # it raises what its C++ side raises
            raise InputError(f"{path}: its functions cannot be inlined: {first_line(error)}") from error
    _make_dense(model.graph)
    _sort(model.graph)
    # Some exporters write -1 for a size that is free.
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_value < 0:
                size.Clear()
    return model


def _make_dense(graph: onnx.GraphProto) -> None:
    """Replace sparse initializers by the same weights with their zeros."""
    import numpy as np
    from onnx import numpy_helper

    for sparse in graph.sparse_initializer:
        values, indices = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
        dense = np.zeros(tuple(sparse.dims), values.dtype)
        # Positions are those of the flat array, or rows of one number for each axis.
        dense[np.unravel_index(indices, dense.shape) if indices.ndim == 1 else tuple(indices.T)] = values
        graph.initializer.append(numpy_helper.from_array(dense, sparse.values.name))
    del graph.sparse_initializer[:]


def _sort(graph: onnx.GraphProto) -> None:
    """Put the nodes into an order in which each follows those whose results it reads; as they are if there is none."""
    maker = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    before = [{maker[name] for name in values_read(node) if name in maker} for node in graph.node]
    if all(other < index for index, others in enumerate(before) for other in others):
        return
    try:
        order = list(TopologicalSorter(dict(enumerate(before))).static_order())
    except CycleError:
        return
    replace_items(graph.node, [graph.node[index] for index in order])


def read_float_model(path: Path) -> onnx.ModelProto:
    """As :func:`read_model`, of a network that is not quantized yet.

    Raises:
        InputError: as there, or the network is quantized.
    """
    model = read_model(path)
    if integers := integer_operators(model):
        raise InputError(
            f"{path} computes on integers ({', '.join(integers)}) and takes no table: name the float network"
        )
    if any(node.op_type in QUANTIZERS for node in model.graph.node):
        raise InputError(f"{path} holds quantize/dequantize operators and takes no table: name the float network")
    return model


def integer_operators(model: onnx.ModelProto) -> list[str]:
    """The kinds of operators in a network that compute on integers, and not on constants, without pairs around them."""
    weights = {weight.name for weight in model.graph.initializer}
    computing = (node for node in model.graph.node if not weights.issuperset(node.input))
    return sorted({node.op_type for node in computing if _INTEGER.fullmatch(node.op_type)})


def external_weights(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """The initializers of the main graph whose values lie in another file."""
    import onnx

    for weight in model.graph.initializer:
        if weight.data_location == onnx.TensorProto.EXTERNAL:
            yield weight


def network_inputs(model: onnx.ModelProto) -> list[NetworkInput]:
    """The inputs that are not weights."""
    import onnx

    weights = {weight.name for weight in model.graph.initializer}
    inputs = []
    for value in model.graph.input:
        if value.name in weights:
            continue
        tensor = value.type.tensor_type
        shape: tuple[int | None, ...] | None = None
        if tensor.HasField("shape"):
            shape = tuple(size.dim_value or None for size in tensor.shape.dim)
        kind = tensor.elem_type
        dtype = str(onnx.helper.tensor_dtype_to_np_dtype(kind)) if kind else "float32"
        inputs.append(NetworkInput(value.name, shape, dtype))
    return inputs


def no_floats(model: onnx.ModelProto) -> set[str]:
    """Values of the main graph that are integers, booleans, text or sequences, as far as types can be inferred."""
    import onnx

    floats = (0, onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE)
    return {name for name, kind in element_types(model).items() if kind not in floats}


def element_types(model: onnx.ModelProto) -> dict[str, int | None]:
    """Value of the main graph that is no weight -> its elements' type, as far as it can be inferred.

    None for what is no tensor.
    """
    import onnx

    try:
        graph = onnx.shape_inference.infer_shapes(without_weights(model)).graph
    except Exception:  # noqa: BLE001 - it raises what its C++ side raises; the types in the file remain
        graph = model.graph
    weights = {weight.name for weight in model.graph.initializer}
    return {
        value.name: value.type.tensor_type.elem_type
        if value.type.WhichOneof("value") in (None, "tensor_type")
        else None
        for value in (*graph.input, *graph.value_info, *graph.output)
        if value.name not in weights
    }


def without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same network, to infer shapes and to check: large weights are inputs of their type and shape.

    Both copy the whole model on their way to C++. Small constants stay: they can be the sizes that operators take.
    """
    import onnx

    graph = model.graph
    small = [weight for weight in graph.initializer if math.prod(weight.dims) <= _SMALL]
    large = [weight for weight in graph.initializer if math.prod(weight.dims) > _SMALL]
    names = {weight.name for weight in large}
    inputs = [value for value in graph.input if value.name not in names]
    inputs += [onnx.helper.make_tensor_value_info(weight.name, weight.data_type, weight.dims) for weight in large]
    light = onnx.helper.make_graph(
        graph.node, graph.name or "network", inputs, graph.output, small, value_info=graph.value_info
    )
    return onnx.helper.make_model(
        light, opset_imports=model.opset_import, ir_version=model.ir_version, functions=model.functions
    )


def value_shapes(
    model: onnx.ModelProto, given: Mapping[str, Sequence[int]], batch: int = 1
) -> dict[str, list[int | None]]:
    """Value -> shape, None where a size is not known.

    Args:
        model: The network; external weights need not be there.
        given: Input -> its shape.
        batch: A free first dimension, where it is not given.

    Raises:
        InputError: the shapes of the graph contradict each other.
    """
    import onnx

    light = without_weights(model)
    weights = {weight.name for weight in model.graph.initializer}
    for value in light.graph.input:
        sizes = value.type.tensor_type.shape.dim
        if value.name in given:
            del sizes[:]
            for number in given[value.name]:
                sizes.add().dim_value = number
        elif value.name not in weights and sizes and not sizes[0].dim_value:
            sizes[0].dim_value = batch
    # Those in the file are for any batch.
    del light.graph.value_info[:]
    for value in light.graph.output:
        value.type.tensor_type.ClearField("shape")
    try:
        found = onnx.shape_inference.infer_shapes(light, data_prop=True).graph
    except Exception as error:  # it raises what its C++ side raises
        raise InputError(f"the shapes of the graph cannot be inferred: {first_line(error)}") from error
    shapes: dict[str, list[int | None]] = {weight.name: list(weight.dims) for weight in model.graph.initializer}
    for value in (*found.input, *found.value_info, *found.output):
        if value.type.tensor_type.HasField("shape"):
            shapes[value.name] = [
                size.dim_value if size.HasField("dim_value") else None for size in value.type.tensor_type.shape.dim
            ]
    return shapes


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """The attributes that a node has, as Python's values, tensors and graphs as ONNX's."""
    from onnx import helper

    return {item.name: helper.get_attribute_value(item) for item in node.attribute}


def free_name(name: str, taken: set[str]) -> str:
    """``name``, or one like it that is not in ``taken``; it is in there from now on."""
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def name_nodes(model: onnx.ModelProto) -> list[str]:
    """The names of a network's nodes, in order; those that have none, or another one's, get one of their own."""
    taken = {node.name for node in model.graph.node}
    seen = {""}
    for index, node in enumerate(model.graph.node):
        if node.name in seen:
            node.name = free_name(f"{node.op_type}_{index}", taken)
        seen.add(node.name)
    return [node.name for node in model.graph.node]


def values_read(node: onnx.NodeProto) -> list[str]:
    """What a node reads, with what the graphs inside it read."""
    return [*filter(None, node.input), *_outer_values(node)]


def _outer_values(node: onnx.NodeProto) -> Iterator[str]:
    """What the graphs inside a node read of what is around them."""
    for graph in inner_graphs(node):
        own = {value.name for value in (*graph.input, *graph.initializer)}
        own.update(name for inner in graph.node for name in inner.output)
        read = [name for inner in graph.node for name in values_read(inner)]
        yield from (name for name in (*read, *(output.name for output in graph.output)) if name not in own)


def inner_graphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The graphs inside a node (If, Loop, Scan)."""
    return [
        graph
        for attribute in node.attribute
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs)
    ]


def replace_items(field: Any, items: Iterable[Any]) -> None:
    """Replace what a repeated field of a protocol buffer holds, possibly by some of the same."""
    copies = [type(item).FromString(item.SerializeToString()) for item in items]
    del field[:]
    field.extend(copies)


def drop_unread(graph: onnx.GraphProto) -> None:
    """Remove nodes and weights of which nothing reads a result, in place."""
    read = {value.name for value in graph.output}
    kept: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if not read.isdisjoint(node.output):
            kept.append(node)
            read.update(values_read(node))
    replace_items(graph.node, reversed(kept))
    # In old files weights are inputs as well, and would be real ones without their values.
    dropped = {weight.name for weight in graph.initializer if weight.name not in read}
    replace_items(graph.input, [value for value in graph.input if value.name not in dropped])
    replace_items(graph.initializer, [weight for weight in graph.initializer if weight.name not in dropped])


def subgraph_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes of the main graph that hold graphs of their own (If, Loop, Scan)."""
    return [node for node in model.graph.node if inner_graphs(node)]


def constant(model: onnx.ModelProto, name: str, folder: Path) -> NDArray[Any] | None:
    """The value of an initializer, or of what is computed from some: transposed or quantized, or by weight norm.

    None where it is no constant, or where ONNX Runtime does not compute it.
    """
    from onnx import numpy_helper

    for weight in model.graph.initializer:
        if weight.name == name:
            return numpy_helper.to_array(weight, base_dir=str(folder))
    weights = {weight.name: weight for weight in model.graph.initializer}
    nodes = _computing(model, name, weights.keys())
    if nodes is None:
        return None
    if len(nodes) == 1 and nodes[0].op_type == "Constant":
        return constant_value(nodes[0])
    read = {value for node in nodes for value in node.input} & weights.keys()
    arrays = {value: numpy_helper.to_array(weights[value], base_dir=str(folder)) for value in read}
    return _computed(model, name, nodes, arrays)


def _computed(
    model: onnx.ModelProto, name: str, nodes: Sequence[onnx.NodeProto], weights: Mapping[str, NDArray[Any]]
) -> NDArray[Any] | None:
    """What nodes of a model compute from weights, or None where ONNX Runtime has no operator for it."""
    import onnx
    import onnxruntime

    stored = [onnx.numpy_helper.from_array(array, weight) for weight, array in weights.items()]
    graph = onnx.helper.make_graph(nodes, "constant", [], [onnx.ValueInfoProto(name=name)], stored)
    computing = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=max(model.ir_version, 4))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised as well
    try:
        session = onnxruntime.InferenceSession(computing.SerializeToString(), options, ["CPUExecutionProvider"])
        value: NDArray[Any] = session.run([name], {})[0]
    except Exception:  # noqa: BLE001 - its exceptions share no base class of their own
        return None
    return value


def _computing(model: onnx.ModelProto, name: str, weights: Container[str]) -> list[onnx.NodeProto] | None:
    """The nodes that compute a value from weights alone, in order; None where it depends on more, or on chance."""
    producer = {value: node for node in model.graph.node for value in node.output}
    needed: set[str] = set()
    pending = [name]
    while pending:
        value = pending.pop()
        if value in weights or value in needed:
            continue
        node = producer.get(value)
        if node is None or node.op_type.startswith("Random") or any(_outer_values(node)):
            return None
        needed.update(node.output)
        pending += filter(None, node.input)
    return [node for node in model.graph.node if not needed.isdisjoint(node.output)]


def constant_value(node: onnx.NodeProto) -> NDArray[Any] | None:
    """The value of a Constant node; None for strings and sparse tensors."""
    import numpy as np
    from onnx import numpy_helper

    for attribute in node.attribute:
        if attribute.name == "value":
            return numpy_helper.to_array(attribute.t)
        if attribute.name in ("value_float", "value_floats"):
            numbers = attribute.f if attribute.name == "value_float" else list(attribute.floats)
            return np.array(numbers, np.float32)
        if attribute.name in ("value_int", "value_ints"):
            return np.array(attribute.i if attribute.name == "value_int" else list(attribute.ints), np.int64)
    return None
