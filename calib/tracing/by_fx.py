"""Tracing by ``torch.fx``, which keeps the model's layers as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from calib.ops import MODULES
from calib.tracing.check import RefusedError, told
from calib.tracing.fold import fold_constants
from common.errors import InputError

_MULTIPLY: Final = frozenset(
    {"mm", "bmm", "addmm", "baddbmm", "mv", "dot", "convolution", "_convolution", "_trilinear"}
)
"""ATen's convolutions and matrix products, into which PyTorch divides linear layers, attention and the like."""
_ALWAYS_FLOAT: Final = (nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""Layers that multiply, and that ``torch.export`` shows as what they are."""


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # What a user derives from a layer is one operation: those layers' own code does not trace.
        return isinstance(m, tuple(MODULES)) or super().is_leaf_module(m, module_qualified_name)


def fx_graph(model: nn.Module, name: str) -> fx.GraphModule:
    """Trace ``model`` by ``torch.fx``.

    Args:
        model: In eval mode; its layers and weights are shared with the result.
        name: The network's, for the error.

    Returns:
        One input, one output (a tensor, or a tuple of tensors: those of the model's result, in its order); what
        depends on no image is computed.

    Raises:
        InputError: ``torch.fx`` cannot follow the model.
        RefusedError: the model has another number of inputs.
    """
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # what user code raises under tracing is open-ended
        raise InputError(f"network {name} cannot be traced: {told(error, model)}") from error
    module = fx.GraphModule(model, graph, class_name=name)
    _check_ends(module, name)
    fold_constants(module)
    return module


def _check_ends(module: fx.GraphModule, name: str) -> None:
    """Leave one input, and one output: a tensor, or a tuple of tensors.

    Raises:
        InputError: there is another number of inputs, or an optional one is used.
    """
    inputs = [node for node in module.graph.nodes if node.op == "placeholder" and not _is_optional(node)]
    if len(inputs) != 1:
        raise RefusedError(
            f"network {name} takes {len(inputs)} inputs: only networks with one image input are supported"
        )
    for node in [node for node in module.graph.nodes if node.op == "placeholder" and _is_optional(node)]:
        if node.users:
            raise InputError(f"network {name}: optional input {node.target!r} is not supported; give it a fixed value")
        module.graph.erase_node(node)
    output = next(node for node in module.graph.nodes if node.op == "output")
    results = tuple(item for item in _pytree.tree_leaves(output.args) if isinstance(item, fx.Node))
    if not results:
        raise InputError(f"network {name} gives no tensor that depends on its input")
    if any(isinstance(item.target, type) for item in results):
        raise InputError(f"network {name} cannot be traced: it gives an object of a class of its own")
    output.args = (results[0] if len(results) == 1 else results,)


def _is_optional(node: fx.Node) -> bool:
    """Whether an input has a default, or takes what is left over (``*args``, ``**kwargs``)."""
    return bool(node.args) or str(node.target).startswith("*")


def hidden_products(module: fx.GraphModule, kinds: Mapping[str, str], image: Tensor) -> list[str]:
    """What stays in float and holds convolutions or matrix products that ``torch.export`` may bring to light.

    Args:
        module: Traced by :func:`fx_graph`.
        kinds: fx node name -> kind of operation.
        image: float32 [B, C, H, W]: the network is run on it.
    """
    running = _Hidden(module, kinds)
    with torch.no_grad():
        running.run(image)
    return list(dict.fromkeys(running.found))


class _Hidden(fx.Interpreter):
    """Notes the operations in float that multiply, and the layers derived from batch normalisation."""

    def __init__(self, module: fx.GraphModule, kinds: Mapping[str, str]) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self.found: list[str] = []
        self._kinds = kinds

    def run_node(self, n: fx.Node) -> Any:
        if self._kinds.get(n.name) != "other":
            return super().run_node(n)
        part = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        if type(part) in _ALWAYS_FLOAT:
            return super().run_node(n)
        with _Products() as products:  # type: ignore[no-untyped-call]
            value = super().run_node(n)
        if products.found or isinstance(part, _BatchNorm):
            name = getattr(n.target, "__name__", None) or str(n.target)
            self.found.append(name if part is None else f"{name} ({type(part).__name__})")
        return value


class _Products(TorchDispatchMode):
    """Notes whether ATen convolves or multiplies matrices."""

    found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func._opname)
        self.found |= name in _MULTIPLY or name.startswith("_scaled_dot_product")
        return func(*args, **(kwargs or {}))
