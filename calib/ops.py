"""Kinds of operation: which modules, functions and methods are a convolution, a sum, a view, and so on.

``nothing`` has no effect in eval mode, ``shape`` computes with sizes, ``other`` stays in float.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import fx, nn
from torch.nn import functional as F

MODULES: Final[Mapping[type[nn.Module], str]] = {
    nn.Conv2d: "conv",
    nn.ConvTranspose2d: "conv",
    nn.Linear: "linear",
    nn.BatchNorm2d: "batchnorm",
    nn.BatchNorm1d: "batchnorm",
    nn.ReLU: "relu",
    nn.ReLU6: "relu",
    nn.SiLU: "activation",
    nn.Hardswish: "activation",
    nn.MaxPool2d: "maxpool",
    nn.AdaptiveMaxPool2d: "maxpool",
    nn.AvgPool2d: "avgpool",
    nn.AdaptiveAvgPool2d: "avgpool",
    nn.Softmax: "softmax",
    nn.Flatten: "view",
    nn.Unflatten: "view",
    nn.Identity: "nothing",
    nn.Dropout: "nothing",
    nn.Dropout1d: "nothing",
    nn.Dropout2d: "nothing",
    nn.AlphaDropout: "nothing",
}
_FUNCTIONS: Final[Mapping[Callable[..., Any], str]] = {
    F.relu: "relu",
    F.relu6: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.silu: "activation",
    F.hardswish: "activation",
    F.max_pool2d: "maxpool",
    torch.max_pool2d: "maxpool",
    F.adaptive_max_pool2d: "maxpool",
    F.avg_pool2d: "avgpool",
    F.adaptive_avg_pool2d: "avgpool",
    torch.add: "add",
    operator.add: "add",
    operator.iadd: "add",
    torch.matmul: "matmul",
    torch.bmm: "matmul",
    operator.matmul: "matmul",
    torch.cat: "concat",
    torch.concat: "concat",
    F.softmax: "softmax",
    torch.softmax: "softmax",
    torch.flatten: "view",
    torch.reshape: "view",
    torch.squeeze: "view",
    torch.unsqueeze: "view",
    torch.permute: "view",
    torch.transpose: "view",
    torch.chunk: "view",
    torch.split: "view",
    torch.unbind: "view",
    torch.select: "view",
    torch.narrow: "view",
    torch.unflatten: "view",
    F.dropout: "nothing",
    getattr: "shape",
}
_METHODS: Final[Mapping[str, str]] = {
    "relu": "relu",
    "relu_": "relu",
    "add": "add",
    "add_": "add",
    "matmul": "matmul",
    "bmm": "matmul",
    "softmax": "softmax",
    "flatten": "view",
    "reshape": "view",
    "view": "view",
    "squeeze": "view",
    "unsqueeze": "view",
    "permute": "view",
    "transpose": "view",
    "contiguous": "view",
    "item": "nothing",
    "chunk": "view",
    "split": "view",
    "unbind": "view",
    "select": "view",
    "unflatten": "view",
    "size": "shape",
    "dim": "shape",
}

_MAKERS: Final = frozenset({"zeros", "ones", "full", "empty", "arange", "eye", "linspace"})

MOVES_VALUES: Final = frozenset({"maxpool", "view", "concat"})
"""Operations that only move or choose values: quantizing what they read is quantizing what they give."""
QUANTIZABLE: Final = frozenset({"conv", "linear", "matmul", "add", "avgpool", "activation"})
"""Kinds of layer that run in INT8, quantizing their inputs."""


def kind_of(node: fx.Node, module: fx.GraphModule) -> str:
    """What an fx node does: a kind of layer, ``input``, ``output``, ``shape`` or ``other``."""
    if node.op == "placeholder":
        return "input"
    if node.op in ("output", "get_attr"):
        return node.op
    if node.op == "call_module":
        kind = _kind_of_module(module.get_submodule(str(node.target)))
        # A transposed convolution may be told the size of its result.
        return "other" if kind == "conv" and len(node.args) + len(node.kwargs) > 1 else kind
    if node.op == "call_method":
        kind = _METHODS.get(str(node.target), "other")
    elif node.target is operator.getitem:
        source, *indices = node.all_input_nodes
        part = gives_tuple(source) and kind_of(source, module) == "other"
        computed = any(kind_of(index, module) not in ("get_attr", "shape") for index in indices)
        kind = "shape" if _of_shapes(node, module) else "other" if part or computed else "view"
    elif _is_idle_stochastic_depth(node):
        kind = "nothing"
    else:
        kind = _FUNCTIONS.get(node.target, "other")  # type: ignore[arg-type]
    if kind in ("add", "other") and _of_shapes(node, module) and not _makes_tensor(node):
        return "shape"
    if kind == "add" and (len(node.all_input_nodes) != 2 or "alpha" in node.kwargs):
        return "other"
    if kind == "matmul" and any(item.op == "get_attr" for item in node.all_input_nodes):
        return "other"
    if kind == "shape" and node.target is getattr and node.args[1] not in ("shape", "ndim"):
        return "other"
    return kind


def _kind_of_module(module: nn.Module) -> str:
    base = next((base for base in type(module).__mro__ if base in MODULES), None)
    if base is None or module._forward_hooks or module._forward_pre_hooks:
        return "other"
    # A subclass is the layer that it derives from only if it computes the same.
    for method in ("forward", "_conv_forward"):
        if getattr(type(module), method, None) is not getattr(base, method, None) or method in vars(module):
            return "other"
    if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
        return "other"
    if isinstance(module, nn.ConvTranspose2d) and module.groups > 1:
        return "other"  # the axis of its channels holds those of one group
    return MODULES[base]


def clamps_at_6(node: fx.Node, module: fx.GraphModule) -> bool:
    """Whether a node of kind ``relu`` is a ReLU6."""
    if node.op == "call_module":
        return not isinstance(module.get_submodule(str(node.target)), nn.ReLU)
    return node.target is F.relu6


def is_adaptive(node: fx.Node, module: fx.GraphModule) -> bool:
    """Whether a node of kind ``avgpool`` is told the size of what it gives, and not that of its windows."""
    if node.op == "call_module":
        return isinstance(module.get_submodule(str(node.target)), nn.AdaptiveAvgPool2d)
    return node.target is F.adaptive_avg_pool2d


def gives_tuple(node: fx.Node) -> bool:
    """Whether an operation gives several values (``chunk``, ``max`` over a dimension), to judge by its readers."""
    return bool(node.users) and all(
        reader.target is operator.getitem and isinstance(reader.args[1], int) for reader in node.users
    )


def _is_idle_stochastic_depth(node: fx.Node) -> bool:
    """Stochastic depth of torchvision, which hides it from tracing, in eval mode."""
    if getattr(node.target, "__module__", None) != "torchvision.ops.stochastic_depth":
        return False
    return node.kwargs.get("training", node.args[3] if len(node.args) > 3 else True) is False


def _makes_tensor(node: fx.Node) -> bool:
    """Whether an operation makes a tensor of sizes, such as a mask for each image."""
    name = getattr(node.target, "_opname", None) or getattr(node.target, "__name__", None)
    return name in _MAKERS


def _of_shapes(node: fx.Node, module: fx.GraphModule) -> bool:
    """Whether a node computes with sizes, not with tensors."""
    inputs = node.all_input_nodes
    return bool(inputs) and all(kind_of(item, module) == "shape" for item in inputs)
