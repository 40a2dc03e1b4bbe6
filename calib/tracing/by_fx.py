"""Tracing by ``torch.fx``, which keeps the model's layers as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from torch import fx, nn
from torch.utils import _pytree

from calib.ops import MODULES
from calib.tracing.check import RefusedError, where
from calib.tracing.fold import fold_constants
from common.errors import InputError, first_line

_NO_PRODUCTS: Final = (nn.LayerNorm, nn.GroupNorm, nn.Embedding, nn.PReLU, nn.modules.batchnorm._BatchNorm)
_PRODUCTS: Final = frozenset(
    {
        *("conv1d", "conv2d", "linear", "matmul", "bmm", "mm", "addmm", "baddbmm", "einsum", "bilinear"),
        *("scaled_dot_product_attention", "multi_head_attention_forward", "batch_norm", "conv2d_same"),
    }
)


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
        raise InputError(f"network {name} cannot be traced: {first_line(error)}{where(error)}") from error
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
    output.args = (results[0] if len(results) == 1 else results,)


def _is_optional(node: fx.Node) -> bool:
    """Whether an input has a default, or takes what is left over (``*args``, ``**kwargs``)."""
    return bool(node.args) or str(node.target).startswith("*")


def hidden_products(module: fx.GraphModule, kinds: Mapping[str, str]) -> list[str]:
    """What stays in float and holds convolutions or matrix products that ``torch.export`` may bring to light."""
    found = []
    for node in module.graph.nodes:
        if kinds.get(node.name) not in ("other", "batchnorm"):
            continue
        if node.op == "call_module":
            part = module.get_submodule(str(node.target))
            large = any(parameter.dim() > 1 for parameter in part.parameters())
            derived = isinstance(part, nn.modules.batchnorm._BatchNorm) and kinds[node.name] == "other"
            if derived or (large and type(part) not in _NO_PRODUCTS):
                found.append(f"{node.target} ({type(part).__name__})")
        elif (getattr(node.target, "__name__", None) or str(node.target)) in _PRODUCTS:
            found.append(getattr(node.target, "__name__", None) or str(node.target))
    return list(dict.fromkeys(found))
