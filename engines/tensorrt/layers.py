"""Which layers an engine runs in INT8: TensorRT's own list of an engine's layers, with the types that they read.

An engine's inspector gives types only where the builder was told to keep them (profiling verbosity DETAILED), which
Torch-TensorRT's TorchScript front end has no option for: the inspector of its engines gives bare names. But the builder
writes the same list into its verbose log, a line (here broken in two) for each layer of the finished engine:

    Layer(CaskConvolution): %input.5 : Tensor = aten::_convolution(...), scope: __module.conv2 # ..., Tactic: 0x...,
    %input.3 (Int8[1,20:32,12,12]) -> %input.5 (Float[1,50,8,8])
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calib.network import Layer, Network
from calib.plan import Int8Plan
from common.macs import LayerMacs, MacCount

_HEADING = "Engine Layer Information:"
_NEXT_ENTRY = re.compile(r"\n(?=[A-Z_]+: \[)")
_NEXT_LAYER = re.compile(r"\n(?=Layer\()")  # a name may hold line breaks
_LINE = re.compile(r"Layer\((\w+)\): (.*), Tactic: (?:0x)?[0-9a-fA-F]+, ?(.*)", re.DOTALL)
_TYPE = re.compile(r"[\[(](Float|Half|BFloat16|Int8|FP8|Int4|Int32|Int64|UInt8|Bool)[\[(]")
_NODE = re.compile(
    r"%(?P<value>\S+) : [^%]*? = aten::(?P<operation>\w+)\([^)]*\)"
    r"(?:, scope: (?:\S*/)?__module\.(?P<scope>\S+))?(?: # \S+?:(?P<line>\d+):\d+)?"
)
_UNNAMED = re.compile(r"\(Unnamed Layer\* (\d+)\) \[(Convolution|Deconvolution|Matrix Multiply)\]")
_PRODUCTS = {
    "_convolution": "conv",
    "convolution": "conv",
    "conv2d": "conv",
    "conv_transpose2d": "conv",
    "matmul": "linear",
    "linear": "linear",
    "addmm": "linear",
    "Convolution": "conv",
    "Deconvolution": "conv",
    "Matrix Multiply": "linear",
}
"""Operations that multiply by weights, of TorchScript and of TensorRT -> kind of layer."""
_NO_ARITHMETIC = frozenset({"Reformat", "NoOp", "Constant", "Shuffle"})
_OPERATORS = {"conv": "Conv", "linear": "Gemm", "matmul": "MatMul"}
_REASON = "computed in float: TensorRT chose that kernel, by speed"


@dataclass(frozen=True)
class EngineLayer:
    """A layer of a built engine.

    Attributes:
        kind: Of TensorRT's implementation, such as ``CaskConvolution``.
        name: Of what was fused into it, as TensorRT writes it.
        reads: Types of its inputs, such as ``Int8`` and ``Float``.
        writes: Types of its outputs.
    """

    kind: str
    name: str
    reads: list[str]
    writes: list[str]


def read_layers(log: str) -> list[EngineLayer]:
    """The layers that a verbose log of TensorRT's builder lists, of each engine that was built; none without a list."""
    found = []
    for listed in log.split(_HEADING)[1:]:
        lines = _NEXT_ENTRY.split(listed, maxsplit=1)[0]
        for text in _NEXT_LAYER.split(lines.strip()):
            match = _LINE.fullmatch(text.partition("\n")[0]) or _LINE.fullmatch(text)
            if match is not None:
                inputs, _, outputs = match[3].rpartition(" -> ")
                found.append(EngineLayer(match[1], match[2], _TYPE.findall(inputs), _TYPE.findall(outputs)))
    return found


def executed_macs(plan: Int8Plan, layers: Sequence[EngineLayer], source: str) -> MacCount | None:
    """Count a network's multiply-accumulates by the types that the layers of its engine read.

    A convolution or linear layer is found by the module that its TorchScript node names; where the node names none,
    or TensorRT has only a number for it, as for convolutions of quantized weights, by its place among those of its
    kind. Those that cannot be told, such as inside a block that TensorRT compiled as one, are listed as not counted.

    Args:
        plan: What was to run in INT8, of the network that TensorRT was given, traced with an ``input_shape``.
        layers: Of the engine.
        source: What was counted, for people.

    Returns:
        None where nothing is known of any layer.
    """
    network = plan.network
    if network.input_shape is None or not layers:
        return None
    reads = _reads(network, layers)
    sizes = _macs(network)
    counted, uncounted = [], []
    for layer in network.layers:
        operator = _OPERATORS.get(layer.kind)
        if operator is None:
            continue
        types = reads.get(layer.name)
        if types is None:
            uncounted.append(layer.name)
            continue
        int8, planned = types[:1] == ["Int8"], layer.name in plan.layers
        reason = "" if int8 else plan.kept.get(layer.name, _REASON)
        counted.append(LayerMacs(layer.name, operator, sizes[layer.name], int8, reason, planned))
    return MacCount(source, counted, uncounted) if counted else None


def _reads(network: Network, layers: Sequence[EngineLayer]) -> dict[str, list[str]]:
    """Name of a layer of ``network`` -> types that the engine's layer with it reads."""
    wanted = {layer.target: layer for layer in network.layers if layer.kind in ("conv", "linear")}
    found: dict[str, list[str]] = {}
    without: dict[str, dict[tuple[int, int], list[str]]] = {"conv": {}, "linear": {}}
    for one in layers:
        if one.kind in _NO_ARITHMETIC:
            continue
        for node in _NODE.finditer(one.name):
            kind = _PRODUCTS.get(node["operation"])
            layer = wanted.get(node["scope"])
            if kind is None:
                continue
            if layer is not None:
                found[layer.name] = one.reads
            else:
                number = re.search(r"\d+", node["value"])
                place = (int(node["line"] or 0), int(number[0]) if number else 0)
                without[kind][place] = one.reads
        for unnamed, operation in _UNNAMED.findall(one.name):
            without[_PRODUCTS[operation]][(0, int(unnamed))] = one.reads
    for kind, nodes in without.items():
        rest = [layer for layer in network.layers if layer.kind == kind and layer.name not in found]
        if len(rest) == len(nodes):
            found.update(zip((layer.name for layer in rest), (nodes[place] for place in sorted(nodes)), strict=True))
    return found


def _macs(network: Network) -> dict[str, int]:
    """Multiply-accumulates of each convolution and linear layer, for one image."""
    shapes = network.value_shapes(1)
    return {
        layer.name: _multiplied(network, layer, shapes) for layer in network.layers if layer.kind in ("conv", "linear")
    }


def _multiplied(network: Network, layer: Layer, shapes: Mapping[str, torch.Size]) -> int:
    """Values that a layer gives, and of a transposed convolution those that it reads, times the weights of each."""
    module = network.module.get_submodule(str(layer.target))
    assert isinstance(module.weight, Tensor)
    value = layer.inputs[0] if isinstance(module, nn.ConvTranspose2d) else layer.node
    return shapes[value].numel() * module.weight[0].numel()
