"""Tracing by ``torch.export``, for what ``torch.fx`` cannot follow: the same kind of graph, in layers and functions.

``torch.export`` runs the model on example images and writes down every ATen operation, also those inside attention,
inside layers of a user's own and under ``**kwargs``. Here its graph is written anew in the terms that the rest of the
package reads: ``nn.Conv2d``, ``nn.Linear`` and ``nn.BatchNorm2d`` under the names that the model gives them, PyTorch's
functions for the rest. What depends on no image (weights computed from weights, position tables, masks) is computed
once and becomes a constant. Attention becomes the two matrix products and the softmax that it is.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import operator
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch.amp.autocast_mode import autocast

from calib.tracing import rewrite_functions, rewrite_layers
from calib.tracing.fold import attribute, fold_constants
from calib.tracing.inplace import purify_aten
from calib.tracing.rewrite import Rewriter
from common.console import silenced

_BATCHES: Final = (3, 5)
"""Images of the two examples: what differs between their graphs is the number of images."""

_aten = torch.ops.aten

_NOTES: Final = ("_assert", "sym_constrain_range", "_guards_fn", "assert_tensor_metadata")
_FILLED: Final = {
    _aten.new_zeros.default: _aten.zeros.default,
    _aten.new_ones.default: _aten.ones.default,
    _aten.new_empty.default: _aten.zeros.default,
    _aten.new_full.default: _aten.full.default,
}
"""What asks its input for the device and the type alone."""
_RESHAPES: Final = frozenset({"view", "reshape", "_unsafe_view"})
_SIZED: Final = _RESHAPES | {"expand", "repeat"}
"""Operations whose second argument lists sizes, that of the batch first."""


@contextlib.contextmanager
def plain_execution() -> Iterator[None]:
    """Run attention layer by layer instead of in one fused operator, and what asks for autocast in float32."""
    fast = torch.backends.mha.get_fastpath_enabled()
    enter, leave = autocast.__enter__, autocast.__exit__
    autocast.__enter__ = lambda self: self  # type: ignore[method-assign]
    autocast.__exit__ = lambda self, *_: None  # type: ignore[method-assign]
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        autocast.__enter__, autocast.__exit__ = enter, leave  # type: ignore[method-assign]


def export_graph(model: nn.Module, shape: tuple[int, ...], functional: bool = False) -> fx.GraphModule:
    """Trace ``model`` by ``torch.export``.

    Args:
        model: In eval mode; its weights are shared with the result. A module that ``torch.export`` made is taken as
            it is.
        shape: (C, H, W) of one image.
        functional: Whether PyTorch removes what works in place, which takes long, but follows a change through views.

    Returns:
        One input, one output (a tensor, or a tuple of tensors: those of the model's result, in its order), no
        operation in place. ``node.meta["name"]`` is the path of the layer that made a value, where one did.

    Raises:
        Exception: what ``torch.export`` raises is open-ended.
    """
    if is_exported(model):
        assert isinstance(model, fx.GraphModule)
        graph_module = _plain(model)
        _free_first_size(graph_module.graph)
    else:
        graph_module = _exported(model, shape, functional)
    _without_likes(graph_module.graph)
    fold_constants(graph_module)
    purify_aten(graph_module.graph)
    return Rewriter(graph_module, rewrite_layers.WRITERS | rewrite_functions.WRITERS).result


def is_exported(model: nn.Module) -> bool:
    """Whether a module is a graph of ATen operations, as ``torch.export.export(...).module()`` is."""
    return isinstance(model, fx.GraphModule) and any(
        node.op == "call_function" and isinstance(node.target, OpOverload) for node in model.graph.nodes
    )


def _exported(model: nn.Module, shape: tuple[int, ...], functional: bool) -> fx.GraphModule:
    """The model's ATen graph for any number of images.

    ``torch.export`` can leave that number open, but takes up to ten times as long, since it then computes with symbols
    (swin_t: 56 s instead of 6 s). So it runs with two numbers, and what differs in the graphs is theirs.
    """
    # Each on a model that has not run: some keep in an attribute what they computed first.
    models = model, copy.deepcopy(model)
    first, second = (
        _plain(_with_batch(one, shape, functional, count)) for one, count in zip(models, _BATCHES, strict=True)
    )
    _free_batch(first, second)
    return first


def _with_batch(model: nn.Module, shape: tuple[int, ...], functional: bool, count: int) -> fx.GraphModule:
    parameter = next(model.parameters(), torch.empty(0))
    images = torch.rand(count, *shape, generator=torch.Generator().manual_seed(1)).to(parameter.device)
    with silenced(logging.CRITICAL), torch.no_grad():
        program = torch.export.export(model, (images,), strict=False)
        if functional:
            program = program.run_decompositions({})
        module = program.module()
    assert isinstance(module, fx.GraphModule)
    return module


def _plain(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph without regions and checks."""
    _inline_regions(module)
    _forget_notes(module.graph)
    return module


def _inline_regions(module: fx.GraphModule) -> None:
    """Put what runs without gradients or under autocast, a graph of its own, into the graph around it."""
    for node in list(module.graph.nodes):
        if not isinstance(node.target, HigherOrderOperator):
            continue
        position = next((i for i, item in enumerate(node.args) if _is_region(item, module)), None)
        if position is None:
            raise NotImplementedError(f"{node.target} holds control flow on values")
        region = node.args[position]
        inner = module.get_submodule(str(region.target))
        assert isinstance(inner, fx.GraphModule)
        _inline_regions(inner)
        inputs = iter(node.args[position + 1 :])
        copied: dict[fx.Node, Any] = {}
        outputs: Any = None
        with module.graph.inserting_before(node):
            for part in inner.graph.nodes:
                if part.op == "placeholder":
                    copied[part] = next(inputs)
                elif part.op == "output":
                    outputs = fx.map_arg(part.args[0], copied.__getitem__)
                else:
                    if part.op == "get_attr":
                        name = f"{region.target}_{part.target}".replace(".", "_")
                        setattr(module, name, attribute(inner, str(part.target)))
                        copied[part] = module.graph.get_attr(name)
                        continue
                    copied[part] = module.graph.node_copy(part, copied.__getitem__)
        for reader in list(node.users):
            if reader.target is not operator.getitem:
                raise NotImplementedError(f"{node.target} gives several values at once")
            reader.replace_all_uses_with(outputs[reader.args[1]])
            module.graph.erase_node(reader)
        module.graph.erase_node(node)


def _is_region(item: Any, module: fx.GraphModule) -> bool:
    return (
        isinstance(item, fx.Node)
        and item.op == "get_attr"
        and isinstance(attribute(module, str(item.target)), fx.GraphModule)
    )


def _forget_notes(graph: fx.Graph) -> None:
    """Remove what only checks, and so would keep sizes alive."""
    for node in reversed(list(graph.nodes)):
        if not node.users and any(note in str(node.target) for note in _NOTES):
            graph.erase_node(node)


def _free_batch(module: fx.GraphModule, other: fx.GraphModule) -> None:
    """Ask the images for their number wherever a graph has it as a constant.

    Args:
        module: For the first number of ``_BATCHES``; changed.
        other: The same model's for the second.

    Raises:
        NotImplementedError: the graphs differ in more than multiples of the number of images.
    """
    graph = module.graph
    images = next(node for node in graph.nodes if node.op == "placeholder")
    with graph.inserting_after(images):
        batch = graph.call_function(_aten.sym_size.int, (images, 0))
    pairs = list(zip((node for node in graph.nodes if node is not batch), other.graph.nodes, strict=False))
    if len(graph.nodes) - 1 != len(other.graph.nodes) or any(a.target != b.target for a, b in pairs):
        raise NotImplementedError("the network does other things for another number of images")
    for node, same in pairs:
        if node.op == "get_attr":
            values = attribute(module, str(node.target)), attribute(other, str(same.target))
            if all(isinstance(value, Tensor) for value in values) and values[0].shape != values[1].shape:
                raise NotImplementedError(f"the constant {node.target} depends on the number of images")
        elif node.op == "call_function":
            sizes = _sizes(node, same) if str(getattr(node.target, "_opname", "")) in _RESHAPES else []
            if sizes.count(-1) == 1:
                node.update_arg(1, sizes)
                continue
            with graph.inserting_before(node):
                node.args = tuple(_freed(a, b, batch) for a, b in zip(node.args, same.args, strict=True))


def _sizes(node: fx.Node, same: fx.Node) -> list[int]:
    """The shape that an operation gives, with -1 for what differs: where that is one size, a constant, in ONNX too."""
    values = node.meta.get("val"), same.meta.get("val")
    if not all(isinstance(value, Tensor) for value in values):
        return []
    return [a if a == b else -1 for a, b in zip(*(value.shape for value in values), strict=True)]  # type: ignore[union-attr]


def _freed(value: Any, other: Any, batch: fx.Node) -> Any:
    """An argument with every number that is a multiple of the number of images computed from ``batch``."""
    if isinstance(value, list | tuple):
        return type(value)(_freed(a, b, batch) for a, b in zip(value, other, strict=True))
    if isinstance(value, fx.Node) or value == other:
        return value
    factor, rest = divmod(value, _BATCHES[0])
    if not isinstance(value, int) or rest or other != factor * _BATCHES[1]:
        raise NotImplementedError(f"the number {value} becomes {other} for another number of images")
    return batch if factor == 1 else batch.graph.call_function(operator.mul, (batch, factor))


def _free_first_size(graph: fx.Graph) -> None:
    """Ask the images for their number where that of the export was written down as the first size of a reshape."""
    images = next(node for node in graph.nodes if node.op == "placeholder")
    value = images.meta.get("val")
    if not isinstance(value, Tensor) or not isinstance(value.shape[0], int):
        return
    baked = value.shape[0]
    with graph.inserting_after(images):
        batch = graph.call_function(_aten.sym_size.int, (images, 0))
    for node in graph.nodes:
        name = str(getattr(node.target, "_opname", ""))
        if name in _SIZED and node.args[1] and node.args[1][0] == baked:
            node.update_arg(1, [batch, *node.args[1][1:]])


def _without_likes(graph: fx.Graph) -> None:
    """Let what asks an image for its type and device alone (``new_zeros``) ask for nothing."""
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in _FILLED:
            continue
        kept = {key: item for key, item in node.kwargs.items() if key in ("dtype", "device")}
        source = node.args[0].meta.get("val") if isinstance(node.args[0], fx.Node) else None
        kept.setdefault("dtype", getattr(source, "dtype", torch.float32))
        node.target, node.args, node.kwargs = _FILLED[node.target], node.args[1:], kept
