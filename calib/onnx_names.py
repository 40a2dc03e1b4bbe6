"""Which tensors of an ONNX network a calibration table should name."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from common.errors import InputError

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

_QUANTIZERS = frozenset({"QuantizeLinear", "DequantizeLinear"})


def network_tensors(path: Path) -> dict[str, Need]:
    """Names of the tensors of the network in ``path``, in its order -> whether the table should have them.

    The table may also have those that need no scale.

    Raises:
        InputError: not an ONNX file, or one that is quantized already.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except DecodeError as error:
        raise InputError(f"{path} is not an ONNX file") from error
    graph = model.graph
    if any(node.op_type in _QUANTIZERS for node in graph.node):
        raise InputError(f"{path} holds quantize/dequantize operators and takes no table: name the float network")
    if not graph.node:
        raise InputError(f"{path} is not an ONNX file, or an empty one")
    weights = {weight.name for weight in graph.initializer}
    constants = weights | {name for node in graph.node if node.op_type == "Constant" for name in node.output}
    readers: dict[str, list[str]] = {value.name: ["output"] for value in graph.output}
    for node in graph.node:
        for name in node.input if node.op_type != "Shape" else ():
            biased = node.op_type == "Add" and not constants.isdisjoint(node.input)
            readers.setdefault(name, []).append("bias" if biased else node.op_type)
    tensors: dict[str, Need] = {value.name: "required" for value in graph.input if value.name not in weights}
    shapes: set[str] = set()
    for node in graph.node:
        # What is computed from constants alone is a constant.
        if all(name in constants for name in node.input):
            constants |= set(node.output)
            continue
        if node.op_type == "Shape" or all(name in constants | shapes for name in node.input):
            shapes |= set(node.output)
        for name in filter(None, node.output):
            used_by = readers.get(name, [])
            fused = len(used_by) == 1 and used_by[0] in _FUSED
            fused = fused or (used_by == ["bias"] and node.op_type in _WEIGHTED)
            if name in shapes or not used_by or node.op_type in _NEEDS_NONE:
                tensors[name] = "none"
            else:
                tensors[name] = "advised" if fused or node.op_type in _MOVES else "required"
    return tensors
