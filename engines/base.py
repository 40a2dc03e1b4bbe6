"""One interface for everything that executes a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from calib.graph import Int8Plan, Network
from calib.table import CalibrationTable
from common.config import PrecisionName
from common.macs import MacCount


class EngineError(Exception):
    """This engine cannot run this network in this precision here: one line that says why and what to do."""


@dataclass(frozen=True)
class Compiled:
    """A network, ready to run in one precision.

    Attributes:
        engine: ``torch``, ``onnxruntime``, ``torch-tensorrt``.
        precision: ``fp32``, ``fp16`` or ``int8``.
        device: Where it runs, for people: ``CPU (2 threads)``, ``NVIDIA H200``.
        run: float32 [B, C, H, W] on the CPU -> float32 [B, classes] on the CPU, probabilities.
        size_bytes: Size of what would be deployed: the weights in this precision, or the engine's file.
        latency_note: Why its latency says nothing about this precision (``simulated``, ...), or None if it does.
        details: What a reader may want to know, such as the kernels that were chosen.
        run_on_device: The same on tensors that lie on the GPU already, without a copy; None off a GPU.
        captured: The same as a CUDA graph: takes an input on the GPU, and gives a function that replays the network
            on whatever lies in that input and returns the output's buffer, which the next replay overwrites. None
            where the network is not replayed.
        macs: What it multiplies in INT8 and in float, where the engine shows it; None elsewhere.
    """

    engine: str
    precision: PrecisionName
    device: str
    run: Callable[[Tensor], Tensor]
    size_bytes: int
    latency_note: str | None = None
    details: Mapping[str, str] = field(default_factory=dict)
    run_on_device: Callable[[Tensor], Tensor] | None = None
    captured: Callable[[Tensor], Callable[[], Tensor]] | None = None
    macs: MacCount | None = None

    def __call__(self, images: Tensor) -> Tensor:
        return self.run(images)


class Engine(Protocol):
    """A way to execute a network."""

    name: str

    def unavailable(self) -> str | None:
        """Why this engine cannot be used on this machine, or None if it can."""
        ...

    def compile(self, network: Network, precision: PrecisionName, table: CalibrationTable | None) -> Compiled:
        """Make ``network`` ready to run in ``precision``.

        Args:
            network: A traced float network (``calib.graph.trace``).
            precision: What to run it in.
            table: Scales; needed for ``int8`` alone.

        Raises:
            EngineError: not possible here; the caller lists the precision as skipped with this reason.
        """
        ...


def int8_size(plan: Int8Plan) -> int:
    """Bytes of the parameters when the plan's layers store int8 weights and one float32 scale per output channel."""
    module = plan.network.module
    size = 4 * sum(parameter.numel() for parameter in module.parameters())
    for layer in plan.weighted:
        weight = module.get_parameter(f"{layer.target}.weight")
        size += 4 * weight.shape[0] - 3 * weight.numel()
    return size
