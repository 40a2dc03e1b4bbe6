"""Folding: what does nothing goes, what depends on no image is computed once, batch normalisation joins its layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.utils import _pair
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from calib.ops import kind_of
from calib.tracing.aten import SAME
from calib.tracing.inplace import writes
from common.errors import InputError

_POOLING = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
"""The arguments of ``F.avg_pool2d`` behind its input, in order."""


def attribute(module: nn.Module, path: str) -> Any:
    """What lies at a dotted path, as in ``get_attr`` nodes."""
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part)
    return found


def fold_constants(module: fx.GraphModule) -> None:
    """Compute every operation whose inputs are all parameters, buffers or such results, and store what others read.

    They run in order on the real tensors, so that what changes a constant in place counts as well. What is random
    stays, and an operation without any input only counts where it is a function (``torch.arange(8)``).

    Raises:
        NotImplementedError: an operation changes a parameter.
    """
    values: dict[fx.Node, Any] = {}
    graph = module.graph
    for node in list(graph.nodes):
        if node.op == "get_attr":
            values[node] = attribute(module, str(node.target))
        elif _is_constant(node, values):
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            if writes(node) and isinstance(args[0], nn.Parameter):
                raise NotImplementedError(f"{node.target} changes a parameter in the forward")
            with torch.no_grad():
                if node.op == "call_module":
                    values[node] = module.get_submodule(str(node.target))(*args, **kwargs)
                elif node.op == "call_method":
                    values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
                else:
                    values[node] = node.target(*args, **kwargs)
    number = 0
    for node, value in values.items():
        if node.op == "get_attr" or all(reader in values for reader in node.users):
            continue
        if not isinstance(value, Tensor):
            for reader in [reader for reader in node.users if reader not in values]:
                given = {item: item for item in reader.all_input_nodes} | {node: value}
                reader.args, reader.kwargs = fx.map_arg((reader.args, reader.kwargs), given.__getitem__)
            continue
        while hasattr(module, f"constant_{number}"):
            number += 1
        module.register_buffer(f"constant_{number}", value.detach().clone())
        with graph.inserting_before(node):
            constant = graph.get_attr(f"constant_{number}")
        constant.meta["val"] = value
        for reader in [reader for reader in node.users if reader not in values]:
            reader.replace_input_with(node, constant)
    for node in reversed(list(graph.nodes)):
        if node in values and not node.users:
            graph.erase_node(node)


def _is_constant(node: fx.Node, values: dict[fx.Node, Any]) -> bool:
    if node.op not in ("call_function", "call_method", "call_module"):
        return False
    if not node.all_input_nodes and node.op != "call_function":
        return False
    # Dropout is called random, and does nothing here.
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and node.target not in SAME
    return not random and all(item in values for item in node.all_input_nodes)


def ask_for_shapes(module: fx.GraphModule) -> None:
    """Write ``reshape_as`` and ``view_as`` as reshapes, which read a value's shape and not the value."""
    for node in list(module.graph.nodes):
        if node.op == "call_method" and node.target in ("reshape_as", "view_as"):
            value, other = node.all_input_nodes
            with module.graph.inserting_before(node):
                shape = module.graph.call_function(getattr, (other, "shape"))
            node.target, node.args, node.kwargs = "reshape", (value, shape), {}


def remove_nothing(module: fx.GraphModule) -> None:
    """Remove dropout and identities: in eval mode they do nothing."""
    for node in list(module.graph.nodes):
        if kind_of(node, module) == "nothing":
            node.replace_all_uses_with(node.all_input_nodes[0])
            module.graph.erase_node(node)


def take_out_divisors(module: fx.GraphModule) -> None:
    """Average pooling with ``divisor_override`` becomes the plain one and a factor: ONNX has no such divisor.

    Raises:
        InputError: some of its windows may reach beyond the padding, where the factor would be another one.
    """
    for node in list(module.graph.nodes):
        if kind_of(node, module) != "avgpool":
            continue
        if node.op == "call_module":
            pool = module.get_submodule(str(node.target))
            options = {name: getattr(pool, name, None) for name in _POOLING}
        else:
            options = {**dict(zip(_POOLING, node.args[1:], strict=False)), **node.kwargs}
        divisor = options.pop("divisor_override", None)
        if divisor is None:
            continue
        if options.get("ceil_mode"):
            raise InputError("average pooling with divisor_override and ceil_mode is not supported: pad before it")
        height, width = _pair(options["kernel_size"])
        with module.graph.inserting_before(node):
            plain = module.graph.call_function(
                F.avg_pool2d, (node.all_input_nodes[0],), {**options, "count_include_pad": True}
            )
            scaled = module.graph.call_function(torch.mul, (plain, height * width / divisor))
        node.replace_all_uses_with(scaled)
        module.graph.erase_node(node)


def fold_batchnorm(module: fx.GraphModule, shapes: Mapping[str, torch.Size]) -> None:
    """Fold each batch normalisation into the convolution or linear layer before it, as TensorRT does.

    Args:
        module: Changed in place.
        shapes: fx node -> shape of its value, as far as known. Of a value of three dimensions, batch normalisation
            takes the second, which is not what a linear layer computes: that stays; and it may be such a value with
            its first dimensions flattened, as in LeViT.
    """
    uses: dict[str, int] = {}
    for node in module.graph.nodes:
        if node.op == "call_module":
            uses[str(node.target)] = uses.get(str(node.target), 0) + 1
    for node in list(module.graph.nodes):
        if kind_of(node, module) != "batchnorm":
            continue
        value = node.args[0]
        before = _before_flattening(value, module, shapes)
        if before is None:
            continue
        kind = kind_of(before, module)
        if kind not in ("conv", "linear") or uses[str(before.target)] != 1:
            continue
        layer, norm = module.get_submodule(str(before.target)), module.get_submodule(str(node.target))
        if not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d) or norm.running_mean is None:
            continue
        _fill_in(norm)
        fused: nn.Module
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) and before is value:
            fused = fuse_conv_bn_eval(layer, norm, transpose=isinstance(layer, nn.ConvTranspose2d))
        elif isinstance(layer, nn.Linear) and _normalises(shapes.get(value.name), layer, norm):
            fused = fuse_linear_bn_eval(layer, norm)
        else:
            continue
        module.set_submodule(str(before.target), fused.requires_grad_(False))
        node.replace_all_uses_with(value)
        module.graph.erase_node(node)


def _normalises(shape: torch.Size | None, layer: nn.Linear, norm: nn.Module) -> bool:
    """Whether batch normalisation of a value of this shape, where known, is of a linear layer's results."""
    return layer.out_features == norm.num_features and (shape is None or len(shape) == 2)


def _before_flattening(value: Any, module: fx.GraphModule, shapes: Mapping[str, torch.Size]) -> fx.Node | None:
    """What a value is, or was before dimensions in front of its last were flattened; None where others read it, too."""
    while isinstance(value, fx.Node):
        if sum(kind_of(reader, module) != "shape" for reader in value.users) != 1:
            return None
        name = getattr(value.target, "__name__", value.target)
        if value.op == "call_module" or name not in ("flatten", "reshape", "view"):
            return value
        source = value.all_input_nodes[0]
        if value.name not in shapes or shapes[value.name][-1:] != shapes[source.name][-1:]:
            return None
        value = source
    return None


def _fill_in(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
    """Give batch normalisation without weights (``affine=False``) such that do nothing: PyTorch's fusion needs some."""
    mean = norm.running_mean
    assert mean is not None
    for name, value in (("weight", torch.ones_like(mean)), ("bias", torch.zeros_like(mean))):
        if getattr(norm, name) is None:
            setattr(norm, name, nn.Parameter(value, requires_grad=False))
