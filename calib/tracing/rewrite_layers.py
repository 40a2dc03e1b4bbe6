"""Convolutions, linear layers and batch normalisation written as the layers that they are."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, fx, nn

from calib.tracing.rewrite import Rewriter, Writer


def _conv2d(rewriter: Rewriter, node: fx.Node) -> Any:
    given = rewriter.named(node)
    weight, bias = rewriter.value(given["weight"]), rewriter.value(given["bias"])
    if weight is None or (given["bias"] is not None and bias is None):
        return None
    padding = given["padding"]
    layer = nn.Conv2d(
        weight.shape[1] * given["groups"],
        weight.shape[0],
        (weight.shape[2], weight.shape[3]),
        _pair(given["stride"]),
        padding if isinstance(padding, str) else _pair(padding),
        _pair(given["dilation"]),
        given["groups"],
        bias is not None,
        device="meta",
    )
    key = (layer.stride, layer.padding, layer.dilation, layer.groups)
    return _layer(rewriter, node, layer, rewriter.env[given["input"]], given["weight"], weight, bias, key)


def _conv_transpose2d(rewriter: Rewriter, node: fx.Node) -> Any:
    given = rewriter.named(node)
    weight, bias = rewriter.value(given["weight"]), rewriter.value(given["bias"])
    if weight is None or (given["bias"] is not None and bias is None):
        return None
    layer = nn.ConvTranspose2d(
        weight.shape[0],
        weight.shape[1] * given["groups"],
        (weight.shape[2], weight.shape[3]),
        _pair(given["stride"]),
        _pair(given["padding"]),
        _pair(given["output_padding"]),
        given["groups"],
        bias is not None,
        _pair(given["dilation"]),
        device="meta",
    )
    key = (layer.stride, layer.padding, layer.output_padding, layer.dilation, layer.groups)
    return _layer(rewriter, node, layer, rewriter.env[given["input"]], given["weight"], weight, bias, key)


def _linear(rewriter: Rewriter, node: fx.Node) -> Any:
    given = rewriter.named(node)
    weight, bias = rewriter.value(given["weight"]), rewriter.value(given["bias"])
    if weight is None or weight.dim() != 2 or (given["bias"] is not None and bias is None):
        return None
    return linear(rewriter, node, rewriter.env[given["input"]], given["weight"], weight, bias)


def _matmul(rewriter: Rewriter, node: fx.Node) -> Any:
    left, right = node.args[:2]
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    weight = rewriter.value(right)
    if weight is None or weight.dim() != 2:
        return None
    return linear(rewriter, node, rewriter.env[left], right, weight.t().contiguous())


def _addmm(rewriter: Rewriter, node: fx.Node) -> Any:
    given = rewriter.named(node)
    bias, weight = rewriter.value(given["self"]), rewriter.value(given["mat2"])
    if weight is None or bias is None or bias.dim() != 1 or given["beta"] != 1 or given["alpha"] != 1:
        return None
    return linear(rewriter, node, rewriter.env[given["mat1"]], given["mat2"], weight.t().contiguous(), bias)


def _batch_norm(rewriter: Rewriter, node: fx.Node) -> Any:
    given = rewriter.named(node)
    parts = [rewriter.value(given[key]) for key in ("running_mean", "running_var", "weight", "bias")]
    if parts[0] is None or parts[1] is None or given["training"]:
        return None
    return _norm(rewriter, node, given["input"], given["weight"] or given["running_mean"], parts, given["eps"])


def _native_batch_norm_legit_no_training(rewriter: Rewriter, node: fx.Node) -> Any:
    given = rewriter.named(node)
    parts = [rewriter.value(given[key]) for key in ("running_mean", "running_var", "weight", "bias")]
    if any(part is None for part in parts[:2]):
        return None
    result = _norm(rewriter, node, given["input"], given["weight"] or given["running_mean"], parts, given["eps"])
    for reader in list(node.users):
        # It gives the statistics as well; only the first value is read.
        rewriter.env[reader] = result
    return result


def _norm(
    rewriter: Rewriter, node: fx.Node, source: fx.Node, named_by: fx.Node, parts: list[Tensor | None], eps: float
) -> Any:
    mean, var, weight, bias = parts
    assert mean is not None and var is not None  # noqa: PT018
    example = source.meta.get("val")
    kind = nn.BatchNorm2d if isinstance(example, Tensor) and example.dim() == 4 else nn.BatchNorm1d
    layer = kind(len(mean), eps=eps, affine=True)
    layer.running_mean, layer.running_var = mean.detach().clone(), var.detach().clone()
    layer.weight = nn.Parameter(torch.ones_like(mean) if weight is None else weight.detach().clone())
    layer.bias = nn.Parameter(torch.zeros_like(mean) if bias is None else bias.detach().clone())
    return rewriter.call(node, layer, rewriter.env[source], named_by, (id(mean), id(var), id(weight), id(bias)))


def linear(
    rewriter: Rewriter, node: fx.Node, source: fx.Node, named_by: fx.Node, weight: Tensor, bias: Tensor | None = None
) -> fx.Node:
    """Write an operation as a linear layer.

    Args:
        rewriter: Of the new graph.
        node: The operation, in the old graph.
        source: What the layer reads, in the new graph.
        named_by: The constant that its weight is made of, in the old graph.
        weight: [outputs, inputs].
        bias: [outputs].
    """
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    return _layer(rewriter, node, layer, source, named_by, weight, bias, ())


def _layer(
    rewriter: Rewriter,
    node: fx.Node,
    layer: nn.Conv2d | nn.ConvTranspose2d | nn.Linear,
    source: fx.Node,
    named_by: fx.Node,
    weight: Tensor,
    bias: Tensor | None,
    key: tuple[Any, ...],
) -> fx.Node:
    layer.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
    return rewriter.call(node, layer, source, named_by, (*key, named_by.target, id(bias)))


def _pair(values: Any) -> Any:
    values = [values] if isinstance(values, int) else list(values)
    return tuple(values * 2 if len(values) == 1 else values)


WRITERS: Final[dict[str, Writer]] = {
    "conv2d": _conv2d,
    "conv_transpose2d": _conv_transpose2d,
    "linear": _linear,
    "matmul": _matmul,
    "mm": _matmul,
    "addmm": _addmm,
    "batch_norm": _batch_norm,
    "_native_batch_norm_legit_no_training": _native_batch_norm_legit_no_training,
}
"""ATen's name -> what writes the operation as a layer, where its weights are constants."""
