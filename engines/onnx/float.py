"""The float network in ONNX, its values under the names of the calibration table.

PyTorch's exporter lets its caller name a graph's outputs and nothing else; so the network is exported with every named
value as an output, and all outputs but the network's own are taken away again.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import onnx
import torch
from torch import Tensor, fx, nn

from calib.network import INPUT, Network, Shapes, copy_sharing_weights
from calib.onnx.model import free_name, replace_items, without_weights
from calib.ops import is_adaptive
from common.errors import InputError, first_line

OPSET: Final = 17
"""Operator set of the files: the newest that TensorRT 8.5 (JetPack 5) reads."""

_DYNAMO_OPSET: Final = 18
_MOST_IMAGES: Final = 1024
"""Without a limit, the exporter refuses networks that count their values in 32 bits; the file takes any number."""

Rewrite = Callable[[fx.GraphModule, Mapping[str, torch.Size]], None]
"""Changes a module in place, which is to be exported; told fx node -> shape of its value."""


def float_model(network: Network) -> onnx.ModelProto:
    """The float network in ONNX: input ``data``, output ``prob``, dynamic batch, values named by the table.

    Args:
        network: Traced with an ``input_shape``.

    Raises:
        InputError: the network was traced without an ``input_shape``, or cannot be exported.
    """
    return float_graph(network)[0]


def float_graph(network: Network, rewrite: Rewrite | None = None) -> tuple[onnx.ModelProto, dict[str, str]]:
    """The float network in ONNX, and fx node -> name of its value there (a tuple of tensors has none).

    Args:
        network: Traced with an ``input_shape``.
        rewrite: Changes the copy of the network's module that is exported, whose values must stay the same.
    """
    if network.input_shape is None:
        raise InputError(f"exporting {network.name} needs the shape of its input: trace(model, input_shape=(C, H, W))")
    example = torch.zeros(2, *network.input_shape)
    tensors = _Tensors(network.module)
    with torch.inference_mode():
        tensors.run(example)
    names = value_names(network)
    values = {node: names[source] for node, source in tensors.same_as.items() if source in names}
    module = copy_sharing_weights(network.module)
    nodes = {node.name: node for node in module.graph.nodes}
    if rewrite is not None:
        rewrite(module, tensors.found)
    _count_from_the_front(module.graph, tensors.found)
    _pool_by_windows(module, [name for name, kind in network.kinds.items() if kind == "avgpool"], tensors.found)
    asked = [node for node in tensors.same_as if values.get(node) == names.get(node) != INPUT and node in values]
    outputs = [values[node] for node in network.outputs]
    asked.sort(key=lambda node: outputs.index(values[node]) if values[node] in outputs else len(outputs))
    output = next(node for node in module.graph.nodes if node.op == "output")
    output.args = (tuple(nodes[node] for node in asked),)
    module.recompile()
    model = _exported(module, example, [values[node] for node in asked], outputs, network.name)
    _pad_explicitly(model)
    aliases = keep_outputs(model, outputs)
    values = {node: aliases.get(value, value) for node, value in values.items()}
    inferred = onnx.shape_inference.infer_shapes(without_weights(model)).graph
    model.graph.value_info.extend(inferred.value_info)
    for output, known in zip(model.graph.output, inferred.output, strict=True):
        output.CopyFrom(known)
    return model, values


def _pool_by_windows(module: fx.GraphModule, pools: Iterable[str], shapes: Mapping[str, torch.Size]) -> None:
    """Write adaptive average pooling in other operations where its windows differ in size: ONNX has none for it.

    PyTorch's TorchScript exporter fails at it, and its other one, which knows how, takes many times as long.

    Args:
        module: Changed in place.
        pools: The fx nodes of average pooling.
        shapes: fx node -> shape of its value.
    """
    nodes = {node.name: node for node in module.graph.nodes}
    for node in (nodes[name] for name in pools if is_adaptive(nodes[name], module)):
        (source,) = node.all_input_nodes
        sizes = list(zip(shapes[source.name][-2:], shapes[node.name][-2:], strict=True))
        if any(before % after for before, after in sizes):
            name = f"{node.name}_windows"
            while hasattr(module, name):
                name += "_"
            module.add_module(name, _Windows(sizes))
            node.op, node.target, node.args, node.kwargs = "call_module", name, (source,), {}


class _Windows(nn.Module):
    """Adaptive average pooling: the sums over windows, value by value in PyTorch's order, over what they hold.

    Args:
        sizes: Of the map and of what becomes of it, rows and columns.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        begins = [torch.arange(after) * before // after for before, after in sizes]
        ends = [-(-(torch.arange(after) + 1) * before // after) for before, after in sizes]
        self.begins = begins
        self.lengths = [end - begin for begin, end in zip(begins, ends, strict=True)]

    def forward(self, values: Tensor) -> Tensor:
        rows, columns = self.lengths
        total: Tensor = torch.zeros(())
        for row in range(int(rows.max())):
            line = values.index_select(2, self.begins[0] + torch.minimum(rows - 1, torch.tensor(row)))
            for column in range(int(columns.max())):
                part = line.index_select(3, self.begins[1] + torch.minimum(columns - 1, torch.tensor(column)))
                total = total + part * ((row < rows)[:, None] & (column < columns)).float()
        total /= (rows[:, None] * columns).float()
        return total


def value_names(network: Network) -> dict[str, str]:
    """Name of each fx node's value in the ONNX files.

    What the calibration table names has that name. A reshaped value is ``<tensor>/<fx node>``, a value that an
    in-place ReLU overwrites ``<tensor>/before_relu``.
    """
    names: dict[str, str] = {}
    used = set(network.observed.values())
    for node in network.module.graph.nodes:
        if network.kinds.get(node.name, "shape") == "shape":
            continue
        name = network.observed.get(node.name)
        if name is None:
            tensor = network.tensor_of.get(node.name)
            name = f"{tensor}/{node.name}" if tensor else f"{overwritten_as(network, node.name)}/before_relu"
            while name in used:
                name += "_"
            used.add(name)
        names[node.name] = name
    return names


def overwritten_as(network: Network, name: str) -> str:
    """The tensor as which an in-place ReLU overwrites the value of an fx node that has no tensor of its own."""
    nodes = {node.name: node for node in network.module.graph.nodes}
    while name not in network.observed:
        name = next(reader.name for reader in nodes[name].users if network.kinds.get(reader.name) == "relu")
    return network.observed[name]


def _count_from_the_front(graph: fx.Graph, shapes: Mapping[str, torch.Size]) -> None:
    """Name the dimension of ``unfold`` by its number from the front: the exporter gets the other way wrong, silently.

    Args:
        graph: To be exported; changed in place.
        shapes: fx node -> shape of its value.
    """
    for node in graph.find_nodes(op="call_method", target="unfold"):
        source = node.all_input_nodes[0]
        given: list[Any] = [*node.args[1:], *node.kwargs.values()]
        if given[0] < 0 and source.name in shapes:
            given[0] += len(shapes[source.name])
            node.args, node.kwargs = (source, *given), {}


class _Tensors(Shapes):
    """Notes which values are those of other nodes, too.

    Attributes:
        same_as: fx node with a tensor -> itself, or the earlier one whose value it merely passes on (``contiguous``).
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.same_as: dict[str, str] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            sources = [item for item in n.all_input_nodes if self.env[item] is value or n.target == "contiguous"]
            self.same_as[n.name] = self.same_as.get(sources[0].name, n.name) if sources else n.name
        return value


def _exported(
    module: fx.GraphModule, example: Tensor, outputs: list[str], kept: list[str], name: str
) -> onnx.ModelProto:
    """Export with PyTorch's TorchScript exporter or, where that is gone or fails, its ``torch.export`` one.

    Both name the outputs as asked; those of ``kept`` have any number of images. The first needs no further package and
    gives the older operator set.
    """
    try:
        return _torchscript_export(module, example, outputs, kept)
    except Exception as first:  # noqa: BLE001 - the exporters raise a dozen unrelated types
        try:
            return _dynamo_export(module, example, outputs)
        except Exception:  # noqa: BLE001
            # Behind it, the exporter lists its own graph.
            reason = first_line(first).partition("[Caused by")[0].strip(" .")
            raise InputError(
                f"network {name} cannot be exported to ONNX: {reason}; quantize a part of it without this"
            ) from first


def _torchscript_export(
    module: fx.GraphModule, example: Tensor, outputs: list[str], kept: list[str]
) -> onnx.ModelProto:
    # TorchScript takes no number for a name, which is what the layers of a plain nn.Sequential have.
    numbers = {f"#{name}": name for name in outputs if name.isdecimal()}
    names = [f"#{name}" if name.isdecimal() else name for name in outputs]
    light, weights = _weights_as_inputs(module)
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "network.onnx")
        torch.onnx.export(
            light,
            (example, *weights.values()),
            path,
            input_names=[INPUT, *weights],
            output_names=names,
            dynamic_axes={name: {0: "batch"} for name in (INPUT, *(names[outputs.index(name)] for name in kept))},
            opset_version=OPSET,
            dynamo=False,
        )
        model = onnx.load(path)
    for node in model.graph.node:
        for values in (node.input, node.output):
            values[:] = [numbers.get(value, value) for value in values]
    for output in model.graph.output:
        output.name = numbers.get(output.name, output.name)
    _store_weights(model, weights)
    return model


def _weights_as_inputs(module: fx.GraphModule) -> tuple[fx.GraphModule, dict[str, Tensor]]:
    """The same network with the weights of convolutions and linear layers as further inputs, and those by name.

    The exporter copies what a network holds many times on its way, into every file of which it infers the shapes: of
    the 42 s that vgg11_bn's float graph took, all but 3.
    """
    light = fx.GraphModule(module, copy.deepcopy(module.graph))
    graph = light.graph
    named: dict[int, fx.Node] = {}
    weights: dict[str, Tensor] = {}
    last = next(node for node in graph.nodes if node.op == "placeholder")
    for node in graph.nodes:
        layer = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        weight = layer.weight
        if id(weight) not in named:
            with graph.inserting_after(last):
                last = named[id(weight)] = graph.placeholder(f"weight_{len(named)}")
            weights[f"{node.target}.weight"] = weight.detach()
        hollow = copy.copy(layer)
        hollow._parameters = {**layer._parameters, "weight": None}
        light.set_submodule(str(node.target), hollow)
        with graph.inserting_before(node):
            callee = graph.get_attr(str(node.target))
        node.op, node.target = "call_function", _called
        node.args, node.kwargs = (callee, *node.all_input_nodes, named[id(weight)]), {}
    light.recompile()
    return light, weights


def _called(layer: nn.Module, value: Tensor, weight: Tensor) -> Any:
    """Call a layer, by its name in the graph, on a weight that it does not hold."""
    layer._parameters["weight"] = weight  # type: ignore[assignment]
    result = layer(value)
    layer._parameters["weight"] = None
    return result


def _store_weights(model: onnx.ModelProto, weights: Mapping[str, Tensor]) -> None:
    """Make initializers of what was exported as inputs, those that a linear layer transposes transposed."""
    graph = model.graph
    taken = {value for node in graph.node for value in (*node.input, *node.output)}
    stored = dict(weights)
    for node in [node for node in graph.node if node.op_type == "Transpose" and node.input[0] in weights]:
        name = free_name(f"{node.input[0]}_transposed", taken)
        stored[name] = weights[node.input[0]].t()
        _read_instead(graph.node, node.output[0], name)
        graph.node.remove(node)
    read = {value for node in graph.node for value in node.input}
    replace_items(graph.input, [value for value in graph.input if value.name not in weights])
    for name, weight in stored.items():
        if name in read:
            # In place: a message is copied where it is appended.
            initializer = graph.initializer.add()
            initializer.name, initializer.data_type = name, onnx.TensorProto.FLOAT
            initializer.dims.extend(weight.shape)
            initializer.raw_data = weight.contiguous().numpy().tobytes()


def _dynamo_export(module: fx.GraphModule, example: Tensor, outputs: list[str]) -> onnx.ModelProto:
    with _quiet():
        program = torch.onnx.export(
            module,
            (example,),
            input_names=[INPUT],
            output_names=outputs,
            dynamic_shapes=({0: torch.export.Dim("batch", max=_MOST_IMAGES)},),
            opset_version=_DYNAMO_OPSET,
            dynamo=True,
        )
    assert program is not None  # as documented for dynamo=True
    model: onnx.ModelProto = program.model_proto
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' progress, deprecation notices and dumps of what they cannot export off the terminal."""
    disabled, dump = logging.root.manager.disable, getattr(torch._C, "_jit_onnx_log", None)
    logging.disable(logging.CRITICAL)
    if dump is not None:
        # PyTorch means to print this on request alone, but always does, and past sys.stdout.
        torch._C._jit_onnx_log = lambda *_: None
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        if dump is not None:
            torch._C._jit_onnx_log = dump
        logging.disable(disabled)


def _pad_explicitly(model: onnx.ModelProto) -> None:
    """Give convolutions that pad automatically the numbers: ONNX Runtime takes no ``auto_pad`` with dilation.

    PyTorch's ``padding="same"`` goes with stride 1 alone, so that the size of the input does not matter.
    """
    for node in model.graph.node:
        attributes = {attribute.name: attribute for attribute in node.attribute}
        if node.op_type != "Conv" or "auto_pad" not in attributes or attributes["auto_pad"].s != b"SAME_UPPER":
            continue
        kernel = attributes["kernel_shape"].ints
        dilations = attributes["dilations"].ints if "dilations" in attributes else [1] * len(kernel)
        totals = [dilation * (size - 1) for dilation, size in zip(dilations, kernel, strict=True)]
        node.attribute.remove(attributes["auto_pad"])
        pads = [*(total // 2 for total in totals), *(total - total // 2 for total in totals)]
        node.attribute.append(onnx.helper.make_attribute("pads", pads))


def keep_outputs(model: onnx.ModelProto, outputs: Sequence[str]) -> dict[str, str]:
    """Reduce the graph's outputs to these; what the others delivered stays in the graph, under its name.

    The shapes of inner values go, because the exporter fixed their batch. ``Identity`` operators, which exporters make
    of weights that equal others and of values that are delivered twice, go as well.

    Returns:
        Name that is gone with its ``Identity`` -> name of the same value.
    """
    graph = model.graph
    kept = sorted((value for value in graph.output if value.name in outputs), key=lambda v: outputs.index(v.name))
    del graph.output[:]
    graph.output.extend(kept)
    del graph.value_info[:]
    aliases: dict[str, str] = {}
    for node in [node for node in graph.node if node.op_type == "Identity" and node.output[0] not in outputs]:
        aliases[node.output[0]] = node.input[0]
        _read_instead(graph.node, node.output[0], node.input[0])
        graph.node.remove(node)
    for index, node in enumerate(graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
    return aliases


def _read_instead(nodes: Iterable[onnx.NodeProto], old: str, new: str) -> None:
    """Make ``nodes`` read the value ``new`` where they read ``old``."""
    for node in nodes:
        for index, value in enumerate(node.input):
            if value == old:
                node.input[index] = new
