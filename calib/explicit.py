"""Explicit quantization: the float network with quantize/dequantize at the places where INT8 layers read.

The plan says which values INT8 layers read, and with which scale. Here it becomes positions in the network: where all
readers of a value take it in INT8 with one scale, the value itself is quantized, right after the layer that produces
it; max pooling, reshapes and concatenation let quantization through, because they only move or choose values and the
scale is positive. Where the readers take it with several scales (a layer and a concatenation, whose scale is its own),
it is quantized with the scale of its own tensor, and again on the way to those who take another. Where some reader
needs the float value, only the others get the quantized one.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn import functional as F

from calib.int8 import ACTIVATION_MAX, ACTIVATION_MIN, WEIGHT_MAX, along, channel_axis, quantize, quantize_weight
from calib.network import Layer
from calib.ops import MOVES_VALUES, clamps_at_6
from calib.plan import Int8Plan


@dataclass(frozen=True)
class Placement:
    """Where the values of a network are quantized.

    Attributes:
        scales: fx node -> scale, for every value whose readers all take it in INT8.
        points: Those of ``scales`` that are not multiples of their scale already, because they were chosen from
            quantized values: quantizing at the points is enough.
        partial: fx node -> (scale, names of the reading fx nodes), for values that others read in float.
        requantized: Those of ``points`` that are more than what INT8 layers do to their inputs: quantized again, with
            another scale, before a layer reads them, or read in float as well.
        rectified: Those of ``scales`` whose codes are never negative, because they come from a ReLU that clamps codes.
    """

    scales: Mapping[str, float]
    points: Mapping[str, float]
    partial: Mapping[str, tuple[float, frozenset[str]]]
    requantized: Mapping[str, float]
    rectified: frozenset[str] = frozenset()


def place(plan: Int8Plan, before_relu: bool = False) -> Placement:
    """Find where a plan's values are quantized.

    Args:
        plan: Which layers run in INT8.
        before_relu: Whether quantization passes through ReLU, too, as far as the layer before it. The numbers are
            the same: with zero point 0, clamping at 0 and rounding commute (:func:`clamps_codes_at_zero`).
    """
    network = plan.network
    nodes = [node for node in network.module.graph.nodes if network.kinds.get(node.name, "shape") != "shape"]
    layers = {layer.node: layer for layer in network.layers if layer.name in plan.layers}
    scales: dict[str, float] = {}
    partial: dict[str, tuple[float, frozenset[str]]] = {}
    for node in reversed(nodes):
        wanted = _wanted(node, plan, layers, scales, before_relu)
        different = set(wanted.values())
        if node.name in plan.rounded:
            scales[node.name] = plan.own_scales[node.name]
        elif len(different) == 1 and None not in different:
            scales[node.name] = next(scale for scale in different if scale is not None)
        elif different and None not in different and node.name in plan.own_scales:
            scales[node.name] = plan.own_scales[node.name]
        else:
            readers = frozenset(name for name in layers.keys() & wanted.keys() if wanted[name] is not None)
            if readers:
                partial[node.name] = plan.scales[node.name], readers

    points: dict[str, float] = {}
    quantized: set[str] = set()
    rectified: set[str] = set()
    for node in nodes:
        if node.name not in scales:
            continue
        sources = [item.name for item in node.all_input_nodes if network.kinds.get(item.name, "shape") != "shape"]
        same = all(item in quantized and scales[item] == scales[node.name] for item in sources)
        if _commutes(node, plan, scales, before_relu) and same:
            quantized.add(node.name)
            if network.kinds[node.name] == "relu" or rectified.issuperset(sources):
                rectified.add(node.name)
        elif not _is_tuple(node):
            quantized.add(node.name)
            points[node.name] = scales[node.name]

    again: set[str] = set()
    for node in reversed(nodes):
        for reader in node.users:
            moves = reader.name in quantized and _commutes(reader, plan, scales, before_relu)
            if moves and node.name in quantized and (scales[reader.name] != scales[node.name] or reader.name in again):
                again.add(node.name)
    requantized = {name: scale for name, scale in points.items() if name in again or name in plan.rounded}
    return Placement(scales, points, partial, requantized, frozenset(rectified))


def _wanted(
    node: fx.Node, plan: Int8Plan, layers: Mapping[str, Layer], scales: Mapping[str, float], before_relu: bool
) -> dict[str, float | None]:
    """What reads a value -> the scale with which it takes it; None where it takes it in float.

    Args:
        node: Gives the value.
        plan: As :func:`place` takes it.
        layers: The plan's, by their fx node.
        scales: Of the values behind it.
        before_relu: As :func:`place` takes it.
    """
    wanted: dict[str, float | None] = {}
    for reader in node.users:
        if reader.op == "output":
            wanted[reader.name] = plan.output_scale
        elif reader.name in layers:
            in_int8 = plan.reads_int8(layers[reader.name], node.name)
            wanted[reader.name] = plan.scales[node.name] if in_int8 else None
        elif _commutes(reader, plan, scales, before_relu):
            wanted[reader.name] = scales.get(reader.name)
        elif plan.network.kinds[reader.name] != "shape":
            wanted[reader.name] = None
    return wanted


def _commutes(node: fx.Node, plan: Int8Plan, scales: Mapping[str, float], before_relu: bool) -> bool:
    """Whether quantizing an operation's inputs is the same as quantizing its output."""
    kind = plan.network.kinds[node.name]
    if kind != "relu" or not before_relu:
        return kind in MOVES_VALUES
    return clamps_codes_at_zero(node, plan.network.module, scales.get(node.name))


def clamps_codes_at_zero(node: fx.Node, module: fx.GraphModule, scale: float | None) -> bool:
    """Whether a node of kind ``relu`` does no more to codes of this scale than to clamp them at 0.

    ReLU6 does not where the code of 6 is the largest: what exceeds 6 gets that code by saturation.
    """
    if not clamps_at_6(node, module):
        return True
    return scale is not None and float(quantize(torch.tensor(6.0), scale)) == ACTIVATION_MAX


def _is_tuple(node: fx.Node) -> bool:
    """Whether a node gives several tensors (``chunk``, ``split``), of which others take single ones."""
    return any(reader.target is operator.getitem for reader in node.users)


def place_in_front(plan: Int8Plan) -> Placement:
    """Quantize each value right in front of the INT8 layers that read it, and nowhere else.

    TensorRT moves quantization from there to where it can be fused: past pooling and concatenation, up to the layer
    before. It does not move it down.
    """
    scales: dict[str, float] = {}
    readers: dict[str, set[str]] = {}
    for layer in plan.network.layers:
        for node in layer.inputs:
            if plan.reads_int8(layer, node):
                scales[node] = plan.scales[node]
                readers.setdefault(node, set()).add(layer.node)
    output = next(node for node in plan.network.module.graph.nodes if node.op == "output").all_input_nodes[0].name
    whole = {} if plan.output_scale is None else {output: plan.output_scale}
    return Placement(whole, whole, {node: (scales[node], frozenset(readers[node])) for node in scales}, {})


def fake_quantize(plan: Int8Plan, placement: Placement | None = None) -> fx.GraphModule:
    """The network with explicit quantization: float arithmetic on values that INT8 represents.

    Activations go through ``torch.fake_quantize_per_tensor_affine`` (zero point 0, codes -128 to 127) with the table's
    scales. Weights of convolution and linear layers in INT8 go through ``torch.fake_quantize_per_channel_affine``
    (along the output channels, codes -127 to 127, scale absmax / 127); they are stored as multiples of their scale
    already, so that they get the same codes whether an implementation divides by the scale or multiplies by its
    inverse. All scales are constants. The module scripts and traces.

    Args:
        plan: Which layers run in INT8, and the scales.
        placement: Where values are quantized; what :func:`place` finds if None.

    Returns:
        A module from ``data`` float32 [B, C, H, W] to ``prob`` float32 [B, classes], in eval mode.
    """
    placement = placement or place(plan)
    module = copy.deepcopy(plan.network.module)
    own_weights(module)
    nodes = {node.name: node for node in module.graph.nodes}
    for layer in plan.weighted:
        nodes[layer.node] = _quantize_weight(module, nodes[layer.node])
    for name, scale in placement.points.items():
        quantized = _insert(module, nodes[name], name, scale)
        nodes[name].replace_all_uses_with(quantized, delete_user_cb=lambda user, new=quantized: user is not new)
    for name, (scale, readers) in placement.partial.items():
        quantized = _insert(module, nodes[name], name, scale)
        for reader in readers:
            nodes[reader].replace_input_with(nodes[name], quantized)
    for node in module.graph.nodes:
        # Annotations of the user's forward, as text where its module postpones them, which does not script.
        node.type = None
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    return module.eval()


def own_weights(module: fx.GraphModule) -> None:
    """Give every call of a submodule that is called more than once, or whose weights others read, one of its own."""
    taken = {name for name, _ in module.named_modules(remove_duplicate=False)}
    seen = {str(node.target).rpartition(".")[0] for node in module.graph.nodes if node.op == "get_attr"}
    for node in module.graph.nodes:
        if node.op != "call_module":
            continue
        target = str(node.target)
        if target in seen:
            number = 1
            while f"{target}_{number}" in taken:
                number += 1
            taken.add(f"{target}_{number}")
            module.add_submodule(f"{target}_{number}", copy.deepcopy(module.get_submodule(target)))
            node.target = f"{target}_{number}"
        seen.add(str(node.target))


def _insert(module: fx.GraphModule, node: fx.Node, name: str, scale: float) -> fx.Node:
    """Fake-quantize a value, right after it is made, in a node ``<name>_quantized``."""
    arguments = (node, scale, 0, ACTIVATION_MIN, ACTIVATION_MAX)
    with module.graph.inserting_after(node):
        return module.graph.create_node(
            "call_function", torch.fake_quantize_per_tensor_affine, arguments, name=f"{name}_quantized"
        )


def _quantize_weight(module: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Replace a layer by its function on the fake-quantized weight, and return what replaces it."""
    target = str(node.target)
    layer = module.get_submodule(target)
    assert isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)  # Int8Plan.weighted holds nothing else
    axis = channel_axis(layer)
    codes, scales = quantize_weight(layer.weight, axis)
    # A parameter of its own: layers in float may share the one that it had.
    layer.weight = nn.Parameter(codes * along(scales, codes, axis), requires_grad=False)
    layer.register_buffer("weight_scale", scales)
    layer.register_buffer("weight_zero_point", torch.zeros_like(scales, dtype=torch.int32))
    graph = module.graph
    with graph.inserting_before(node):
        weight = graph.call_function(
            torch.fake_quantize_per_channel_affine,
            (
                graph.get_attr(f"{target}.weight"),
                graph.get_attr(f"{target}.weight_scale"),
                graph.get_attr(f"{target}.weight_zero_point"),
                axis,
                -WEIGHT_MAX,
                WEIGHT_MAX,
            ),
        )
        bias = None if layer.bias is None else graph.get_attr(f"{target}.bias")
        arguments = (node.all_input_nodes[0], weight, bias)
        if isinstance(layer, nn.Conv2d):
            result = graph.call_function(
                F.conv2d, (*arguments, layer.stride, layer.padding, layer.dilation, layer.groups)
            )
        elif isinstance(layer, nn.ConvTranspose2d):
            placed = (layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation)
            result = graph.call_function(F.conv_transpose2d, (*arguments, *placed))
        else:
            result = graph.call_function(F.linear, arguments)
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    return result
