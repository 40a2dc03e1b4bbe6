"""Which tensors of an ONNX network a calibration table should name."""

from __future__ import annotations

from pathlib import Path

from common.errors import InputError

_NEEDS_NONE = frozenset(
    {
        "Cast",
        "Constant",
        "ConstantOfShape",
        "Dropout",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "MaxPool",
        "Pad",
        "Reshape",
        "Shape",
        "Sigmoid",
        "Slice",
        "Split",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
)
"""Operators whose output TensorRT needs no scale for: they move or describe values, or are one half of a SiLU."""

_FUSED = frozenset({"BatchNormalization", "Clip", "LeakyRelu", "Relu"})
"""Operators that TensorRT makes one with the layer before, whose own output then needs no scale."""

_QUANTIZERS = frozenset({"QuantizeLinear", "DequantizeLinear"})


def network_tensors(path: Path) -> dict[str, bool]:
    """Names of the float tensors of the network in ``path``, in its order -> whether the table should have them.

    The table may also have those that TensorRT needs no scale for.

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
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    tensors = {value.name: True for value in graph.input if value.name not in weights}
    for node in graph.node:
        # What is computed from constants alone (shapes, mostly) is a constant.
        if all(name in constants for name in node.input):
            constants |= set(node.output)
            continue
        for name in filter(None, node.output):
            used_by = readers.get(name, [])
            fused = len(used_by) == 1 and used_by[0] in _FUSED
            tensors[name] = bool(used_by) and not fused and node.op_type not in _NEEDS_NONE
    return tensors
