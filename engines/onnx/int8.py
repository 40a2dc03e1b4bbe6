"""The network in ONNX with explicit quantization: the float network, Q/DQ pairs and 8-bit weights.

Where the pairs stand is the plan's (:mod:`calib.explicit`); this module finds the ONNX operators of its layers, and
:mod:`calib.onnx.pairs` writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Final

import numpy as np
import onnx
import torch
from torch import fx

from calib.explicit import place, place_in_front
from calib.int8 import weight_scales
from calib.network import Network
from calib.onnx.pairs import MIDDLE, Activation, Weight, channel_axis, write_pairs
from calib.onnx.pools import average_codes, pad_in_front
from calib.plan import Int8Plan
from common.errors import InputError
from engines.integer import LARGEST_BIAS
from engines.onnx.float import float_graph
from engines.onnxruntime.form import for_onnxruntime, rewrite_for_kernels
from engines.onnxruntime.weights import choose_weights
from engines.tensorrt.form import for_tensorrt

_WEIGHTED: Final = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


def int8_model(plan: Int8Plan, for_cpu: bool = False, any_size: bool = False) -> onnx.ModelProto:
    """The network in ONNX with explicit quantization: the float network with Q/DQ pairs and int8 weights.

    As it is, the model suits every reader: int8 with zero point 0, biases in float (TensorRT takes no others), and
    the plan in the form that TensorRT fuses (:func:`engines.tensorrt.form.for_tensorrt`), with one Q/DQ pair for each
    value, right in front of the layers that read it in INT8. In both forms average pooling between codes of one scale
    averages the codes (:func:`calib.onnx.pools.average_codes`).

    For ONNX Runtime's CPU kernels, the same numbers can be written in another way: a pair behind every one of these
    operations, since it makes an integer operator of what lies between two pairs, values in uint8 with zero point 128
    (on x86 it has no fast convolution on int8 values, and converts them only where each has a single reader), but
    those behind a ReLU with zero point 0, weights in the type whose sums are exact on the CPU that loads the file
    (:mod:`engines.onnxruntime.weights`), int32 biases, ReLU as a leaky ReLU of slope 0, for which, unlike ReLU, it has
    an integer operator, convolutions of few channels with several columns at once
    (:mod:`engines.onnxruntime.columns`), and no convolution in INT8 whose result is read in float
    (:mod:`engines.onnxruntime.form`).

    Args:
        plan: Which layers run in INT8; of a network traced with an ``input_shape``.
        for_cpu: Whether the model is for ONNX Runtime on a CPU alone.
        any_size: With ``for_cpu``, no several columns at once, which fixes the size of the images.

    Raises:
        InputError: the network cannot be exported.
    """
    plan = for_onnxruntime(plan) if for_cpu else for_tensorrt(plan)
    placement = place(plan, before_relu=True) if for_cpu else place_in_front(plan)
    rewrite = partial(rewrite_for_kernels, plan, placement, columns=not any_size)
    model, values = float_graph(plan.network, rewrite if for_cpu else None)
    computing = _Computing(plan.network, model.graph, values)
    quantized = placement.scales if for_cpu else placement.points
    activations = _activations(plan.network, quantized, placement.partial, values, computing)
    weights = _weights(plan, model.graph, computing)
    if for_cpu:
        rectified = {values[name] for name in placement.rectified if name in values}
        for value, activation in activations.items():
            activation.zero_point = 0 if value in rectified else MIDDLE
    write_pairs(model, activations, weights, integer_biases=for_cpu)
    if for_cpu:
        choose_weights(model)
    average_codes(model)
    pad_in_front(model, codes=for_cpu)
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
        activation = found.setdefault(values[name], Activation(scale, set(), put_out=name in quantized))
        for reader in readers:
            activation.readers.update(node.name for node in computing(reader))
    # The exporter makes one transposition of two, or none: a layer then reads what its input is moved from.
    for name, (scale, readers) in wanted.items():
        for source in _moved_from(nodes[name], network.kinds):
            for reader in readers - {user.name for user in source.users}:
                reading = {node.name for node in computing(reader) if values.get(source.name) in node.input}
                if reading:
                    found.setdefault(values[source.name], Activation(scale, set())).readers.update(reading)
    return found


def _moved_from(node: fx.Node, kinds: Mapping[str, str]) -> Iterator[fx.Node]:
    """The fx nodes whose value a node gives in another shape or order, the last one first."""
    while kinds.get(node.name) == "view":
        node = node.all_input_nodes[0]
        yield node


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
        values = onnx.numpy_helper.to_array(initializers[node.input[1]])
        axis = channel_axis(node, values.ndim)
        assert axis is not None  # Int8Plan.weighted holds no layers with one scale for all
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
