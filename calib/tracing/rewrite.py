"""A graph of ATen operations written anew in layers and functions, which the rest of the package reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.utils import _pytree

from calib.tracing.aten import FUNCTIONS, OF_TORCH, SAME
from calib.tracing.fold import attribute


class _Written(dict[fx.Node, Any]):
    """Old node -> new one; a constant becomes one when it is asked for, so that weights of layers do not."""

    def __init__(self, constant: Callable[[fx.Node], fx.Node]) -> None:
        super().__init__()
        self._constant = constant

    def __missing__(self, node: fx.Node) -> Any:
        return self._constant(node)


class Rewriter:
    """Writes a graph of ATen operations anew in layers and functions.

    Attributes:
        graph: The new graph.
        env: Node of the old graph -> what stands for it in the new one.
        result: The new graph over the layers that it calls, in eval mode.

    Args:
        module: The old graph, every operation pure, constants folded.
        writers: ATen's name -> what writes that operation in other terms than PyTorch's function of the same name.

    Raises:
        NotImplementedError: the graph calls what is no operation.
    """

    def __init__(self, module: fx.GraphModule, writers: Mapping[str, Writer]) -> None:
        self._old = module
        self._writers = writers
        self._root = nn.Module()
        self.graph = fx.Graph()
        self.env = _Written(self._constant)
        self._made: dict[str, tuple[Any, ...]] = {}
        for node in module.graph.nodes:
            if node.op != "get_attr" and node not in self.env:
                self.env[node] = self._written(node)
        self.graph.lint()
        self.result = fx.GraphModule(self._root, self.graph).eval().requires_grad_(False)

    def _written(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self.graph.placeholder(str(node.target))
        if node.op == "output":
            results = [item for item in _pytree.tree_leaves(node.args) if isinstance(item, fx.Node)]
            new = tuple(self.env[item] for item in results)
            return self.graph.output(new[0] if len(new) == 1 else new)
        if node.op != "call_function":
            raise NotImplementedError(f"{node.op} {node.target}")
        result = self._operation(node)
        if isinstance(result, fx.Node) and "name" not in result.meta:
            path = layer_path(node)
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
        return self.graph.get_attr(name)

    def constant(self, name: str, value: Tensor) -> fx.Node:
        """A constant that the old graph does not have, in the new one."""
        while hasattr(self._root, name):
            name += "_"
        self._root.register_buffer(name, value)
        return self.graph.get_attr(name)

    def _arguments(self, node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.env.__getitem__)
        return args, dict(kwargs)

    def named(self, node: fx.Node) -> dict[str, Any]:
        """All arguments of an operation by name, defaults included; nodes are those of the old graph."""
        names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
        values = {a.name: a.default_value for a in node.target._schema.arguments if a.has_default_value()}  # type: ignore[union-attr]
        return values | dict(zip(names, node.args, strict=False)) | dict(node.kwargs)

    def _operation(self, node: fx.Node) -> Any:
        target: Any = node.target
        if not isinstance(target, OpOverload):
            args, kwargs = self._arguments(node)
            return self.graph.call_function(target, args, kwargs)
        if target in SAME:
            return self.env[node.args[0]]  # type: ignore[index]
        name = target._opname
        writer = self._writers.get(name)
        written = writer(self, node) if writer is not None else None
        return self._function(node, name) if written is None else written

    def _function(self, node: fx.Node, name: str) -> fx.Node:
        args, kwargs = self._arguments(node)
        if name == "sym_size":
            return self.graph.call_method("size", args)
        names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
        function = FUNCTIONS.get(name)
        if function is None and name in OF_TORCH:
            function = getattr(torch, name)
        if function is not None:
            return self.graph.call_function(function, args, kwargs)
        if names and names[0] == "self" and callable(getattr(Tensor, name, None)) and not kwargs:
            return self.graph.call_method(name, args)
        return self.graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]

    def value(self, item: Any) -> Tensor | None:
        """The tensor behind a constant of the old graph."""
        if not isinstance(item, fx.Node) or item.op != "get_attr":
            return None
        value = attribute(self._old, str(item.target))
        return value if isinstance(value, Tensor) else None

    def call(
        self, node: fx.Node, layer: nn.Module, source: fx.Node, named_by: fx.Node, key: tuple[Any, ...]
    ) -> fx.Node:
        """Call ``layer`` under its path in the model, that of its weights, or of the module that computes.

        Args:
            node: What the layer computes.
            layer: Put into the result unless an equal one is there.
            source: Its input, a node of the new graph; the others are of the old one.
            named_by: Its weight.
            key: Layers of one kind and equal keys are the same one.
        """
        owner = str(named_by.target).rpartition(".")[0]
        path = layer_path(node) or owner or _module_path(node) or str(node.target._opname)  # type: ignore[union-attr]
        name, number = path, 0
        while name in self._made or not _is_free(self._root, name):
            if self._made.get(name) == (type(layer), *key):
                return self.graph.call_module(name, (source,))
            number += 1
            name = f"{path}_{number}"
        self._made[name] = (type(layer), *key)
        _add(self._root, name, layer)
        return self.graph.call_module(name, (source,))


Writer = Callable[[Rewriter, fx.Node], Any]
"""Writes one operation of the old graph; None where the general way serves."""


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


def layer_path(node: fx.Node) -> str:
    """That path where the module is a layer of PyTorch, which computes this and nothing else; empty otherwise."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path, kind = next(reversed(stack.values()))
    layer = str(kind).startswith("torch.nn.modules") and not str(kind).endswith(("Sequential", "MultiheadAttention"))
    return str(path).replace("@", "_") if layer else ""
