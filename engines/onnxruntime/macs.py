"""What ONNX Runtime multiplies in INT8: the network that it is given, against the graph that it makes of it.

Quantize/dequantize pairs around a layer ask for an integer kernel; where ONNX Runtime has none for the place (a
convolution whose result is read in float), it computes the layer in float on dequantized values.
"""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Final

from torch import nn

from calib.network import Network
from calib.onnx.graph import Graph
from calib.onnx.macs import count_macs, products
from common.macs import LayerMacs, MacCount

if TYPE_CHECKING:
    import onnx

IN_FLOAT: Final = frozenset({"Conv", "FusedConv", "NhwcFusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"})
"""Operators of an optimised graph that multiply in float."""

_SOURCE: Final = "as ONNX Runtime executes it on this CPU"
_REASON: Final = "computed in float by ONNX Runtime, from INT8 operands"
_NO_KERNEL: Final = "ONNX Runtime has no integer kernel for it"
_REWRITTEN: Final = re.compile(r"(.+)_(?:columns|product)_*[._]weight.*")
"""Weight of a convolution in another form (:func:`engines.onnxruntime.form.rewrite_for_kernels`)."""


def executed_macs(network: Network, model: onnx.ModelProto, optimized: onnx.ModelProto) -> MacCount:
    """Count a network's multiply-accumulates by the kernels that were chosen.

    Args:
        network: What was exported.
        model: As it was given to ONNX Runtime, made by :func:`engines.onnx.int8.int8_model`.
        optimized: The graph that ONNX Runtime runs.
    """
    graph = Graph(model)
    weights = {name: _weight(node, graph) for name, node in products(graph)}
    no_kernel = {name: _NO_KERNEL for name, node in products(graph) if node.op_type == "ConvTranspose"}
    read = {value for node in optimized.graph.node if node.op_type in IN_FLOAT for value in node.input}
    in_float = {_initializer(value) for value in read}
    count = count_macs(model, _SOURCE, no_kernel)
    layers = []
    for layer in count.layers:
        weight = weights[layer.layer]
        found = _as_in_the_network(layer, weight, network, graph)
        if layer.int8 and weight in in_float:
            found = dataclasses.replace(found, int8=False, reason=_REASON)
        layers.append(found)
    return dataclasses.replace(count, layers=layers)


def _weight(node: onnx.NodeProto, graph: Graph) -> str:
    """The float initializer that a layer's weight was; empty where it multiplies two values."""
    name = node.input[1]
    return _initializer(name) if name in graph.constant else ""


def _initializer(value: str) -> str:
    """The initializer that codes, or values that come out of a DequantizeLinear, were made of."""
    return value.partition("_DequantizeLinear_Output")[0].partition("_quantized")[0]


def _as_in_the_network(layer: LayerMacs, weight: str, network: Network, graph: Graph) -> LayerMacs:
    """A convolution that was written otherwise (:mod:`engines.onnxruntime.form`), as it is in the network."""
    found = _REWRITTEN.fullmatch(weight)
    node = next((node for node in network.module.graph.nodes if found and node.name == found[1]), None)
    if node is None or node.op != "call_module":
        return layer
    conv = network.module.get_submodule(str(node.target))
    assert isinstance(conv, nn.Conv2d)  # nothing else is written otherwise
    *_, width = graph.weights[f"{weight}_quantized"].dims
    macs = layer.macs if layer.operator == "MatMul" else layer.macs * conv.kernel_size[1] // width
    return dataclasses.replace(layer, layer=network.observed.get(node.name, layer.layer), macs=macs)
