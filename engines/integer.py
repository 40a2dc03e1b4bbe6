"""The exact integer arithmetic of the reference, simulated: int8 operands, int32 accumulation.

An INT8 layer quantizes its inputs; a convolution or matrix product then sums products of int8 codes exactly, scales
the sum by (input scale * weight scale), adds the bias in float, and whoever reads the result next quantizes it again
(a plan may ask for biases that are rounded and added to the sum, as ONNX Runtime's kernels do).
Average pooling between values of one scale averages the codes, and rounds the middle between two to even.
A value that goes both to a layer and to a concatenation of another scale is quantized with its own scale first.

The sums are formed by float matrix products on integer-valued operands. They are exact: every product and every
partial sum is an integer, and float32 holds all integers up to 2^24. No partial sum of an output channel, in whatever
order, exceeds 128 times the sum of its weights' magnitudes; a layer where that bound passes 2^24 (1033 weights of the
largest code do) is computed in float64, which is exact up to 2^53.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from calib.explicit import place
from calib.int8 import ACTIVATION_MIN, channel_axis, quantize, quantize_weight
from calib.network import Layer, Network, is_activation
from calib.ops import is_adaptive
from calib.plan import Int8Plan

_EXACT_FLOAT32 = 2**24

_MIDDLE = 128

LARGEST_BIAS = 2**30
"""Steps of the int32 sum up to which a bias is added to it."""


class _WeightedLayer:
    """A convolution or linear layer on codes.

    Args:
        layer: Of the plan, with a name in the table.
        module: What it calls.
        input_scale: Of the codes that it is given.
        integer_bias: Whether the bias is rounded and added to the sum (``Int8Plan.integer_biases``).
        output_scale: Of the codes that the sum becomes in one multiplication, as ONNX Runtime's kernels do it
            (``MlasRequantizeOutput``); None where the sum is scaled first, and quantized by who reads it.
    """

    def __init__(
        self,
        layer: Layer,
        module: nn.Module,
        input_scale: float,
        integer_bias: bool = False,
        output_scale: float | None = None,
    ) -> None:
        assert isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)  # plan.weighted holds nothing else
        self.module = module
        axis = channel_axis(module)
        codes, scales = quantize_weight(module.weight, axis)
        largest_sum = -ACTIVATION_MIN * int(codes.movedim(axis, 0).abs().flatten(1).sum(1, dtype=torch.float64).max())
        self.dtype = torch.float32 if largest_sum <= _EXACT_FLOAT32 else torch.float64
        self.codes = codes.to(self.dtype)
        shape = (-1,) if isinstance(module, nn.Linear) else (-1, 1, 1)
        self.scale = (scales * input_scale).reshape(shape)
        self.bias = None if module.bias is None else module.bias.detach().reshape(shape)
        self.output_scale = output_scale
        self.bias_codes = None
        if integer_bias and self.bias is not None:
            exact = self.bias.double() / self.scale.double()
            # Behind weights next to nothing, a bias in these steps would exceed int32.
            self.bias_codes = torch.where(exact.abs() <= LARGEST_BIAS, exact.round(), exact)

    def __call__(self, codes: Tensor) -> Tensor:
        total = self.accumulate(codes)
        # Several vectors for each image go through a matrix product that is no layer of its own, and takes no bias.
        in_one = not isinstance(self.module, nn.Linear) or codes.dim() == 2
        bias = self.bias
        if self.bias_codes is not None and in_one:
            total, bias = total.to(torch.float64) + self.bias_codes, None
        total = total.to(torch.float32)
        if self.output_scale is not None and in_one and bias is None:
            step = self.scale / torch.tensor(self.output_scale, dtype=torch.float32)
            return quantize(total.mul_(step), 1.0).mul_(self.output_scale)
        total = total.mul_(self.scale)
        return total if bias is None else total.add_(bias)

    def accumulate(self, codes: Tensor) -> Tensor:
        """The int32 sums, exact, as float32 or float64."""
        codes = codes.to(self.dtype)
        module = self.module
        if isinstance(module, nn.Conv2d):
            return F.conv2d(codes, self.codes, None, module.stride, module.padding, module.dilation, module.groups)
        if isinstance(module, nn.ConvTranspose2d):
            placed: tuple[Any, ...] = (
                module.stride,
                module.padding,
                module.output_padding,
                module.groups,
                module.dilation,
            )
            return F.conv_transpose2d(codes, self.codes, None, *placed)
        return F.linear(codes, self.codes)


class IntegerNetwork(fx.Interpreter):
    """Runs a network in the integer arithmetic of its plan; layers outside the plan run in float32.

    Args:
        plan: Which layers run in INT8, and the scales.
        observe: Called with (tensor name, float32 value) for every named tensor, in network order, as
            ``Network.run`` does; must not modify the value.
    """

    def __init__(self, plan: Int8Plan, observe: Callable[[str, Tensor], None] | None = None) -> None:
        super().__init__(plan.network.module)
        self.extra_traceback = False
        self.plan = plan
        self._observe = observe
        self._layers = {layer.node: layer for layer in plan.network.layers if layer.name in plan.layers}
        # Scales of the codes that layers give, where the plan is carried out by integer kernels.
        placement = place(plan, before_relu=True)
        self._given = placement.scales if plan.integer_biases else {}
        self._rectified = placement.rectified
        self._weighted = {
            layer.node: _WeightedLayer(
                layer,
                plan.network.module.get_submodule(str(layer.target)),
                plan.scales[layer.inputs[0]],
                layer.node in plan.integer_biases,
                self._given.get(layer.node) if layer.node in plan.integer_biases else None,
            )
            for layer in plan.weighted
        }
        self._codes: dict[str, Tensor] = {}
        self._requantized = place(plan).requantized
        self._pools = _window_pools(plan.network)
        self._averaged = _averaged(plan, placement.scales, self._pools)

    def __call__(self, images: Tensor) -> Tensor:
        """float32 [B, C, H, W] -> what the network gives: a tensor, or a tuple of tensors."""
        with torch.inference_mode():
            result: Tensor = self.run(images)
        if self.plan.output_scale is not None:
            result = quantize(result, self.plan.output_scale) * self.plan.output_scale
        return result

    def only(self, names: Collection[str]) -> IntegerNetwork:
        """The same network with only these of its INT8 layers in INT8; the weights are shared, not copied."""
        result = copy.copy(self)
        result._layers = {node: layer for node, layer in self._layers.items() if layer.name in names}
        result._weighted = {node: layer for node, layer in self._weighted.items() if node in result._layers}
        result._codes = {}
        plan = dataclasses.replace(self.plan, layers=frozenset(layer.name for layer in result._layers.values()))
        result._requantized = place(plan).requantized
        result._averaged = _averaged(plan, place(plan, before_relu=True).scales, self._pools)
        return result

    def run_node(self, n: fx.Node) -> Any:
        layer = self._layers.get(n.name)
        if layer is None:
            value = super().run_node(n)
        elif n.name in self._weighted:
            value = self._weighted[n.name](self._input_codes(n.all_input_nodes[0]))
        else:
            value = self._dequantized(n)
        if n.name in self._requantized:
            value = quantize(value, self._requantized[n.name]) * self._requantized[n.name]
        if self._observe is not None:
            name = self.plan.network.observed.get(n.name)
            if name is not None and is_activation(value):
                self._observe(name, value)
        for source in self.user_to_last_uses.get(n, ()):
            self._codes.pop(source.name, None)
        return value

    def _input_codes(self, source: fx.Node) -> Tensor:
        """Codes of an activation, made once however many layers read it."""
        codes = self._codes.get(source.name)
        if codes is None:
            codes = quantize(self.env[source], self.plan.scales[source.name])
            if len(source.users) > 1:
                self._codes[source.name] = codes
        return codes

    def _dequantized(self, node: fx.Node) -> Any:
        """Run a layer without weights (addition, average pooling, ...) on the values that its input codes stand for."""
        layer = self._layers[node.name]
        kept = {source: self.env[source] for source in node.all_input_nodes if self.plan.reads_int8(layer, source.name)}
        if layer.kind == "add" and node.name in self._given and len(kept) == 2:  # neither a constant nor a value twice
            first, second = kept
            return self._added(first, second, self._given[node.name])
        scale = self._averaged.get(node.name)
        for source in kept:
            codes = self._input_codes(source)
            self.env[source] = codes if scale is not None else codes * self.plan.scales[source.name]
        try:
            value = super().run_node(node)
        finally:
            self.env.update(kept)
        return value if scale is None else quantize(value, 1.0).mul_(scale)

    def _added(self, first: fx.Node, second: fx.Node, scale: float) -> Tensor:
        """A sum as ONNX Runtime's kernel forms it (``MlasQLinearAdd``): two fused multiply-adds in float32.

        Its codes are unsigned: 128 more than ours, but for those that are never negative. In float64, a product and its
        sum are exact before they are rounded.
        """
        step = torch.tensor(scale, dtype=torch.float32)
        ratios = [torch.tensor(self.plan.scales[item.name], dtype=torch.float32) / step for item in (first, second)]
        zero_points = [0 if item.name in self._rectified else _MIDDLE for item in (first, second)]
        total = (_MIDDLE - (ratios[0] * zero_points[0] + ratios[1] * zero_points[1])).double()
        for source, ratio, zero_point in ((second, ratios[1], zero_points[1]), (first, ratios[0], zero_points[0])):
            codes = self._input_codes(source).double() + zero_point
            total = (codes * ratio.double() + total).float().double()
        return quantize((total - _MIDDLE).float(), 1.0).mul_(scale)


def _averaged(plan: Int8Plan, given: Mapping[str, float], pools: Collection[str]) -> dict[str, float]:
    """Fx node -> scale, of the ``pools`` whose readers all take their codes with the scale of what they average.

    They average codes, and round the middle between two to even, as TensorRT's kernels do: of a mean of the values
    that codes stand for, the last bits of float32 would decide.

    Args:
        plan: Which layers run in INT8, and the scales.
        given: fx node -> scale of the codes that it gives, as :func:`place` finds them with ``before_relu``.
        pools: fx nodes of average pooling with windows of one size.
    """
    averaging = [layer for layer in plan.network.layers if layer.node in pools and layer.name in plan.layers]
    return {
        layer.node: given[layer.node] for layer in averaging if given.get(layer.node) == plan.scales[layer.inputs[0]]
    }


def _window_pools(network: Network) -> frozenset[str]:
    """The fx nodes of average pooling with windows of one size.

    Adaptive pooling has windows of several sizes where those of the maps do not divide, and is computed in float then.
    """
    nodes = {node.name: node for node in network.module.graph.nodes}
    pools = {layer.node for layer in network.layers if layer.kind == "avgpool"}
    adaptive = {name for name in pools if is_adaptive(nodes[name], network.module)}
    if not adaptive or network.input_shape is None:
        return frozenset(pools - adaptive)
    shapes = network.value_shapes(1)
    for name in adaptive:
        (source,) = nodes[name].all_input_nodes
        sizes = zip(shapes[source.name][-2:], shapes[name][-2:], strict=True)
        if any(before % after for before, after in sizes):
            pools.remove(name)
    return frozenset(pools)
