"""Names for what was traced: the tensors of the calibration table, and the layers that can run in INT8."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence

from torch import Tensor, fx

from calib.network import INPUT, OUTPUT, Layer, Network
from calib.ops import QUANTIZABLE, gives_tuple, kind_of
from calib.scales import scale_sources
from calib.task import find_task
from calib.tracing.fold import attribute

_BOUND = frozenset({"clamp", "clamp_max", "clamp_min", "hardtanh"})
"""Operations whose infinite arguments are bounds, and get into no value."""


def describe(
    name: str,
    module: fx.GraphModule,
    in_place: set[str],
    input_shape: tuple[int, int, int] | None,
    traced_by: str,
    output_names: tuple[str, ...] | None,
) -> Network:
    """The network that a normalised graph is.

    Args:
        name: The network's, for error lines and files.
        module: Without batch normalisation that could be folded, dropout and operations in place; ``meta["name"]`` of
            a function's node is the name of its tensor where that is not the node's.
        in_place: fx names of operations that overwrote their input until they were made pure.
        input_shape: (C, H, W) of one image where known.
        traced_by: As in :class:`Network`.
        output_names: What the model calls its outputs; None where it was not run.
    """
    nodes = [node for node in module.graph.nodes if node.op not in ("output", "get_attr")]
    kinds = {node.name: kind_of(node, module) for node in nodes}
    nodes = [node for node in nodes if kinds[node.name] != "shape"]
    outputs = next(node for node in module.graph.nodes if node.op == "output").all_input_nodes
    softmax = outputs[0] if len(outputs) == 1 and kinds[outputs[0].name] == "softmax" else None
    masked = _masked(nodes, kinds, module)
    kinds.update(dict.fromkeys(masked, "other"))
    _keep_sums_in_float(nodes, kinds)

    # A ReLU that overwrites its input takes its name: "ip1" is the value after the in-place ReLU, as in Caffe.
    takes_name = {node.name for node in nodes if kinds[node.name] == "relu" and node.name in in_place}
    own = _names(nodes, kinds, takes_name, softmax)
    # Neither has a range of its own: what moves another value, several tensors at once, and minus infinity.
    without_range = {node.name for node in nodes if kinds[node.name] == "view" or gives_tuple(node)} | masked
    observed = _observed([node.name for node in nodes if node.name not in without_range], own, takes_name)
    return Network(
        name=name,
        module=module,
        tensors=tuple(observed.values()),
        tensor_of={node.name: own[node.name] for node in nodes if node.name in without_range | observed.keys()},
        observed=observed,
        scale_source=scale_sources(nodes, kinds, own, {tensor: node for node, tensor in observed.items()}, module),
        kinds=kinds,
        layers=tuple(
            _layer(node, own[node.name], kinds) for node in nodes if kinds[node.name] in QUANTIZABLE or node is softmax
        ),
        unsupported={
            own[node.name]: _operation(node, module)
            for node in nodes
            if kinds[node.name] in ("other", "batchnorm") and node.target is not operator.getitem
        },
        input_shape=input_shape,
        outputs=tuple(node.name for node in outputs),
        output_names=output_names
        if output_names is not None and len(output_names) == len(outputs)
        else tuple(f"output_{i}" if i else "output" for i in range(len(outputs))),
        task=find_task(outputs, kinds),
        traced_by=traced_by,
    )


def _names(
    nodes: Sequence[fx.Node], kinds: Mapping[str, str], takes_name: set[str], softmax: fx.Node | None
) -> dict[str, str]:
    """Name of the tensor that each fx node's value is, or is a part or another shape of.

    Args:
        nodes: In the network's order.
        kinds: Of them.
        takes_name: Nodes whose value has the name of what they read.
        softmax: The one that gives the network's only output, if one does.
    """
    own: dict[str, str] = {}
    used = {INPUT} if softmax is None else {INPUT, OUTPUT}
    for node in nodes:
        if node.op == "placeholder":
            own[node.name] = INPUT
        elif node is softmax:
            own[node.name] = OUTPUT
        elif kinds[node.name] == "view" or node.name in takes_name:
            own[node.name] = own[node.all_input_nodes[0].name]
        else:
            path = str(node.target) if node.op == "call_module" else node.meta.get("name", node.name)
            own[node.name] = _unique(path, used)
    return own


def _observed(nodes: Sequence[str], own: Mapping[str, str], takes_name: set[str]) -> dict[str, str]:
    """What each fx node gives the value of: of a name's, the last one written under it, behind in-place ReLUs."""
    observed: dict[str, str] = {}
    holder: dict[str, str] = {}
    for node in nodes:
        tensor = own[node]
        if node in takes_name:
            observed.pop(holder[tensor], None)
        holder[tensor] = node
        observed[node] = tensor
    return observed


def _layer(node: fx.Node, name: str, kinds: Mapping[str, str]) -> Layer:
    return Layer(
        name=name,
        kind=kinds[node.name],
        node=node.name,
        inputs=tuple(item.name for item in node.all_input_nodes if kinds.get(item.name) not in ("shape", None)),
        target=str(node.target) if node.op == "call_module" else None,
    )


def _operation(node: fx.Node, module: fx.GraphModule) -> str:
    """What an fx node does, for people: a module's class, or a function's name."""
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))).__name__
    return getattr(node.target, "__name__", str(node.target))


def _masked(nodes: Sequence[fx.Node], kinds: dict[str, str], module: fx.GraphModule) -> set[str]:
    """Find the fx nodes in whose values a mask of attention has put minus infinity: they have no range."""
    found: set[str] = set()
    for node in nodes:
        if kinds[node.name] not in ("add", "view", "other") or node.op == "call_module":
            continue
        if getattr(node.target, "__name__", node.target) in _BOUND:
            continue
        sources = node.all_input_nodes
        constants = [attribute(module, str(item.target)) for item in sources if item.op == "get_attr"]
        if (
            any(isinstance(item, float) and math.isinf(item) for item in node.args)
            or any(isinstance(item, Tensor) and bool(item.isinf().any()) for item in constants)
            or (kinds[node.name] in ("add", "view") and any(item.name in found for item in sources))
        ):
            found.add(node.name)
    return found


def _keep_sums_in_float(nodes: Sequence[fx.Node], kinds: dict[str, str]) -> None:
    """Let a sum that only operations in float read stay in float, as between the blocks of a transformer.

    Quantizing it would save nothing and cost accuracy.
    """
    carries = {"relu", "maxpool", "view", "concat"}
    in_int8: set[str] = set()
    in_float: set[str] = set()
    for node in reversed(nodes):
        for reader in node.users:
            kind = kinds.get(reader.name, "output")
            carried = kind in carries
            if kind in QUANTIZABLE or (carried and reader.name in in_int8):
                in_int8.add(node.name)
            elif kind in ("other", "batchnorm", "softmax") or (carried and reader.name in in_float):
                in_float.add(node.name)
        if kinds[node.name] == "add" and node.name in in_float - in_int8:
            kinds[node.name] = "other"


def _unique(name: str, used: set[str]) -> str:
    candidate, number = name, 0
    while candidate in used:
        number += 1
        candidate = f"{name}_{number}"
    used.add(candidate)
    return candidate
