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
import math
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch.amp.autocast_mode import autocast
from torch.nn import functional as F
from torch.utils import _pytree

from calib.constants import attribute, fold_constants, writes

BATCH: Final = 3
"""Images of the example: a number that a network is unlikely to compute with, so that a baked-in batch size shows."""

_aten = torch.ops.aten

_SAME: Final[frozenset[Any]] = frozenset(
    {
        _aten.alias.default,
        _aten.clone.default,
        _aten.contiguous.default,
        _aten.detach.default,
        _aten.detach_.default,
        _aten.lift_fresh.default,
        _aten.lift_fresh_copy.default,
        _aten.positive.default,
        _aten.dropout.default,
        _aten.dropout_.default,
        _aten.feature_dropout.default,
        _aten.feature_dropout_.default,
        _aten.alpha_dropout.default,
        _aten.alpha_dropout_.default,
        _aten.feature_alpha_dropout.default,
    }
)
"""Operations that give their input, in eval mode and in a graph whose every operation is pure."""
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
_FUNCTIONS: Final[Mapping[str, Callable[..., Any]]] = {
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
    _make_pure(graph_module.graph)
    return _Rewriter(graph_module).result


def is_exported(model: nn.Module) -> bool:
    """Whether a module is a graph of ATen operations, as ``torch.export.export(...).module()`` is."""
    return isinstance(model, fx.GraphModule) and any(
        node.op == "call_function" and isinstance(node.target, OpOverload) for node in model.graph.nodes
    )


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _exported(model: nn.Module, shape: tuple[int, ...], functional: bool) -> fx.GraphModule:
    parameter = next(model.parameters(), torch.empty(0))
    images = torch.rand(BATCH, *shape, generator=torch.Generator().manual_seed(1)).to(parameter.device)
    with _silent(), torch.no_grad():
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


def _make_pure(graph: fx.Graph) -> None:
    """Replace each operation in place by its pure one, whose result is what later readers see."""
    for node in list(graph.nodes):
        if not writes(node) or node.target in _SAME:
            continue
        name, overload = node.target._opname[:-1], node.target._overloadname
        packet = getattr(_aten, name, None)
        if name == "copy":
            raise NotImplementedError("copy_, which works in place, through a view")
        if packet is None or overload not in packet.overloads():
            raise NotImplementedError(f"the operation {node.target}, which works in place, is not supported")
        node.target = getattr(packet, overload)
        written, seen = node.args[0], False
        for other in graph.nodes:
            if other is node:
                seen = True
            elif seen:
                other.replace_input_with(written, node)


class _Written(dict[fx.Node, Any]):
    """Old node -> new one; a constant becomes one when it is asked for, so that weights of layers do not."""

    def __init__(self, constant: Callable[[fx.Node], fx.Node]) -> None:
        super().__init__()
        self._constant = constant

    def __missing__(self, node: fx.Node) -> Any:
        return self._constant(node)


class _Rewriter:
    """Writes a graph of ATen operations anew in layers and functions."""

    def __init__(self, module: fx.GraphModule) -> None:
        self._old = module
        self._root = nn.Module()
        self._graph = fx.Graph()
        self._env = _Written(self._constant)
        self._made: dict[str, tuple[Any, ...]] = {}
        for node in module.graph.nodes:
            if node.op != "get_attr" and node not in self._env:
                self._env[node] = self._written(node)
        self._graph.lint()
        self.result = fx.GraphModule(self._root, self._graph).eval().requires_grad_(False)

    def _written(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._graph.placeholder(str(node.target))
        if node.op == "output":
            results = [item for item in _pytree.tree_leaves(node.args) if isinstance(item, fx.Node)]
            results = [item for item in results if item.op != "get_attr"]
            new = tuple(self._env[item] for item in results)
            return self._graph.output(new[0] if len(new) == 1 else new)
        if node.op != "call_function":
            raise NotImplementedError(f"{node.op} {node.target}")
        result = self._operation(node)
        if isinstance(result, fx.Node) and "name" not in result.meta:
            path = _layer_path(node)
            if path and result.op == "call_function":
                result.meta["name"] = path
        return result

    def _constant(self, node: fx.Node) -> fx.Node:
        path = str(node.target)
        value = attribute(self._old, path)
        # Under a flat name: a path may lead through the names of layers.
        name = path.replace(".", "_")
        while hasattr(self._root, name) and getattr(self._root, name) is not value:
            name += "_"
        if not hasattr(self._root, name):
            if isinstance(value, nn.Parameter):
                self._root.register_parameter(name, value)
            else:
                self._root.register_buffer(name, value)
        return self._graph.get_attr(name)

    def _arguments(self, node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._env.__getitem__)
        return args, dict(kwargs)

    def _named(self, node: fx.Node) -> dict[str, Any]:
        """All arguments of an operation by name, defaults included; nodes are those of the old graph."""
        names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
        values = {a.name: a.default_value for a in node.target._schema.arguments if a.has_default_value()}  # type: ignore[union-attr]
        return values | dict(zip(names, node.args, strict=False)) | dict(node.kwargs)

    def _operation(self, node: fx.Node) -> Any:
        target: Any = node.target
        if not isinstance(target, OpOverload):
            args, kwargs = self._arguments(node)
            return self._graph.call_function(target, args, kwargs)
        if target in _SAME:
            return self._env[node.args[0]]  # type: ignore[index]
        name = target._opname
        special = getattr(self, f"_write_{name}", None)
        written = special(node) if special is not None else None
        return self._function(node, name) if written is None else written

    def _function(self, node: fx.Node, name: str) -> fx.Node:
        args, kwargs = self._arguments(node)
        if name == "sym_size":
            return self._graph.call_method("size", args)
        names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
        function = _FUNCTIONS.get(name)
        if function is None and self._is_of_torch(node, name):
            function = getattr(torch, name)
        if function is not None:
            return self._graph.call_function(function, args, kwargs)
        if names and names[0] == "self" and callable(getattr(Tensor, name, None)) and not kwargs:
            return self._graph.call_method(name, args)
        return self._graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]

    def _is_of_torch(self, node: fx.Node, name: str) -> bool:
        """Whether ``torch.name`` takes these arguments: only tried where the value's example is at hand."""
        return name in _OF_TORCH and not name.startswith("_")

    # What follows writes single operations; each returns None where the general way serves.

    def _write__to_copy(self, node: fx.Node) -> Any:
        return self._write_to(node)

    def _write_to(self, node: fx.Node) -> Any:
        source, made = node.args[0], node.meta.get("val")
        assert isinstance(source, fx.Node)
        before = source.meta.get("val")
        if not isinstance(made, Tensor) or not isinstance(before, Tensor):
            return None
        if made.dtype == before.dtype:
            return self._env[source]
        if made.dtype in (torch.float16, torch.bfloat16) or before.dtype in (torch.float16, torch.bfloat16):
            # Of autocast or of a half-precision island: here all is float32.
            return self._env[source]
        return self._graph.call_method("to", (self._env[source], made.dtype))

    def _write_conv2d(self, node: fx.Node) -> Any:
        given = self._named(node)
        weight, bias = self._value(given["weight"]), self._value(given["bias"])
        if weight is None or (given["bias"] is not None and bias is None):
            return None
        padding = given["padding"]
        layer = nn.Conv2d(
            weight.shape[1] * given["groups"],
            weight.shape[0],
            (weight.shape[2], weight.shape[3]),
            _pair(given["stride"]),
            padding if isinstance(padding, str) else _pair(padding),
            _pair(given["dilation"]),
            given["groups"],
            bias is not None,
            device="meta",
        )
        key = (layer.stride, layer.padding, layer.dilation, layer.groups)
        return self._layer(node, layer, given["input"], given["weight"], weight, bias, key)

    def _write_linear(self, node: fx.Node) -> Any:
        given = self._named(node)
        weight, bias = self._value(given["weight"]), self._value(given["bias"])
        if weight is None or weight.dim() != 2 or (given["bias"] is not None and bias is None):
            return None
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        return self._layer(node, layer, given["input"], given["weight"], weight, bias, ())

    def _write_matmul(self, node: fx.Node) -> Any:
        left, right = node.args[:2]
        assert isinstance(left, fx.Node)
        assert isinstance(right, fx.Node)
        weight = self._value(right)
        if weight is None or weight.dim() != 2:
            return None
        layer = nn.Linear(weight.shape[0], weight.shape[1], False, device="meta")
        return self._layer(node, layer, left, right, weight.t().contiguous(), None, ())

    _write_mm = _write_matmul

    def _write_addmm(self, node: fx.Node) -> Any:
        given = self._named(node)
        bias, weight = self._value(given["self"]), self._value(given["mat2"])
        if weight is None or bias is None or bias.dim() != 1 or given["beta"] != 1 or given["alpha"] != 1:
            return None
        layer = nn.Linear(weight.shape[0], weight.shape[1], True, device="meta")
        return self._layer(node, layer, given["mat1"], given["mat2"], weight.t().contiguous(), bias, ())

    def _write_baddbmm(self, node: fx.Node) -> Any:
        given = self._named(node)
        product = self._graph.call_function(torch.matmul, (self._env[given["batch1"]], self._env[given["batch2"]]))
        if given["alpha"] != 1:
            product = self._graph.call_function(torch.mul, (product, given["alpha"]))
        if given["beta"] == 0:
            return product
        bias = self._env[given["self"]]
        if given["beta"] != 1:
            bias = self._graph.call_function(torch.mul, (bias, given["beta"]))
        return self._graph.call_function(torch.add, (product, bias))

    def _write_batch_norm(self, node: fx.Node) -> Any:
        given = self._named(node)
        parts = [self._value(given[key]) for key in ("running_mean", "running_var", "weight", "bias")]
        if parts[0] is None or parts[1] is None or given["training"]:
            return None
        return self._norm(node, given["input"], given["weight"] or given["running_mean"], parts, given["eps"])

    def _write__native_batch_norm_legit_no_training(self, node: fx.Node) -> Any:
        given = self._named(node)
        parts = [self._value(given[key]) for key in ("running_mean", "running_var", "weight", "bias")]
        if any(part is None for part in parts[:2]):
            return None
        result = self._norm(node, given["input"], given["weight"] or given["running_mean"], parts, given["eps"])
        for reader in list(node.users):
            # It gives the statistics as well; only the first value is read.
            self._env[reader] = result
        return result

    def _norm(self, node: fx.Node, source: fx.Node, named_by: fx.Node, parts: list[Tensor | None], eps: float) -> Any:
        mean, var, weight, bias = parts
        assert mean is not None and var is not None  # noqa: PT018
        example = source.meta.get("val")
        kind = nn.BatchNorm2d if isinstance(example, Tensor) and example.dim() == 4 else nn.BatchNorm1d
        layer = kind(len(mean), eps=eps, affine=True)
        layer.running_mean, layer.running_var = mean.detach().clone(), var.detach().clone()
        layer.weight = nn.Parameter(torch.ones_like(mean) if weight is None else weight.detach().clone())
        layer.bias = nn.Parameter(torch.zeros_like(mean) if bias is None else bias.detach().clone())
        return self._call(node, layer, source, named_by, (id(mean), id(var), id(weight), id(bias)))

    def _write_scaled_dot_product_attention(self, node: fx.Node) -> Any:
        """softmax(q k^T * scale + mask) v, as PyTorch documents the function."""
        given = self._named(node)
        if given["is_causal"] or given["enable_gqa"]:
            return None
        query, key, value = (self._env[given[part]] for part in ("query", "key", "value"))
        example = given["query"].meta.get("val")
        scale = given["scale"] if given["scale"] is not None else 1 / math.sqrt(int(example.shape[-1]))
        graph = self._graph
        # As PyTorch does, half of the scale on each side: neither factor grows beyond the other.
        turned = graph.call_method("transpose", (key, -2, -1))
        scores = graph.call_function(torch.matmul, (query, turned))
        scores = graph.call_function(torch.mul, (scores, float(scale)))
        mask = given["attn_mask"]
        if mask is not None:
            shown = mask.meta.get("val")
            if isinstance(shown, Tensor) and shown.dtype == torch.bool:
                denied = graph.call_function(torch.logical_not, (self._env[mask],))
                scores = graph.call_function(torch.masked_fill, (scores, denied, float("-inf")))
            else:
                scores = graph.call_function(torch.add, (scores, self._env[mask]))
        weights = graph.call_function(torch.softmax, (scores, -1))
        path = _layer_path(node)
        result = graph.call_function(torch.matmul, (weights, value))
        for part, made in (("scores", turned.next), ("attention", weights), ("mixed", result)):
            if path:
                made.meta["name"] = f"{path}.{part}"
        return result

    def _write_einsum(self, node: fx.Node) -> Any:
        """A product of two operands over one index as a matrix product; others stay as they are."""
        equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
        if "." in equation or "->" not in equation or len(operands) != 2:  # type: ignore[arg-type]
            return None
        inputs, _, output = equation.partition("->")
        left, _, right = inputs.partition(",")
        shared = [index for index in left if index in right]
        summed = [index for index in shared if index not in output]
        batch = [index for index in shared if index in output]
        rows, columns = [i for i in left if i not in right], [i for i in right if i not in left]
        whole = all(index in output for index in (*rows, *columns))
        if not whole or not len(summed) == len(rows) == len(columns) == 1 or len(set(left)) != len(left):
            return None
        first, second = (self._env[item] for item in operands)  # type: ignore[union-attr,index]
        first = self._permuted(first, left, [*batch, *rows, *summed])
        second = self._permuted(second, right, [*batch, *summed, *columns])
        product = self._graph.call_function(torch.matmul, (first, second))
        return self._permuted(product, "".join([*batch, *rows, *columns]), list(output))

    def _permuted(self, value: fx.Node, now: str, wanted: list[str]) -> fx.Node:
        order = [now.index(index) for index in wanted]
        return value if order == sorted(order) else self._graph.call_function(torch.permute, (value, order))

    def _write_hardtanh(self, node: fx.Node) -> Any:
        given = self._named(node)
        if (given["min_val"], given["max_val"]) != (0, 6):
            return None
        return self._graph.call_function(F.relu6, (self._env[given["self"]],))

    def _write_clamp(self, node: fx.Node) -> Any:
        given = self._named(node)
        if (given["min"], given["max"]) != (0, 6):
            return None
        return self._graph.call_function(F.relu6, (self._env[given["self"]],))

    def _write_expand(self, node: fx.Node) -> Any:
        given = self._named(node)
        return self._graph.call_method("expand", (self._env[given["self"]], *self._sizes(given["size"])))

    def _write_repeat(self, node: fx.Node) -> Any:
        given = self._named(node)
        return self._graph.call_method("repeat", (self._env[given["self"]], *self._sizes(given["repeats"])))

    def _sizes(self, sizes: list[Any]) -> list[Any]:
        return [self._env[item] if isinstance(item, fx.Node) else item for item in sizes]

    def _write_index(self, node: fx.Node) -> Any:
        source, indices = node.args[:2]
        assert isinstance(source, fx.Node)
        parts = [self._env[item] if isinstance(item, fx.Node) else slice(None) for item in indices]  # type: ignore[union-attr]
        return self._graph.call_function(operator.getitem, (self._env[source], tuple(parts)))

    def _write_slice(self, node: fx.Node) -> Any:
        given = self._named(node)
        dim, start, end, step = given["dim"], given["start"], given["end"], given["step"]
        if dim < 0 or step != 1:
            return None
        if start in (None, 0) and isinstance(end, int) and end > 2**62:
            return self._env[given["self"]]
        end = None if isinstance(end, int) and end > 2**62 else end
        start, end = self._sizes([start, end])
        parts = (*[slice(None)] * dim, slice(start, end))
        return self._graph.call_function(operator.getitem, (self._env[given["self"]], parts))

    def _value(self, item: Any) -> Tensor | None:
        """The tensor behind a constant of the old graph."""
        if not isinstance(item, fx.Node) or item.op != "get_attr":
            return None
        value = attribute(self._old, str(item.target))
        return value if isinstance(value, Tensor) else None

    def _layer(
        self,
        node: fx.Node,
        layer: nn.Conv2d | nn.Linear,
        source: fx.Node,
        named_by: fx.Node,
        weight: Tensor,
        bias: Tensor | None,
        key: tuple[Any, ...],
    ) -> fx.Node:
        layer.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
        return self._call(node, layer, source, named_by, (*key, named_by.target, id(bias)))

    def _call(
        self, node: fx.Node, layer: nn.Module, source: fx.Node, named_by: fx.Node, key: tuple[Any, ...]
    ) -> fx.Node:
        """Call ``layer`` under its path in the model, that of its weights, or of the module that computes."""
        owner = str(named_by.target).rpartition(".")[0]
        path = _layer_path(node) or owner or _module_path(node) or str(node.target._opname)  # type: ignore[union-attr]
        name, number = path, 0
        while name in self._made or not _is_free(self._root, name):
            if self._made.get(name) == (type(layer), *key):
                return self._graph.call_module(name, (self._env[source],))
            number += 1
            name = f"{path}_{number}"
        self._made[name] = (type(layer), *key)
        _add(self._root, name, layer)
        return self._graph.call_module(name, (self._env[source],))


_OF_TORCH: Final = frozenset(
    {
        *("abs", "addcmul", "amax", "amin", "argmax", "bmm", "ceil", "chunk", "clamp", "clamp_min", "clamp_max"),
        *("cos", "cumsum", "div", "eq", "exp", "flip", "floor", "floor_divide", "gather", "ge", "gt", "le", "log"),
        *("log_softmax", "logical_and", "logical_not", "logical_or", "lt", "masked_fill", "max", "maximum", "mean"),
        *("min", "minimum", "movedim", "mul", "narrow", "ne", "neg", "permute", "pixel_shuffle", "pixel_unshuffle"),
        *("pow", "reciprocal", "roll", "rsqrt", "rsub", "select", "sigmoid", "sin", "split", "sqrt", "square"),
        *("squeeze", "stack", "std", "sub", "sum", "swapaxes", "tanh", "topk", "transpose", "unbind", "unflatten"),
        *("unsqueeze", "var", "where"),
    }
)
"""ATen operations that ``torch`` has under the same name with the same arguments."""


def _pair(values: Any) -> Any:
    values = [values] if isinstance(values, int) else list(values)
    return tuple(values * 2 if len(values) == 1 else values)


def _is_free(root: nn.Module, path: str) -> bool:
    """Whether a module can be put at ``path``."""
    found: Any = root
    *way, last = path.split(".")
    for part in way:
        if not hasattr(found, part):
            return True
        found = getattr(found, part)
        if not isinstance(found, nn.Module):
            return False
    return not hasattr(found, last)


def _add(root: nn.Module, path: str, layer: nn.Module) -> None:
    *way, last = path.split(".")
    for part in way:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    root.add_module(last, layer)


def _module_path(node: fx.Node) -> str:
    """The path of the innermost module of the model that a node of its graph was computed in."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(next(reversed(stack.values()))[0]).replace("@", "_") if stack else ""


def _layer_path(node: fx.Node) -> str:
    """That path where the module is a layer of PyTorch, which computes this and nothing else; empty otherwise."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path, kind = next(reversed(stack.values()))
    layer = str(kind).startswith("torch.nn.modules") and not str(kind).endswith(("Sequential", "MultiheadAttention"))
    return str(path).replace("@", "_") if layer else ""
