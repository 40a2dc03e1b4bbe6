"""ONNX files: the float network, and the network with explicit quantization (Q/DQ) and 8-bit weights.

The values in both carry the names of the calibration table. PyTorch's exporter lets its caller name a graph's outputs
and nothing else; so the network is exported with every named value as an output, and all outputs but ``prob`` are
taken away again. Then come the Q/DQ pairs, with the scales of the plan (:mod:`calib.onnx_pairs`).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import torch
from torch import Tensor, fx

from calib.explicit import place, place_in_front
from calib.int8 import weight_scales
from calib.network import INPUT, Network
from calib.onnx_model import without_weights
from calib.onnx_pairs import Activation, Weight, write_pairs
from calib.plan import Int8Plan
from calib.table import CalibrationTable
from common.errors import InputError, first_line
from common.files import write_bytes
from common.run import Run
from engines.integer import LARGEST_BIAS
from engines.ort_form import for_onnxruntime, rewrite_for_kernels
from engines.tensorrt.form import for_tensorrt

OPSET: Final = 17
"""Operator set of the files: the newest that TensorRT 8.5 (JetPack 5) reads."""

_PROJECT: Final = "int8-workflow"
_DYNAMO_OPSET: Final = 18
_WEIGHTED: Final = frozenset({"Conv", "Gemm", "MatMul"})


@dataclass(frozen=True)
class Exported:
    """What :func:`export` wrote.

    Attributes:
        fp32: The float network.
        int8: The network with explicit quantization, or None.
        int8_cpu: The same for ONNX Runtime on a CPU, or None.
        table: The table for tools that match it to ``fp32`` by name, or None.
    """

    fp32: Path
    int8: Path | None = None
    int8_cpu: Path | None = None
    table: Path | None = None

    @property
    def files(self) -> list[Path]:
        """All that were written."""
        return [path for path in (self.fp32, self.int8, self.int8_cpu, self.table) if path is not None]


def export(
    network: Network,
    plan: Int8Plan | None,
    table: CalibrationTable | None,
    run: Run,
    provenance: Mapping[str, str],
    calibrated: Callable[[Path], CalibrationTable] | None = None,
) -> Exported:
    """Write everything that ``--export onnx`` writes, each file atomically.

    Args:
        network: Traced with an ``input_shape``.
        plan: Which layers run in INT8; None for the float file alone.
        table: The table that ``plan`` was made from; None for the float file alone.
        run: Whose folder gets the files.
        provenance: Stored as the files' metadata.
        calibrated: Calibrates the float file itself, which has values that ``table`` does not name.

    Raises:
        InputError: the network cannot be exported, or a file cannot be written.
    """
    fp32 = run.onnx(network.name, "fp32")
    model = float_model(network)
    _write(model, fp32, provenance)
    if plan is None or table is None:
        return Exported(fp32)
    beside = run.onnx_table(network.name)
    onnx_table(network, table, model, calibrated(fp32) if calibrated else None).write(beside)
    int8, int8_cpu = run.onnx(network.name, "int8"), run.onnx(network.name, "int8_cpu")
    export_int8(plan, int8, provenance)
    export_int8(plan, int8_cpu, provenance, for_cpu=True)
    return Exported(fp32, int8, int8_cpu, beside)


def export_fp32(network: Network, path: str | Path, provenance: Mapping[str, str] | None = None) -> None:
    """Write the float network to ``path`` as ONNX, atomically.

    Args:
        network: Traced with an ``input_shape``.
        path: The file.
        provenance: Stored as the model's metadata.

    Raises:
        InputError: the network cannot be exported, or the file cannot be written.
    """
    _write(float_model(network), Path(path), provenance or {})


def export_int8(
    plan: Int8Plan, path: str | Path, provenance: Mapping[str, str] | None = None, for_cpu: bool = False
) -> None:
    """Write the network with explicit quantization to ``path`` as ONNX, atomically.

    Args:
        plan: Which layers run in INT8; of a network traced with an ``input_shape``.
        path: The file.
        provenance: Stored as the model's metadata.
        for_cpu: See :func:`int8_model`.

    Raises:
        InputError: the network cannot be exported, or the file cannot be written.
    """
    _write(int8_model(plan, for_cpu), Path(path), provenance or {})


def _write(model: onnx.ModelProto, path: Path, provenance: Mapping[str, str]) -> None:
    """Write a model that the checker accepts and that, where ONNX Runtime is installed, runs."""
    onnx.helper.set_model_props(model, dict(provenance))
    model.producer_name = _PROJECT
    with contextlib.suppress(PackageNotFoundError):
        model.producer_version = version(_PROJECT)
    onnx.checker.check_model(without_weights(model), full_check=True)
    content = model.SerializeToString()
    shape = [size.dim_value or 1 for size in model.graph.input[0].type.tensor_type.shape.dim]
    try:
        _run_once(content, shape)
    except Exception as error:  # what ONNX Runtime raises has no base class of its own
        raise InputError(f"{path} is not written, since ONNX Runtime does not run it: {first_line(error)}") from error
    write_bytes(path, content)


def _run_once(content: bytes, shape: list[int]) -> None:
    """Run a model on one image: an operator that no kernel takes as it is shows neither before nor while loading."""
    try:
        import onnxruntime
    except ImportError:
        return
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4  # errors are raised as well
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    session.run(None, {INPUT: np.zeros(shape, np.float32)})


def onnx_table(
    network: Network, table: CalibrationTable, model: onnx.ModelProto, observed: CalibrationTable | None = None
) -> CalibrationTable:
    """The calibration table, with an entry for those values of the ONNX file that have none of their own.

    TensorRT runs a layer in INT8 from a table only if every tensor that it reads and writes has an entry. What
    ``table`` does not name has the entry of ``observed``, which is TensorRT's. Without one, a reshaped value takes its
    tensor's scale, and a value that an in-place ReLU overwrites that of what overwrites it: TensorRT merges the ReLU
    into the layer before it.

    Args:
        network: What ``table`` was made for.
        table: The calibration table.
        model: The network as :func:`float_model` exports it.
        observed: Made from the ONNX file itself.
    """
    values = {value.name for value in model.graph.input} | {name for node in model.graph.node for name in node.output}
    shared = {}
    for node, name in value_names(network).items():
        tensor = network.tensor_of.get(node) or _overwritten_as(network, node)
        if name in values and tensor in table.scales:
            shared[name] = table.scales[tensor]
    own = {name: scale for name, scale in shared.items() if name in table.scales}
    scales = {**(observed.scales if observed else {}), **own}
    return dataclasses.replace(table, scales={**scales, **{k: v for k, v in shared.items() if k not in scales}})


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
            name = f"{tensor}/{node.name}" if tensor else f"{_overwritten_as(network, node.name)}/before_relu"
            while name in used:
                name += "_"
            used.add(name)
        names[node.name] = name
    return names


def _overwritten_as(network: Network, name: str) -> str:
    """The tensor as which an in-place ReLU overwrites the value of an fx node that has no tensor of its own."""
    nodes = {node.name: node for node in network.module.graph.nodes}
    while name not in network.observed:
        name = next(reader.name for reader in nodes[name].users if network.kinds.get(reader.name) == "relu")
    return network.observed[name]


def float_model(network: Network) -> onnx.ModelProto:
    """The float network in ONNX: input ``data``, output ``prob``, dynamic batch, values named by the table.

    Args:
        network: Traced with an ``input_shape``.

    Raises:
        InputError: the network was traced without an ``input_shape``, or cannot be exported.
    """
    return _float_graph(network)[0]


def _float_graph(network: Network, rewrite: Rewrite | None = None) -> tuple[onnx.ModelProto, dict[str, str]]:
    """The float network in ONNX, and fx node -> name of its value there (a tuple of tensors has none).

    Args:
        network: Traced with an ``input_shape``.
        rewrite: Changes the copy of the network's module that is exported, whose values must stay the same.
    """
    if network.input_shape is None:
        raise InputError(f"exporting {network.name} needs the shape of its input: trace(model, input_shape=(C, H, W))")
    example = torch.zeros(2, *network.input_shape)
    recorder = _Recorder(network.module)
    with torch.inference_mode():
        recorder.run(example)
    names = value_names(network)
    values = {node: names[source] for node, source in recorder.same_as.items() if source in names}
    module = copy.deepcopy(network.module)
    nodes = {node.name: node for node in module.graph.nodes}
    if rewrite is not None:
        rewrite(module, recorder.shapes)
    asked = [node for node in recorder.same_as if values.get(node) == names.get(node) != INPUT and node in values]
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


Rewrite = Callable[[fx.GraphModule, Mapping[str, torch.Size]], None]
"""Changes a module in place, which is to be exported; told fx node -> shape of its value."""


class _Recorder(fx.Interpreter):
    """Finds the fx nodes that have a tensor as their value.

    Attributes:
        same_as: Such a node -> itself, or the earlier one whose value it merely passes on (``contiguous``).
        shapes: Such a node -> shape of its value.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.same_as: dict[str, str] = {}
        self.shapes: dict[str, torch.Size] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n.name] = value.shape
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
            raise InputError(f"network {name} cannot be exported to ONNX: {first_line(first)}") from first


def _torchscript_export(
    module: fx.GraphModule, example: Tensor, outputs: list[str], kept: list[str]
) -> onnx.ModelProto:
    # TorchScript takes no number for a name, which is what the layers of a plain nn.Sequential have.
    numbers = {f"#{name}": name for name in outputs if name.isdecimal()}
    names = [f"#{name}" if name.isdecimal() else name for name in outputs]
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "network.onnx")
        torch.onnx.export(
            module,
            (example,),
            path,
            input_names=[INPUT],
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
    return model


def _dynamo_export(module: fx.GraphModule, example: Tensor, outputs: list[str]) -> onnx.ModelProto:
    with _quiet():
        program = torch.onnx.export(
            module,
            (example,),
            input_names=[INPUT],
            output_names=outputs,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
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
    logging.disable(logging.WARNING)
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


def int8_model(plan: Int8Plan, for_cpu: bool = False, int8_weights: bool = False) -> onnx.ModelProto:
    """The network in ONNX with explicit quantization: the float network with Q/DQ pairs and int8 weights.

    As it is, the model suits every reader: int8 with zero point 0, biases in float (TensorRT takes no others), and
    the plan in the form that TensorRT fuses (:func:`engines.tensorrt.form.for_tensorrt`), with one Q/DQ pair for each
    value, right in front of the layers that read it in INT8.

    For ONNX Runtime's CPU kernels, the same numbers can be written in another way: a pair behind every one of these
    operations, since it makes an integer operator of what lies between two pairs, values in uint8 with zero point 128
    (on x86 it has no fast convolution on int8 values, and converts them only where each has a single reader), weights,
    too (without VNNI, its kernels for uint8 with int8 add two products in 16 bits, where they saturate), int32 biases,
    ReLU as a leaky ReLU of slope 0, for which, unlike ReLU, it has an integer operator, convolutions of few channels
    with several columns at once (:mod:`engines.columns`), and no convolution in INT8 whose result is read in float
    (:mod:`engines.ort_form`).

    Args:
        plan: Which layers run in INT8; of a network traced with an ``input_shape``.
        for_cpu: Whether the model is for ONNX Runtime on a CPU alone.
        int8_weights: With ``for_cpu``, int8 weights with zero point 0 all the same: for the CPU at hand, where
            :func:`engines.ort.int8_weights_are_exact`, and where they are faster.

    Raises:
        InputError: the network cannot be exported.
    """
    plan = for_onnxruntime(plan) if for_cpu else for_tensorrt(plan)
    placement = place(plan, before_relu=True) if for_cpu else place_in_front(plan)
    model, values = _float_graph(plan.network, partial(rewrite_for_kernels, plan, placement) if for_cpu else None)
    computing = _Computing(plan.network, model.graph, values)
    quantized = placement.scales if for_cpu else placement.points
    write_pairs(
        model,
        _activations(plan.network, quantized, placement.partial, values, computing),
        _weights(plan, model.graph, computing),
        unsigned=for_cpu,
        unsigned_weights=for_cpu and not int8_weights,
        integer_biases=for_cpu,
    )
    return model


class _Computing:
    """Which ONNX nodes compute the value of which fx node."""

    def __init__(self, network: Network, graph: onnx.GraphProto, values: Mapping[str, str]) -> None:
        self._fx = {node.name: node for node in network.module.graph.nodes}
        self._values = values
        self._producers = {output: node for node in graph.node for output in node.output}

    def __call__(self, name: str) -> list[onnx.NodeProto]:
        """The ONNX nodes that make an fx node's value from those of other fx nodes."""
        if name not in self._values:
            parts = self._fx[name].users if self._fx[name].op != "output" else ()
            return [node for part in parts for node in self(part.name)]
        found: dict[str, onnx.NodeProto] = {}
        # The exporter removes a transposition and the one that undoes it: a value can be made from that of its reader.
        own = {
            self._values[item] for item in (name, *(user.name for user in self._fx[name].users)) if item in self._values
        }
        borders = set(self._values.values()) - own
        pending = [self._values[name]]
        while pending:
            value = pending.pop()
            if value in borders or value not in self._producers:
                continue
            node = self._producers[value]
            if node.name not in found:
                found[node.name] = node
                pending.extend(node.input)
        return list(found.values())


def _activations(
    network: Network,
    quantized: Mapping[str, float],
    partial: Mapping[str, tuple[float, frozenset[str]]],
    values: Mapping[str, str],
    computing: _Computing,
) -> dict[str, Activation]:
    """ONNX value -> how it is quantized, for the fx nodes ``quantized`` and ``partial`` (:class:`Placement`)."""
    nodes = {node.name: node for node in network.module.graph.nodes}
    wanted = {
        name: (scale, frozenset(reader.name for reader in nodes[name].users)) for name, scale in quantized.items()
    }
    wanted.update(partial)
    found: dict[str, Activation] = {}
    for name, (scale, readers) in wanted.items():
        if name not in values:
            continue
        activation = found.setdefault(values[name], Activation(scale, set()))
        for reader in readers:
            activation.readers.update(node.name for node in computing(reader))
    return found


def _weights(plan: Int8Plan, graph: onnx.GraphProto, computing: _Computing) -> list[Weight]:
    """The weights of the plan's layers; each gets initializers of its own.

    Raises:
        InputError: a layer was exported to something else than one convolution or matrix product.
    """
    weights = []
    initializers = {value.name: value for value in graph.initializer}
    for layer in plan.weighted:
        nodes = [node for node in computing(layer.node) if node.op_type in _WEIGHTED and node.input[1] in initializers]
        if len(nodes) != 1:
            raise InputError(
                f"the ONNX exporter made no single operator of layer {layer.name}: keep it in float "
                f"(--quantization.keep_fp '[{layer.name}]')"
            )
        (node,) = nodes
        for index in range(1, len(node.input)):
            _own_initializer(graph, node, index, initializers)
        axis = _channel_axis(node)
        values = onnx.numpy_helper.to_array(initializers[node.input[1]])
        weight = torch.from_numpy(np.moveaxis(values, axis, 0).copy())
        scales = weight_scales(weight).numpy()
        input_scale = plan.scales[layer.inputs[0]]
        bias = node.input[2] if len(node.input) > 2 else None
        if bias is not None:
            # Weights next to nothing, such as those of a dead channel behind folded batch normalisation, must not
            # make a scale in which the bias exceeds int32; what the coarser scale loses is below float32's precision.
            largest = np.abs(onnx.numpy_helper.to_array(initializers[bias]))
            scales = np.maximum(scales, largest / (input_scale * LARGEST_BIAS)).astype(np.float32)
        weights.append(Weight(node.input[1], axis, scales, bias, input_scale))
    return weights


def _channel_axis(node: onnx.NodeProto) -> int:
    """The output channel's axis in the weight of a Conv, Gemm or MatMul."""
    if node.op_type == "Conv":
        return 0
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return 0 if transposed else 1


def _own_initializer(
    graph: onnx.GraphProto, node: onnx.NodeProto, index: int, initializers: dict[str, onnx.TensorProto]
) -> None:
    """Copy an initializer that other nodes read, too; ``initializers`` is the graph's, by name."""
    name = node.input[index]
    readers = sum(value == name for other in graph.node for value in other.input)
    source = initializers.get(name)
    if readers < 2 or source is None:
        return
    number = 1
    while f"{name}_{number}" in initializers:
        number += 1
    own = graph.initializer.add()
    own.CopyFrom(source)
    own.name = node.input[index] = f"{name}_{number}"
    initializers[own.name] = own
