"""Opening an ONNX network in ONNX Runtime, with any of its values as outputs.

Imports onnx and onnxruntime inside functions: they are slow to load.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib.onnx.model import name_nodes
from common.errors import InputError, first_line

if TYPE_CHECKING:
    import onnx

_CUDA = "CUDAExecutionProvider"

_UNKNOWN_OPERATOR = ("is not a registered function/op", "No Op registered", "NOT_IMPLEMENTED")


def with_outputs(model: onnx.ModelProto, values: Sequence[str]) -> onnx.ModelProto:
    """The network with these values as its outputs, and no others."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    name_nodes(copy)  # ONNX Runtime refuses two of one name, which TensorRT takes
    del copy.graph.output[:]
    known = {value.name: value for value in model.graph.output}
    copy.graph.output.extend(known.get(name, onnx.ValueInfoProto(name=name)) for name in values)
    return copy


def open_session(
    path: Path, model: onnx.ModelProto, threads: int, *, optimize: bool = True, optimized: Path | None = None
) -> Any:
    """A session for a network.

    Args:
        path: The file, whose folder holds external weights.
        model: The network.
        threads: How many share the work of an operator.
        optimize: Whether ONNX Runtime optimizes the graph.
        optimized: Where the optimized network is written to, with its weights in a file beside it.

    Raises:
        InputError: ONNX Runtime does not take the network.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors are raised as well
    options.add_session_config_entry("session.intra_op.spin_duration_us", "1000")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent.resolve()))
    if platform.machine() in ("x86_64", "AMD64"):
        # Sums of two products of integers do not saturate with this.
        options.add_session_config_entry("session.x64quantprecision", "1")
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{optimized.name}.data"
        )
    providers: list[Any] = ["CPUExecutionProvider"]
    if has_cuda():
        providers.insert(0, (_CUDA, {"use_tf32": "0"}))
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)
    except Exception as error:  # its exceptions share no base class of their own
        foreign = ", ".join(_foreign_operators(model))
        if foreign and any(text in str(error) for text in _UNKNOWN_OPERATOR):
            raise InputError(
                f"{path} has operators that ONNX Runtime does not have: {foreign}; cut the network before them, "
                "or calibrate with TensorRT"
            ) from error
        raise InputError(f"ONNX Runtime does not take {path}: {reason(error)}") from error


def has_cuda() -> bool:
    """Whether the ONNX Runtime that is installed has the CUDA provider, which yet may find no GPU or library."""
    import onnxruntime

    return _CUDA in onnxruntime.get_available_providers()


def _foreign_operators(model: onnx.ModelProto) -> Iterator[str]:
    """The operators of a model that ONNX does not define, once each, and those of other domains."""
    import onnx

    versions = {item.domain: item.version for item in model.opset_import}
    seen = set()
    for node in model.graph.node:
        domain = node.domain if node.domain != "ai.onnx" else ""
        known = domain in ("", "ai.onnx.ml") and onnx.defs.has(node.op_type, versions.get(domain, 1), domain)
        known = known or domain.startswith("com.microsoft")
        if not known and (domain, node.op_type) not in seen:
            seen.add((domain, node.op_type))
            yield f"{node.op_type} (domain {domain})" if domain else node.op_type


def reason(error: Exception) -> str:
    """The first line of ONNX Runtime's message, without its error code."""
    text = first_line(error).rpartition("[ONNXRuntimeError] : ")[2]
    return re.sub(r"^[0-9]+ : [A-Z_]+ : ", "", text)[:300]
