"""Tracing by ``torch.export``, for what ``torch.fx`` cannot follow: the same kind of graph, in layers and functions.

``torch.export`` runs the model on example images and writes down every ATen operation, also those inside attention,
inside layers of a user's own and under ``**kwargs``. Here its graph is written anew in the terms that the rest of the
package reads: ``nn.Conv2d``, ``nn.Linear`` and ``nn.BatchNorm2d`` under the names that the model gives them, PyTorch's
functions for the rest. What depends on no image (weights computed from weights, position tables, masks) is computed
once and becomes a constant. Attention becomes the two matrix products and the softmax that it is.
"""

from __future__ import annotations

import contextlib
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

BATCH: Final = 3
"""Images of the example: a number that a network is unlikely to compute with, so that a baked-in batch size shows."""

_aten = torch.ops.aten

_NOTES: Final = ("_assert", "sym_constrain_range", "_guards_fn", "assert_tensor_metadata")
_FILLED: Final = {
    _aten.new_zeros.default: _aten.zeros.default,
    _aten.new_ones.default: _aten.ones.default,
    _aten.new_empty.default: _aten.zeros.default,
    _aten.new_full.default: _aten.full.default,
}
"""What asks its input for the device and the type alone."""
_SIZED: Final = frozenset({"view", "reshape", "expand", "_unsafe_view", "repeat"})
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
    graph_module = model if is_exported(model) else _exported(model, shape, functional)
    assert isinstance(graph_module, fx.GraphModule)
    _inline_regions(graph_module)
    _forget_notes(graph_module.graph)
    _free_batch(graph_module.graph, model)
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
    parameter = next(model.parameters(), torch.empty(0))
    images = torch.rand(BATCH, *shape, generator=torch.Generator().manual_seed(1)).to(parameter.device)
    with silenced(logging.CRITICAL), torch.no_grad():
        try:
            program = torch.export.export(
                model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False
            )
        except Exception:  # noqa: BLE001 - open-ended; some networks ask for the batch size as a number
            program = torch.export.export(model, (images,), strict=False)
        if functional:
            program = program.run_decompositions({})
        module = program.module()
    assert isinstance(module, fx.GraphModule)
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


def _free_batch(graph: fx.Graph, model: nn.Module) -> None:
    """Ask the images for their number where the example's was written down as the first size of a reshape."""
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
