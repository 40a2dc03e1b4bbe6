"""Attention, products by index, slices and the like written in the functions that the tables of operations know."""

from __future__ import annotations

import math
import operator
import string
from typing import Any, Final

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from calib.tracing.rewrite import Rewriter, Writer, layer_path
from calib.tracing.rewrite_layers import linear


def _to(rewriter: Rewriter, node: fx.Node) -> Any:
    source, made = node.args[0], node.meta.get("val")
    assert isinstance(source, fx.Node)
    before = source.meta.get("val")
    if not isinstance(made, Tensor) or not isinstance(before, Tensor):
        return None
    if made.dtype == before.dtype:
        return rewriter.env[source]
    if made.dtype in (torch.float16, torch.bfloat16) or before.dtype in (torch.float16, torch.bfloat16):
        # Of autocast or of a half-precision island: here all is float32.
        return rewriter.env[source]
    return rewriter.graph.call_method("to", (rewriter.env[source], made.dtype))


def _baddbmm(rewriter: Rewriter, node: fx.Node) -> Any:
    given = rewriter.named(node)
    product = rewriter.graph.call_function(torch.matmul, (rewriter.env[given["batch1"]], rewriter.env[given["batch2"]]))
    if given["alpha"] != 1:
        product = rewriter.graph.call_function(torch.mul, (product, given["alpha"]))
    if given["beta"] == 0:
        return product
    bias = rewriter.env[given["self"]]
    if given["beta"] != 1:
        bias = rewriter.graph.call_function(torch.mul, (bias, given["beta"]))
    return rewriter.graph.call_function(torch.add, (product, bias))


def _scaled_dot_product_attention(rewriter: Rewriter, node: fx.Node) -> Any:
    """softmax(q k^T * scale + mask) v, as PyTorch documents the function."""
    given = rewriter.named(node)
    if given["enable_gqa"]:
        return None
    query, key, value = (rewriter.env[given[part]] for part in ("query", "key", "value"))
    example = given["query"].meta.get("val")
    scale = given["scale"] if given["scale"] is not None else 1 / math.sqrt(int(example.shape[-1]))
    graph = rewriter.graph
    turned = graph.call_method("transpose", (key, -2, -1))
    scores = graph.call_function(torch.matmul, (query, turned))
    scores = graph.call_function(torch.mul, (scores, float(scale)))
    if given["is_causal"]:
        shape = [int(given[part].meta["val"].shape[-2]) for part in ("query", "key")]
        later = rewriter.constant("later", torch.ones(shape, dtype=torch.bool).triu(1))
        scores = graph.call_function(torch.masked_fill, (scores, later, float("-inf")))
    mask = given["attn_mask"]
    if mask is not None:
        shown = mask.meta.get("val")
        if isinstance(shown, Tensor) and shown.dtype == torch.bool:
            denied = graph.call_function(torch.logical_not, (rewriter.env[mask],))
            scores = graph.call_function(torch.masked_fill, (scores, denied, float("-inf")))
        else:
            scores = graph.call_function(torch.add, (scores, rewriter.env[mask]))
    weights = graph.call_function(torch.softmax, (scores, -1))
    path = layer_path(node)
    result = graph.call_function(torch.matmul, (weights, value))
    for part, made in (("scores", turned.next), ("attention", weights), ("mixed", result)):
        if path:
            made.meta["name"] = f"{path}.{part}"
    return result


def _einsum(rewriter: Rewriter, node: fx.Node) -> Any:
    """A product of two operands over one index as a matrix product; others stay as they are.

    Where the second is a matrix of weights, it is a linear layer.
    """
    operands: Any = node.args[1]
    equation = _spelt_out(str(node.args[0]).replace(" ", ""), operands)
    if equation is None or len(operands) != 2:
        return None
    inputs, _, output = equation.partition("->")
    left, _, right = inputs.partition(",")
    if len(set(left)) < len(left) or len(set(right)) < len(right):
        return None  # of a diagonal
    shared = [index for index in left if index in right]
    summed = [index for index in shared if index not in output]
    batch = [index for index in shared if index in output]
    rows, columns = [i for i in left if i not in right], [i for i in right if i not in left]
    whole = all(index in output for index in (*rows, *columns))
    weight = rewriter.value(operands[1])
    if weight is not None and whole and len(summed) == len(columns) == len(right) - 1 == 1:
        first = _permuted(rewriter, rewriter.env[operands[0]], left, [*rows, *summed])
        matrix = weight if right[0] == columns[0] else weight.t().contiguous()
        product = linear(rewriter, node, first, operands[1], matrix)
        return _permuted(rewriter, product, "".join([*rows, *columns]), list(output))
    if not whole or not len(summed) == len(rows) == len(columns) == 1:
        return None
    first, second = (rewriter.env[item] for item in operands)
    first = _permuted(rewriter, first, left, [*batch, *rows, *summed])
    second = _permuted(rewriter, second, right, [*batch, *summed, *columns])
    product = rewriter.graph.call_function(torch.matmul, (first, second))
    return _permuted(rewriter, product, "".join([*batch, *rows, *columns]), list(output))


def _spelt_out(equation: str, operands: Any) -> str | None:
    """An equation with letters for ``...``; None where its output is left to be guessed, or its sizes are not known."""
    if "->" not in equation:
        return None
    inputs, _, output = equation.partition("->")
    letters = iter(letter for letter in string.ascii_letters if letter not in equation)
    sides, hidden = inputs.split(","), ""
    for number, (side, operand) in enumerate(zip(sides, operands, strict=True)):
        if "..." not in side:
            continue
        value = operand.meta.get("val")
        if hidden or not isinstance(value, Tensor):
            return None  # of two operands, they would be broadcast
        hidden = "".join(next(letters) for _ in range(value.dim() - len(side) + 3))
        sides[number] = side.replace("...", hidden)
    return f"{','.join(sides)}->{output.replace('...', hidden)}"


def _permuted(rewriter: Rewriter, value: fx.Node, now: str, wanted: list[str]) -> fx.Node:
    order = [now.index(index) for index in wanted]
    return value if order == sorted(order) else rewriter.graph.call_function(torch.permute, (value, order))


def _hardtanh(rewriter: Rewriter, node: fx.Node) -> Any:
    given = rewriter.named(node)
    if (given["min_val"], given["max_val"]) != (0, 6):
        return None
    return rewriter.graph.call_function(F.relu6, (rewriter.env[given["self"]],))


def _clamp(rewriter: Rewriter, node: fx.Node) -> Any:
    given = rewriter.named(node)
    if (given["min"], given["max"]) != (0, 6):
        return None
    return rewriter.graph.call_function(F.relu6, (rewriter.env[given["self"]],))


def _expand(rewriter: Rewriter, node: fx.Node) -> Any:
    given = rewriter.named(node)
    return rewriter.graph.call_method("expand", (rewriter.env[given["self"]], *_sizes(rewriter, given["size"])))


def _repeat(rewriter: Rewriter, node: fx.Node) -> Any:
    given = rewriter.named(node)
    return rewriter.graph.call_method("repeat", (rewriter.env[given["self"]], *_sizes(rewriter, given["repeats"])))


def _sizes(rewriter: Rewriter, sizes: list[Any]) -> list[Any]:
    return [rewriter.env[item] if isinstance(item, fx.Node) else item for item in sizes]


def _index(rewriter: Rewriter, node: fx.Node) -> Any:
    source, indices = node.args[:2]
    assert isinstance(source, fx.Node)
    parts = [rewriter.env[item] if isinstance(item, fx.Node) else slice(None) for item in indices]  # type: ignore[union-attr]
    return rewriter.graph.call_function(operator.getitem, (rewriter.env[source], tuple(parts)))


def _slice(rewriter: Rewriter, node: fx.Node) -> Any:
    given = rewriter.named(node)
    dim, start, end, step = given["dim"], given["start"], given["end"], given["step"]
    if dim < 0 or step != 1:
        return None
    if start in (None, 0) and isinstance(end, int) and end > 2**62:
        return rewriter.env[given["self"]]
    end = None if isinstance(end, int) and end > 2**62 else end
    start, end = _sizes(rewriter, [start, end])
    parts = (*[slice(None)] * dim, slice(start, end))
    return rewriter.graph.call_function(operator.getitem, (rewriter.env[given["self"]], parts))


def _transposed(rewriter: Rewriter, node: fx.Node) -> Any:
    return rewriter.graph.call_function(torch.transpose, (rewriter.env[node.args[0]], -2, -1))  # type: ignore[index]


def _slice_scatter(rewriter: Rewriter, node: fx.Node) -> Any:
    """What a slice is written into, put together from what is before it, the slice, and what is behind it."""
    given = rewriter.named(node)
    whole, part, dim, start, end = (given[name] for name in ("self", "src", "dim", "start", "end"))
    if given["step"] != 1 or not isinstance(whole, fx.Node) or not isinstance(part, fx.Node):
        return None
    size = whole.meta["val"].shape[dim]
    start, end = (bound if bound is None or bound >= 0 else bound + size for bound in (start, end))
    start, end = min(start or 0, size), size if end is None else min(end, size)
    graph, written = rewriter.graph, rewriter.env[part]
    pieces = [
        graph.call_function(torch.narrow, (rewriter.env[whole], dim, begin, stop - begin)) if begin < stop else None
        for begin, stop in ((0, start), (end, size))
    ]
    kept = [piece for piece in (pieces[0], written, pieces[1]) if piece is not None]
    return graph.call_function(torch.cat, (kept, dim)) if len(kept) > 1 else written


def _copy(rewriter: Rewriter, node: fx.Node) -> Any:
    """What is copied over a value of the same shape and type."""
    shapes = [(item.meta["val"].shape, item.meta["val"].dtype) for item in node.args[:2] if isinstance(item, fx.Node)]
    same = len(shapes) == 2 and shapes[0] == shapes[1]
    return rewriter.env[node.args[1]] if same else None  # type: ignore[index]


WRITERS: Final[dict[str, Writer]] = {
    "to": _to,
    "_to_copy": _to,
    "baddbmm": _baddbmm,
    "scaled_dot_product_attention": _scaled_dot_product_attention,
    "einsum": _einsum,
    "hardtanh": _hardtanh,
    "clamp": _clamp,
    "expand": _expand,
    "repeat": _repeat,
    "index": _index,
    "slice": _slice,
    "slice_scatter": _slice_scatter,
    "copy": _copy,
    "mT": _transposed,
}
"""ATen's name -> what writes the operation in PyTorch's functions."""
