"""Where the time goes, by kind of operator: of a network in ONNX Runtime, and of a training step in PyTorch."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from calib.network import INPUT

if TYPE_CHECKING:
    import onnx

PRODUCTS: Final = "convolutions and matrix products"
OTHERS: Final = "others"
KINDS: Final[Mapping[str, tuple[str, ...]]] = {
    PRODUCTS: ("conv", "gemm", "matmul"),
    "pooling": ("pool",),
    "conversion of type and layout": ("quantizelinear", "transpose", "reorder", "reshape", "flatten", "cast"),
}
"""Kind of operator -> what its operators contain in their names, in lower case; all the rest are :data:`OTHERS`."""

_WARM_UP: Final = 3


def kind_of(operator: str) -> str:
    """The kind of an ONNX operator or of one that ONNX Runtime's optimisation puts in its place."""
    return next((kind for kind, parts in KINDS.items() if any(part in operator.lower() for part in parts)), OTHERS)


def profile(
    models: Mapping[str, onnx.ModelProto], images: npt.NDArray[np.float32], rounds: int
) -> dict[str, dict[str, float]]:
    """Seconds that one thread spends in each kind of operator: the sum of its operators' median times.

    Args:
        models: By name; they take turns.
        images: [B, C, H, W], given to each model in every round.
        rounds: How often each runs; some more rounds that do not count warm up.

    Returns:
        Name -> kind of operator -> seconds for ``images``.
    """
    with tempfile.TemporaryDirectory() as folder:
        sessions = {
            name: _session(model, Path(folder, str(number))) for number, (name, model) in enumerate(models.items())
        }
        for _ in range(_WARM_UP + rounds):
            for session in sessions.values():
                session.run(None, {INPUT: images})
        files = {name: Path(session.end_profiling()) for name, session in sessions.items()}
        return {name: _by_kind(json.loads(file.read_text(encoding="utf-8"))) for name, file in files.items()}


def _session(model: onnx.ModelProto, prefix: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.enable_profiling = True
    options.profile_file_prefix = str(prefix)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _by_kind(events: list[dict[str, Any]]) -> dict[str, float]:
    """Sum the profiler's events, whose durations are in microseconds, up."""
    durations: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            durations[event["args"]["op_name"], event["name"]].append(event["dur"])
    seconds = dict.fromkeys([*KINDS, OTHERS], 0.0)
    for (operator, _), values in durations.items():
        seconds[kind_of(operator)] += statistics.median(values[_WARM_UP:]) / 1e6
    return seconds


@dataclass(frozen=True)
class Part:
    """What a kind of operator takes in a training step.

    Attributes:
        seconds: Median of the steps.
        operations: Floating-point operations, two for a multiply-accumulate; 0 where they are not products.
    """

    seconds: float
    operations: float


FORWARD: Final = "convolutions, forward"
BACKWARD: Final = "convolutions, backward"
MATRICES: Final = "matrix products of linear layers, forward and backward"


def training_parts(step: Callable[[], object], rounds: int) -> dict[str, Part]:
    """Take a training step on the CPU apart by PyTorch's own profiler.

    Args:
        step: Forward pass, backward pass and update.
        rounds: How often it is run.

    Returns:
        Kind of operator -> what it takes. The profiler's own time is not in it.
    """
    from torch.profiler import ProfilerActivity, profile
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        step()
    operations: dict[str, float] = dict.fromkeys([FORWARD, BACKWARD, MATRICES, OTHERS], 0.0)
    for operator, count in counter.get_flop_counts()["Global"].items():
        operations[_training_kind(str(operator))] += count
    found: dict[str, list[float]] = {kind: [] for kind in operations}
    for _ in range(rounds):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            step()
        seconds = dict.fromkeys(operations, 0.0)
        for event in profiler.events():
            seconds[_training_kind(event.name)] += event.self_cpu_time_total / 1e6
        for kind, values in found.items():
            values.append(seconds[kind])
    return {kind: Part(statistics.median(found[kind]), operations[kind]) for kind in operations}


def _training_kind(operator: str) -> str:
    """The kind of one of PyTorch's operators, such as ``aten::mkldnn_convolution`` or ``aten.convolution_backward``."""
    name = operator.lower()
    if "conv" in name:
        return BACKWARD if "backward" in name else FORWARD
    return MATRICES if name.replace(".", ":").rpartition(":")[2] in ("mm", "addmm", "bmm", "matmul") else OTHERS
