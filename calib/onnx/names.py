"""Which tensors of an ONNX network a calibration table should name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from calib.onnx.graph import Graph
from calib.onnx.model import no_floats, read_float_model, values_read
from calib.onnx.parser_names import layer_name
from calib.onnx.rules import FUSED_ALGORITHMS, entries

if TYPE_CHECKING:
    import onnx

Need = Literal["required", "advised", "none"]
"""Whether a table should have a tensor: TensorRT runs a layer in INT8 only if all that it reads and writes has a scale.

``advised`` are the tensors that it can do without where it merges the operator with another one, or leaves it out.
"""

_MOVES = frozenset(
    {
        "Dropout",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "MaxPool",
        "Pad",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
)
"""Operators that only move or choose values."""

_NEEDS_NONE = frozenset({"Cast", "Sigmoid"})
"""Operators whose output needs no scale: what changes the type of values, and what is one half of a SiLU."""

_FUSED = frozenset({"BatchNormalization", "Clip", "LeakyRelu", "Relu"})
"""Operators that TensorRT makes one with the layer before, whose own output then can do without a scale."""

_WEIGHTED = frozenset({"Conv", "Gemm", "MatMul"})

_PARSER = re.compile(r"(ONNXTRT_|\(Unnamed Layer\* [0-9]+\) |tmp_weight).*", re.DOTALL)
"""Names that TensorRT's parser makes of nothing that the file names."""

_NUMBER = re.compile(r"_[0-9]+(?=_output$)")
"""What tells several layers apart that have the name of one operator."""


@dataclass(frozen=True)
class NetworkNames:
    """The names that a table for a network may have.

    Attributes:
        needs: Tensor, in the network's order -> whether the table should have it.
        made: Names that TensorRT's parser makes for this network, without numbers: layers inside of operators,
            products, constants, a softmax before it is reshaped.
        same: Tensor -> the name under which it may stand in the table instead.
        layers: Tensor -> the operators that write or read it.
    """

    needs: Mapping[str, Need]
    made: frozenset[str]
    same: Mapping[str, str]
    layers: Mapping[str, tuple[str, ...]]

    def knows(self, name: str) -> bool:
        """Whether TensorRT can ask for an entry of that name."""
        if name in self.needs or name in self.made or _PARSER.fullmatch(name) is not None:
            return True
        return _NUMBER.sub("", name) in self.made


def network_names(path: Path, algorithm: str | None = None) -> NetworkNames:
    """The names of the network in ``path``.

    Args:
        path: An ONNX file.
        algorithm: Of the table: with some, TensorRT calibrates after layer fusion, and asks for fewer tensors.

    Raises:
        InputError: not an ONNX file, or one that is quantized already.
    """
    model = read_float_model(path)
    needs = _needs(model)
    graph = Graph(model)
    around = {name: [graph.producer.get(name), *graph.readers.get(name, ())] for name in needs}
    for node in graph.nodes:
        if node.op_type == "Gemm" and any(node.input[2:]):
            product = f"{layer_name(node)}_output"  # before the bias is added
            needs[product], around[product] = "advised", [node]
    if algorithm in FUSED_ALGORITHMS:
        left = {entry.name for entry in entries(model, algorithm, path.parent)[0]}
        needs = {name: need if name in left else "none" for name, need in needs.items()}
    # A constant that several operators share passes an Identity.
    shared = {node.output[0] for node in graph.nodes if node.op_type == "Identity"} & graph.constant
    return NetworkNames(
        needs,
        made=frozenset(f"{name}_output" for name in (*map(layer_name, graph.nodes), *graph.constant)) | shared,
        same={node.output[0]: f"{layer_name(node)}_output" for node in graph.nodes if node.op_type == "Softmax"},
        layers={name: tuple(node.name or node.op_type for node in nodes if node) for name, nodes in around.items()},
    )


def _needs(model: onnx.ModelProto) -> dict[str, Need]:
    """Names of the tensors, in the network's order -> whether the table should have them; it may have all of them."""
    graph = model.graph
    others = no_floats(model)
    weights = {weight.name for weight in graph.initializer}
    constants = weights | {name for node in graph.node if node.op_type == "Constant" for name in node.output}
    readers: dict[str, list[str]] = {value.name: ["output"] for value in graph.output}
    for node in graph.node:
        for name in node.input if node.op_type != "Shape" else ():
            biased = node.op_type == "Add" and not constants.isdisjoint(node.input)
            readers.setdefault(name, []).append("bias" if biased else node.op_type)
    inputs = [value.name for value in graph.input if value.name not in weights]
    tensors: dict[str, Need] = {name: "none" if name in others else "required" for name in inputs}
    shapes: set[str] = set()
    for node in graph.node:
        # What is computed from constants alone is a constant; an If reads what its branches read.
        read = values_read(node)
        if constants.issuperset(read):
            constants |= set(node.output)
            continue
        if node.op_type == "Shape" or (constants | shapes).issuperset(read):
            shapes |= set(node.output)
        for name in filter(None, node.output):
            used_by = readers.get(name, [])
            fused = len(used_by) == 1 and used_by[0] in _FUSED
            fused = fused or (used_by == ["bias"] and node.op_type in _WEIGHTED)
            if name in shapes or name in others or not used_by or node.op_type in _NEEDS_NONE:
                tensors[name] = "none"
            else:
                tensors[name] = "advised" if fused or node.op_type in _MOVES else "required"
    return tensors
