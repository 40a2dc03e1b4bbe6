"""The form of a quantized network that TensorRT computes in its own fused kernels, with explicit quantization.

TensorRT computes a convolution, the sum with a shortcut and the activation that follows as one kernel, and a pair of
quantize/dequantize between them breaks it into several. NVIDIA's rules (TensorRT developer guide, "Working with
Quantized Types"): quantize the inputs of convolutions, matrix products and pooling; quantize no output that an
activation or a residual sum follows; of a residual sum quantize the shortcut alone. Its matrix products, unlike its
convolutions, take longer in INT8 than in float for small networks, so that linear layers become convolutions.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import fx, nn
from torch.nn.utils import skip_init

from calib.network import Layer, copy_sharing_weights
from calib.plan import Int8Plan

_ELEMENTWISE = frozenset({"relu", "activation"})


def for_tensorrt(plan: Int8Plan) -> Int8Plan:
    """The plan as TensorRT carries it out best: :func:`fuse`, then :func:`linear_as_convolution`."""
    return linear_as_convolution(fuse(plan))


def fuse(plan: Int8Plan) -> Int8Plan:
    """The plan without the roundings that stand within what TensorRT computes as one.

    - A sum in which a convolution's result goes nowhere else takes that in float, and the other side quantized; any
      other sum is computed in float.
    - Activations such as SiLU are computed in float, in the layer before them.
    - A value is quantized once, with the scale of whoever reads it: not a first time for its own tensor's.

    Args:
        plan: Which layers run in INT8.
    """
    nodes = {node.name: node for node in plan.network.module.graph.nodes}
    weighted = {layer.node for layer in plan.weighted}
    layers = set(plan.layers)
    float_inputs: dict[str, frozenset[str]] = {}
    for layer in plan.network.layers:
        if layer.kind == "add" and layer.name in layers:
            computed = [item for item in layer.inputs if item in weighted and len(nodes[item].users) == 1]
            if computed:
                float_inputs[layer.name] = frozenset(computed[:1])
            else:
                layers.remove(layer.name)
        elif layer.kind == "activation":
            layers.discard(layer.name)
    return dataclasses.replace(plan, layers=frozenset(layers), own_scales={}, float_inputs=float_inputs)


def linear_as_convolution(plan: Int8Plan) -> Int8Plan:
    """The same plan with linear layers in INT8 as convolutions of the same weights, where their input allows it.

    A layer that reads a flattened feature map becomes a convolution of the map's size. What it gives stays
    [B, channels, 1, 1] for the linear layers that follow, and is flattened for everything else.

    Args:
        plan: Of a network traced with an ``input_shape``; without one, it is returned as it is.
    """
    if plan.network.input_shape is None:
        return plan
    module = copy_sharing_weights(plan.network.module)
    rewriting = _Rewriting(plan, module, plan.network.value_shapes(2))
    for node in list(module.graph.nodes):
        rewriting.visit(node)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.delete_all_unused_submodules()
    module.recompile()
    return rewriting.result()


class _Rewriting:
    """Turns a network's linear layers into convolutions, node by node, and keeps its description in step."""

    def __init__(self, plan: Int8Plan, module: fx.GraphModule, shapes: dict[str, torch.Size]) -> None:
        self._plan = plan
        self._module = module
        self._shapes = shapes
        self._linear = {layer.node for layer in plan.weighted if layer.kind == "linear"}
        self._maps: set[fx.Node] = set()  # [B, channels, 1, 1] that were [B, channels]
        self._targets: dict[str, str] = {}
        self._flat: dict[fx.Node, fx.Node] = {}

    def visit(self, node: fx.Node) -> None:
        """Rewrite one node; those that it reads have been visited."""
        if node.name in self._linear:
            source = self._map(node.all_input_nodes[0])
            if source is not None:
                self._make_convolution(node, source)
                return
        maps = [item for item in node.all_input_nodes if item in self._maps]
        if maps and self._plan.network.kinds.get(node.name) in _ELEMENTWISE:
            self._maps.add(node)
            return
        for item in maps:
            node.replace_input_with(item, self._flattened(item))

    def _map(self, node: fx.Node) -> fx.Node | None:
        """The feature map [B, C, H, W] whose values ``node`` has in the same order as [B, C * H * W], or None."""
        if node in self._maps:
            return node
        shape = self._shapes[node.name]
        if self._plan.network.kinds[node.name] != "view" or len(shape) != 2:
            return None
        source = node.all_input_nodes[0]
        before = self._shapes.get(source.name, torch.Size())
        flattens = len(before) == 4 and before[0] == shape[0] and math.prod(before[1:]) == shape[1]
        return source if flattens and source not in self._maps else None

    def _make_convolution(self, node: fx.Node, source: fx.Node) -> None:
        linear = self._module.get_submodule(str(node.target))
        assert isinstance(linear, nn.Linear)  # plan.weighted says so
        size = (1, 1) if source in self._maps else tuple(self._shapes[source.name][2:])
        name = f"{node.name}_convolution"
        while hasattr(self._module, name):
            name += "_"
        self._module.add_module(name, _convolution(linear, size))
        node.target, node.args, node.kwargs = name, (source,), {}
        self._targets[node.name] = name
        self._maps.add(node)

    def _flattened(self, node: fx.Node) -> fx.Node:
        """A map as [B, channels]."""
        if node not in self._flat:
            with self._module.graph.inserting_after(node):
                self._flat[node] = self._module.graph.call_function(torch.flatten, (node, 1))
        return self._flat[node]

    def result(self) -> Int8Plan:
        """The plan of the rewritten network."""
        plan, network = self._plan, self._plan.network
        nodes = {node.name: node for node in self._module.graph.nodes}
        flat = {new.name: old.name for old, new in self._flat.items()}
        kinds = {name: kind for name, kind in network.kinds.items() if name in nodes}
        kinds.update(dict.fromkeys(self._targets, "conv"), **dict.fromkeys(flat, "view"))
        tensor_of = {name: tensor for name, tensor in network.tensor_of.items() if name in nodes}
        tensor_of.update({new: network.tensor_of[old] for new, old in flat.items() if old in network.tensor_of})
        outputs = tuple(item.name for item in nodes["output"].all_input_nodes)
        # An output keeps its name in its own shape.
        renamed = {old: new for new, old in flat.items() if new in outputs}
        observed = {renamed.get(name, name): tensor for name, tensor in network.observed.items()}
        layers = tuple(self._layer(layer, nodes[layer.node], kinds) for layer in network.layers)
        by_name = {layer.name: layer for layer in layers}
        tensor_scales = {network.tensor_of[node]: scale for node, scale in plan.scales.items()}
        scales = {
            item: tensor_scales[tensor_of[item]]
            for layer in layers
            for item in layer.inputs
            if tensor_of.get(item) in tensor_scales
        }
        in_float = {
            name: frozenset(item for item in by_name[name].inputs if flat.get(item, item) in items)
            for name, items in plan.float_inputs.items()
        }
        return dataclasses.replace(
            plan,
            network=dataclasses.replace(
                network,
                module=self._module,
                kinds=kinds,
                tensor_of=tensor_of,
                observed=observed,
                layers=layers,
                outputs=outputs,
            ),
            scales=scales,
            weighted=tuple(by_name[layer.name] for layer in plan.weighted),
            float_inputs=in_float,
        )

    def _layer(self, layer: Layer, node: fx.Node, kinds: dict[str, str]) -> Layer:
        inputs = tuple(item.name for item in node.all_input_nodes if kinds.get(item.name) not in ("shape", None))
        target = self._targets.get(layer.node)
        if target is None:
            return dataclasses.replace(layer, inputs=inputs)
        return dataclasses.replace(layer, kind="conv", inputs=inputs, target=target)


def _convolution(linear: nn.Linear, size: tuple[int, ...]) -> nn.Conv2d:
    """A convolution [B, C, H, W] -> [B, M, 1, 1] of what ``linear`` computes from [B, C * H * W]."""
    height, width = size
    # Without an initialisation, which would draw random numbers.
    result: nn.Conv2d = skip_init(
        nn.Conv2d,
        linear.in_features // (height * width),
        linear.out_features,
        (height, width),
        bias=linear.bias is not None,
        dtype=linear.weight.dtype,
    ).requires_grad_(False)
    result.weight.copy_(linear.weight.detach().reshape(result.weight.shape))
    if result.bias is not None:
        result.bias.copy_(linear.bias.detach())
    return result.eval()
