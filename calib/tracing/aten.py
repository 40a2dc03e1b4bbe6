"""ATen's operations: which give their input, and which function of PyTorch each of the others is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch.nn import functional as F

_aten = torch.ops.aten

SAME: Final[frozenset[Any]] = frozenset(
    {
        _aten.alias.default,
        _aten.clone.default,
        _aten.contiguous.default,
        _aten.detach.default,
        _aten.detach_.default,
        _aten.lift_fresh.default,
        _aten.lift_fresh_copy.default,
        _aten.positive.default,
        _aten.item.default,
        _aten._local_scalar_dense.default,
        _aten.dropout.default,
        _aten.dropout_.default,
        _aten.feature_dropout.default,
        _aten.feature_dropout_.default,
        _aten.alpha_dropout.default,
        _aten.alpha_dropout_.default,
        _aten.feature_alpha_dropout.default,
    }
)
"""Operations that give their input, in eval mode and in a graph whose every operation is pure.

A number taken out of a tensor (``item``) becomes the tensor, or else it would be that of the example image.
"""
FUNCTIONS: Final[Mapping[str, Callable[..., Any]]] = {
    "add": torch.add,
    "relu": torch.relu,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
    "hardsigmoid": F.hardsigmoid,
    "max_pool2d": F.max_pool2d,
    "avg_pool2d": F.avg_pool2d,
    "adaptive_avg_pool2d": F.adaptive_avg_pool2d,
    "adaptive_max_pool2d": F.adaptive_max_pool2d,
    "softmax": torch.softmax,
    "cat": torch.cat,
    "split_with_sizes": torch.split,
    "flatten": torch.flatten,
    "reshape": torch.reshape,
    "view": torch.reshape,
    "_unsafe_view": torch.reshape,
    "layer_norm": F.layer_norm,
    "group_norm": F.group_norm,
    "pad": F.pad,
    "matmul": torch.matmul,
    "bmm": torch.bmm,
}
"""ATen's name -> the function that the tracer's tables know, which takes the same arguments."""
OF_TORCH: Final = frozenset(
    {
        *("abs", "addcmul", "amax", "amin", "arange", "argmax", "bmm", "ceil", "chunk", "clamp", "clamp_min"),
        *("clamp_max", "empty", "eye", "full", "linspace", "ones", "zeros"),
        *("cos", "cumsum", "div", "eq", "exp", "flip", "floor", "floor_divide", "gather", "ge", "gt", "le", "log"),
        *("log_softmax", "logical_and", "logical_not", "logical_or", "lt", "masked_fill", "max", "maximum", "mean"),
        *("min", "minimum", "movedim", "mul", "narrow", "ne", "neg", "permute", "pixel_shuffle", "pixel_unshuffle"),
        *("pow", "reciprocal", "roll", "rsqrt", "rsub", "select", "sigmoid", "sin", "split", "sqrt", "square"),
        *("squeeze", "stack", "std", "sub", "sum", "swapaxes", "tanh", "topk", "transpose", "unbind", "unflatten"),
        *("unsqueeze", "var", "where"),
    }
)
"""ATen operations that ``torch`` has under the same name with the same arguments."""
