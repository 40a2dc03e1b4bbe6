"""Operations in place become pure ones, and later readers of what they overwrote read their result."""

from __future__ import annotations

import inspect
import operator

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from calib.tracing.aten import SAME
from common.errors import InputError


def writes(node: fx.Node) -> bool:
    """Whether a function or method changes its first argument, by PyTorch's way of naming."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "_opname", "")
    return node.op != "call_module" and str(name).endswith("_") and not str(name).endswith("__")


def purify(module: fx.GraphModule) -> set[str]:
    """Replace in-place modules, methods and functions by pure ones; return the fx names of those that overwrote.

    Raises:
        InputError: there is no pure one.
    """
    in_place: set[str] = set()
    for node in list(module.graph.nodes):
        if not _purified(node, module):
            continue
        in_place.add(node.name)
        _show_to_later_readers(node)
    for submodule in module.modules():
        if getattr(submodule, "inplace", False):
            submodule.inplace = False  # type: ignore[assignment]
    return in_place


def _purified(node: fx.Node, module: fx.GraphModule) -> bool:
    """Make an operation pure; whether it overwrote its first argument until now."""
    if node.op == "call_module":
        return bool(getattr(module.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method":
        name = str(node.target)
        if not name.endswith("_") or name.endswith("__"):
            return False
        if not callable(getattr(Tensor, name[:-1], None)):
            raise InputError(f"the operation {name}, which works in place, is not supported")
        node.target = name[:-1]
        return True
    if node.op != "call_function" or not callable(node.target):
        return False
    if node.target is operator.iadd:
        node.target = operator.add
        return True
    name = getattr(node.target, "__name__", "")
    for library in (torch, F):
        pure = getattr(library, name[:-1], None)
        if name.endswith("_") and getattr(library, name, None) is node.target and callable(pure):
            node.target = pure
            return True
    overwrites = _inplace_argument(node)
    if "inplace" in node.kwargs:
        node.kwargs = {**node.kwargs, "inplace": False}
    return overwrites


def _inplace_argument(node: fx.Node) -> bool:
    """The argument ``inplace`` of a function; given by position, it becomes a keyword."""
    try:
        parameters = list(inspect.signature(node.target).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    if "inplace" in parameters and len(node.args) > parameters.index("inplace"):
        position = parameters.index("inplace")
        node.kwargs = {**node.kwargs, **dict(zip(parameters[position:], node.args[position:], strict=False))}
        node.args = node.args[:position]
    return bool(node.kwargs.get("inplace", False))


def purify_aten(graph: fx.Graph) -> None:
    """Replace each ATen operation in place by its pure one.

    Raises:
        NotImplementedError: there is no pure one.
    """
    for node in list(graph.nodes):
        if not writes(node) or node.target in SAME:
            continue
        name, overload = node.target._opname[:-1], node.target._overloadname
        packet = getattr(torch.ops.aten, name, None)
        if name == "copy":
            raise NotImplementedError("copy_, which works in place, through a view")
        if packet is None or overload not in packet.overloads():
            raise NotImplementedError(f"the operation {node.target}, which works in place, is not supported")
        node.target = getattr(packet, overload)
        _show_to_later_readers(node)


def _show_to_later_readers(node: fx.Node) -> None:
    """Let whoever reads later what ``node`` overwrote, its first argument, read its result."""
    written, seen = node.args[0], False
    for other in node.graph.nodes:
        if other is node:
            seen = True
        elif seen and isinstance(written, fx.Node):
            other.replace_input_with(written, node)
