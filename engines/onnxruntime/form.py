"""The form of a quantized network that ONNX Runtime computes in its integer kernels on a CPU.

Its integer convolution gives codes; it has none that gives float, as its matrix product does. A convolution whose
result something reads in float would be computed in float altogether. Two ways out, where they pay:

- A pointwise convolution is a matrix product over the channels, with the same numbers.
- The result of any other is rounded to the scale that the calibration table has for it. That changes the numbers, by
  less than a rounding of what follows would: each convolution has a scale of its own.

Convolutions that cut an image into patches stay as they are: they are few of the multiply-accumulates, and what follows
them in a transformer is float.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from calib.explicit import Placement, clamps_codes_at_zero, place
from calib.ops import MOVES_VALUES
from calib.plan import Int8Plan
from engines.onnxruntime.columns import columns_at_once, compute_columns_at_once


def for_onnxruntime(plan: Int8Plan) -> Int8Plan:
    """The plan with the results of convolutions rounded that something reads in float, and with integer biases.

    Transposed convolutions, for which there is no integer kernel, are left in float.

    The integer convolution adds an int32 bias to its sum, a multiple of input scale * weight scale. What that rounds
    off is no more than half a step of the sum, which can still turn a code by one.

    Rounded are only those of overlapping windows, and only inside the network: what no INT8 layer follows, such as the
    scores of a segmentation network, stays in float, and so does what a layer reads that is kept in float.

    Args:
        plan: Which layers run in INT8.
    """
    network = plan.network
    module = network.module
    nodes = {node.name: node for node in module.graph.nodes}
    followed = _followed(plan)
    kept = {layer.node for layer in network.layers if layer.name not in plan.layers}
    plan = _without_transposed(plan)
    quantized = place(plan, before_relu=True).scales
    rounded = set(plan.rounded)
    biases = set()
    for layer in plan.weighted:
        node = nodes[layer.node]
        conv = module.get_submodule(str(layer.target))
        if layer.node in quantized or not is_pointwise(conv):
            biases.add(layer.node)
        if layer.node in quantized or not isinstance(conv, nn.Conv2d) or is_pointwise(conv) or _cuts_patches(conv):
            continue
        readers = list(node.users)
        if len(readers) == 1 and network.kinds.get(readers[0].name) == "relu":
            (node,) = readers
            if not clamps_codes_at_zero(node, module, plan.own_scales.get(node.name)):
                continue
        if node.name in plan.own_scales and node.name in followed and not _readers(node, plan) & kept:
            rounded.add(node.name)
    return dataclasses.replace(plan, rounded=frozenset(rounded), integer_biases=frozenset(biases))


def _without_transposed(plan: Int8Plan) -> Int8Plan:
    module = plan.network.module
    weighted = [
        layer for layer in plan.weighted if not isinstance(module.get_submodule(str(layer.target)), nn.ConvTranspose2d)
    ]
    gone = {layer.name for layer in plan.weighted} - {layer.name for layer in weighted}
    return dataclasses.replace(plan, layers=plan.layers - gone, weighted=tuple(weighted))


def _followed(plan: Int8Plan) -> set[str]:
    """The fx nodes on which a layer in INT8 depends."""
    in_int8 = {layer.node for layer in plan.network.layers if layer.name in plan.layers}
    found: set[str] = set()
    for node in reversed(plan.network.module.graph.nodes):
        if any(reader.name in in_int8 or reader.name in found for reader in node.users):
            found.add(node.name)
    return found


def _readers(node: fx.Node, plan: Int8Plan) -> set[str]:
    """The fx nodes that read a value, as it is or clamped and moved."""
    found: set[str] = set()
    for reader in node.users:
        moves = plan.network.kinds.get(reader.name) in MOVES_VALUES | {"relu"}
        found |= _readers(reader, plan) if moves else {reader.name}
    return found


def _cuts_patches(conv: nn.Conv2d) -> bool:
    """Whether a convolution has a window for each patch of the image."""
    return conv.kernel_size == conv.stride and conv.kernel_size != (1, 1)


def is_pointwise(conv: nn.Module) -> bool:
    """Whether a module is a convolution that multiplies each pixel's channels with one matrix."""
    return (
        isinstance(conv, nn.Conv2d)
        and (conv.kernel_size, conv.stride, conv.groups) == ((1, 1), (1, 1), 1)
        and conv.padding in ("same", "valid", (0, 0))
    )


def rewrite_for_kernels(
    plan: Int8Plan,
    placement: Placement,
    module: fx.GraphModule,
    shapes: Mapping[str, torch.Size],
    columns: bool = True,
) -> None:
    """Write a network in the operations for which there are integer kernels; its values stay the same.

    Between two quantized values, ReLU becomes a leaky ReLU of slope 0, and convolutions of few channels compute several
    columns at once (:mod:`engines.onnxruntime.columns`); a pointwise convolution that gives float becomes a matrix
    product.

    Args:
        plan: What :func:`for_onnxruntime` gave.
        placement: Where its values are quantized, with quantization passing through ReLU.
        module: A copy of the network's, changed in place.
        shapes: fx node -> shape of its value.
        columns: Whether several columns at once may be computed, which fixes the size of the images.
    """
    kinds, quantized = plan.network.kinds, placement.scales
    in_int8 = {layer.node for layer in plan.weighted}
    for node in list(module.graph.nodes):
        if node.name not in quantized:
            if node.name in in_int8 and is_pointwise(module.get_submodule(str(node.target))):
                compute_as_product(module, node)
        elif not all(source.name in quantized for source in node.all_input_nodes):
            continue
        elif kinds.get(node.name) == "relu" and clamps_codes_at_zero(node, module, quantized[node.name]):
            node.op, node.target = "call_function", F.leaky_relu
            node.args, node.kwargs = (*node.all_input_nodes, 0.0), {}
        elif columns and kinds.get(node.name) == "conv" and node.op == "call_module":
            height, width = shapes[node.name][-2:]
            count = columns_at_once(module.get_submodule(str(node.target)), width)
            if count > 1:
                compute_columns_at_once(module, node, (height, width), count)


def compute_as_product(module: fx.GraphModule, node: fx.Node) -> None:
    """Let a pointwise convolution compute as a matrix product; the network's numbers stay the same.

    Args:
        module: Changed in place; to be exported.
        node: Calls what :func:`is_pointwise` accepts; afterwards it gives the same value [B, M, H, W].
    """
    conv = module.get_submodule(str(node.target))
    assert isinstance(conv, nn.Conv2d)
    name = f"{node.name}_product"
    while hasattr(module, name):
        name += "_"
    module.add_module(name, _Product(conv))
    with module.graph.inserting_before(node):
        rows = module.graph.call_function(torch.permute, (node.all_input_nodes[0], (0, 2, 3, 1)))
        product = module.graph.call_module(name, (rows,))
    node.op, node.target, node.args, node.kwargs = "call_function", torch.permute, (product, (0, 3, 1, 2)), {}


class _Product(nn.Module):
    """[B, H, W, C] -> [B, H, W, M]: what a pointwise convolution computes.

    No :class:`torch.nn.Linear`, whose transposed weight PyTorch's exporter would store under a number as its name.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight = nn.Parameter(conv.weight.detach().flatten(1).t().contiguous(), requires_grad=False)
        self.bias: Any = conv.bias

    def forward(self, rows: Tensor) -> Tensor:
        product = torch.matmul(rows, self.weight)
        return product if self.bias is None else product + self.bias
