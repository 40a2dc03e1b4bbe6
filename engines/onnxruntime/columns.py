"""Convolutions of few channels in a form that ONNX Runtime's integer kernels compute faster, with the same numbers.

Its integer convolution gathers, for each output value, the patch of the input under the kernel. Where the number of
input channels is no multiple of 4, as in most first layers, it does so in pieces of a few bytes, which takes longer
than the arithmetic. A wider kernel computes several neighbouring columns of the output at once, as channels, from
one larger patch: more products, most of the new ones with weights of zero, but far fewer pieces.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import skip_init

_LARGEST: Final = 192


def columns_at_once(conv: nn.Module, width: int) -> int:
    """How many columns of its output a convolution should compute at once; 1 where that gains nothing.

    Limits of 192 terms in a sum and 192 channels made every first layer measured faster, on CPUs with AMX and with
    VNNI alone (``python -m benchmarks columns``), and LeNet's on one with AVX2 alone, where half as many take as
    long; beyond, the products with zeros cost what the larger patches save.

    Args:
        conv: Any module.
        width: Width of its output.
    """
    if not isinstance(conv, nn.Conv2d) or conv.in_channels % 4 == 0 or conv.groups > 1 or conv.dilation != (1, 1):
        return 1
    if _padding(conv) is None or conv.kernel_size == (1, 1):  # a pointwise convolution gathers no patches
        return 1
    height, kernel = conv.kernel_size
    most = _LARGEST // conv.out_channels
    widths = {count: kernel + (count - 1) * conv.stride[1] for count in range(2, most + 1) if width % count == 0}
    return max((count for count in widths if conv.in_channels * height * widths[count] <= _LARGEST), default=1)


def compute_columns_at_once(module: fx.GraphModule, node: fx.Node, size: tuple[int, int], columns: int) -> None:
    """Let a convolution compute several columns of its output at once; the network's numbers stay the same.

    Args:
        module: Changed in place; to be exported, not to be trained.
        node: Calls an :class:`torch.nn.Conv2d`; afterwards it gives the same value from what the wider one computes.
        size: Height and width of its output.
        columns: What :func:`columns_at_once` gave.
    """
    conv = module.get_submodule(str(node.target))
    assert isinstance(conv, nn.Conv2d)
    name = f"{node.name}_columns"
    while hasattr(module, name):
        name += "_"
    module.add_module(name, widened(conv, columns))
    with module.graph.inserting_before(node):
        wide = module.graph.call_module(name, tuple(node.all_input_nodes))
    node.op, node.target, node.args, node.kwargs = "call_function", spread, (wide, conv.out_channels, *size), {}


def spread(wide: Tensor, channels: int, height: int, width: int) -> Tensor:
    """Take the channels of neighbouring columns apart: [B, n * M, H, W / n] -> [B, M, H, W].

    Args:
        wide: What a convolution made by :func:`widened` gives.
        channels: M.
        height: H.
        width: W.
    """
    result: Tensor = _Spread.apply(wide, channels, height, width)  # type: ignore[no-untyped-call]
    return result


class _Spread(torch.autograd.Function):
    """A function with its own ONNX operators, because PyTorch's exporter forgets the sizes that a reshape is given.

    It would then find none for adaptive pooling further on.
    """

    @staticmethod
    def forward(ctx: Any, wide: Tensor, channels: int, height: int, width: int) -> Tensor:
        return wide.permute(0, 2, 3, 1).reshape(-1, height, width, channels).permute(0, 3, 1, 2)

    @staticmethod
    def symbolic(g: Any, wide: Any, channels: int, height: int, width: int) -> Any:
        shape = g.op("Constant", value_t=torch.tensor([-1, height, width, channels]))
        rows = g.op("Reshape", g.op("Transpose", wide, perm_i=[0, 2, 3, 1]), shape)
        result = g.op("Transpose", rows, perm_i=[0, 3, 1, 2])
        return result.setType(wide.type().with_sizes([None, channels, height, width]))


def widened(conv: nn.Conv2d, columns: int) -> nn.Conv2d:
    """A convolution [B, C, H, W] -> [B, ``columns`` * M, H', W' / ``columns``] of the values that ``conv`` computes.

    Channel ``i * M + m`` holds channel ``m`` of every column whose index leaves the remainder ``i``.

    Args:
        conv: [B, C, H, W] -> [B, M, H', W'], without groups and dilation.
        columns: How many columns at once; divides W'.
    """
    height, width = conv.kernel_size
    down, across = conv.stride
    # Without an initialisation, which would draw random numbers.
    wide: nn.Conv2d = skip_init(
        nn.Conv2d,
        conv.in_channels,
        columns * conv.out_channels,
        (height, width + (columns - 1) * across),
        (down, columns * across),
        _padding(conv) or 0,
        bias=conv.bias is not None,
        dtype=conv.weight.dtype,
    ).requires_grad_(False)
    wide.weight.zero_()
    parts = wide.weight.view(columns, conv.out_channels, conv.in_channels, height, -1)
    for column, part in enumerate(parts):
        part[..., column * across : column * across + width] = conv.weight.detach()
    if conv.bias is not None and wide.bias is not None:
        wide.bias.copy_(conv.bias.detach().repeat(columns))
    return wide.eval()


def _padding(conv: nn.Conv2d) -> tuple[int, int] | None:
    """Rows and columns of padding on either side; None where the sides differ."""
    if conv.padding == "valid":
        return 0, 0
    if conv.padding == "same":
        height, width = conv.kernel_size
        return (height // 2, width // 2) if height % 2 and width % 2 else None
    assert not isinstance(conv.padding, str)
    rows, across = conv.padding
    return rows, across
