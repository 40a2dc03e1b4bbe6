"""One interface for everything that executes a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor

from calib.cache import Provenance
from calib.network import Network
from calib.plan import Int8Plan
from calib.subset import Subset
from calib.table import CalibrationTable
from common.config import PrecisionName
from common.macs import MacCount
from data.base import ImageSet

Outputs = tuple[Tensor, ...]
"""What a network gives, in the order of ``Network.output_names``."""


class EngineError(Exception):
    """This engine cannot run this network in this precision here: one line that says why and what to do."""


class StoppedError(EngineError):
    """An engine that has this precision stops here: a version, a library, memory, a calibration, a failed build."""


@dataclass(frozen=True)
class Compiled:
    """A network, ready to run in one precision.

    Attributes:
        engine: ``torch``, ``onnxruntime``, ``torch-tensorrt``.
        precision: ``fp32``, ``fp16`` or ``int8``.
        device: Where it runs, for people: ``CPU (2 threads)``, ``NVIDIA H200``.
        run: float32 [B, C, H, W] on the CPU -> what the network gives, on the CPU and in float32: a tensor, such as
            scores [B, classes], or a tuple of tensors (of one, where the engine always gives a tuple).
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
    run: Callable[[Tensor], Tensor | Outputs]
    size_bytes: int
    latency_note: str | None = None
    details: Mapping[str, str] = field(default_factory=dict)
    run_on_device: Callable[[Tensor], Tensor | Outputs] | None = None
    captured: Callable[[Tensor], Callable[[], Tensor | Outputs]] | None = None
    macs: MacCount | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """The output of a network that has one."""
        (output,) = self.outputs(images)
        return output

    def outputs(self, images: Tensor) -> Outputs:
        """All outputs, whether one or several."""
        return as_outputs(self.run(images))


def as_outputs(value: Tensor | Sequence[Tensor]) -> Outputs:
    """What a network gives, as a tuple."""
    return (value,) if isinstance(value, Tensor) else tuple(value)


def map_outputs(change: Callable[[Tensor], Tensor], value: Tensor | Outputs) -> Tensor | Outputs:
    """The same for each tensor that a network gives, in the form that it gives them."""
    return change(value) if isinstance(value, Tensor) else tuple(map(change, value))


@dataclass(frozen=True)
class OwnCalibration:
    """The calibration table that an engine made for itself, by its own tensor names.

    Attributes:
        table: Its names need not be those of our table.
        path: Its file, in the run's folder.
        calibrated: Whether the engine calibrated now; otherwise the file was reused and no data was touched.
        reason: Why.
        seconds: That the calibration took.
    """

    table: CalibrationTable
    path: Path
    calibrated: bool
    reason: str
    seconds: float = 0.0


class Engine(Protocol):
    """A way to execute a network; engines derive from it.

    :func:`engines.select.make_engine` makes it of an ``EngineConfig``, a ``QuantizationConfig``, the run's folder (for
    built files) and the batch sizes that will be run.

    Attributes:
        name: As in :attr:`Compiled.engine`.
        keeps_builds: Whether what it compiles is kept in that folder, and found there by the next process.
    """

    name: str
    keeps_builds: bool = False

    def unavailable(self) -> str | None:
        """Why this engine cannot be used on this machine, or None if it can."""
        ...

    def compile(self, network: Network, precision: PrecisionName, table: CalibrationTable | None) -> Compiled:
        """Make ``network`` ready to run in ``precision``.

        Args:
            network: A traced float network (``calib.tracing.trace``).
            precision: What to run it in.
            table: Scales; needed for ``int8`` alone.

        Raises:
            EngineError: not possible here; the caller lists the precision as skipped with this reason.
        """
        ...

    def own_calibration(
        self,
        network: Network,
        table: CalibrationTable,
        images: Callable[[], tuple[ImageSet, Subset]],
        provenance: Provenance,
        recalibrate: bool = False,
    ) -> OwnCalibration | None:
        """Calibrate with the engine's own calibrator, before ``compile`` runs INT8 from the table that it makes.

        Args:
            network: As ``compile`` takes it.
            table: As ``compile`` takes it.
            images: Opens the images, and the batches of them that ``table`` was made from; called only if the engine
                has to calibrate.
            provenance: What ``table`` was made from.
            recalibrate: Whether to calibrate even if the engine's table still serves.

        Returns:
            None where the engine runs INT8 from ``table``, as all do but TensorRT with implicit quantization.

        Raises:
            EngineError: not possible here.
        """
        return None


def int8_size(plan: Int8Plan) -> int:
    """Bytes of the parameters when the plan's layers store int8 weights and one float32 scale per output channel."""
    module = plan.network.module
    size = 4 * sum(parameter.numel() for parameter in module.parameters())
    for layer in plan.weighted:
        weight = module.get_parameter(f"{layer.target}.weight")
        size += 4 * weight.shape[0] - 3 * weight.numel()
    return size
