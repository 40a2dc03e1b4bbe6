"""Making an engine by its name, and choosing the one that runs here."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from calib.cache import Provenance
from calib.network import Network
from calib.subset import Subset, SubsetImages
from calib.table import CalibrationTable
from common.config import EngineConfig, EngineName, PrecisionName, QuantizationConfig
from common.errors import InputError
from data.base import ImageSet
from engines import ENGINES
from engines.base import Compiled, Engine, EngineError, OwnCalibration

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SelectedEngine:
    """The engine that runs, and why it is this one.

    Attributes:
        engine: It can be used on this machine.
        reason: For the log and the report.
        fallback: What runs a precision that the engine cannot; None where the engine was asked for by name.
    """

    engine: Engine
    reason: str
    fallback: Engine | None = None

    def compile(self, network: Network, precision: PrecisionName, table: CalibrationTable | None) -> Compiled:
        """Compile by the engine, or by the fallback with a notice; as :meth:`engines.base.Engine.compile`."""
        try:
            return self.engine.compile(network, precision, table)
        except EngineError as error:
            if self.fallback is None:
                raise
            compiled = self.fallback.compile(network, precision, table)
            logger.warning("%s runs on %s: %s", precision.upper(), self.fallback.name, error)
            note = f"run by {self.fallback.name}, since {error}"
            return dataclasses.replace(
                compiled,
                latency_note=f"{compiled.latency_note}; {note}" if compiled.latency_note else None,
                details={**compiled.details, f"why not {self.engine.name}": str(error)},
            )

    def prepare(self, network: Network, precision: PrecisionName, table: CalibrationTable | None) -> Compiled:
        """Compile the precision that was asked for.

        Raises:
            InputError: the engine cannot run it.
        """
        try:
            return self.compile(network, precision, table)
        except EngineError as error:
            raise InputError(f"{self.engine.name} cannot prepare {precision}: {error}") from error

    def own_calibration(
        self,
        network: Network,
        table: CalibrationTable,
        subset: Callable[[], SubsetImages],
        wanted: Provenance,
        recalibrate: bool = False,
    ) -> OwnCalibration | None:
        """As :meth:`engines.base.Engine.own_calibration`, from the images that ``subset`` opens.

        Raises:
            InputError: the engine cannot calibrate.
        """

        def images() -> tuple[ImageSet, Subset]:
            drawn = subset()
            return drawn.source, drawn.subset

        try:
            return self.engine.own_calibration(network, table, images, wanted, recalibrate)
        except EngineError as error:
            raise InputError(str(error)) from error


def make_engine(
    name: EngineName,
    config: EngineConfig,
    quantization: QuantizationConfig,
    folder: Path,
    batch_sizes: Sequence[int] = (1,),
) -> Engine:
    """Make an engine by name, whether or not it can be used here (``Engine.unavailable`` tells).

    Args:
        name: Any but ``auto``.
        config: Its options.
        quantization: Which layers an INT8 network keeps in float, and how it is quantized.
        folder: The run's folder, for built engines.
        batch_sizes: That will be run; TensorRT builds an engine for each.
    """
    module, _, kind = ENGINES[name].partition(":")
    engine: Engine = getattr(import_module(module), kind)(config, quantization, folder, batch_sizes)
    return engine


def select_engine(
    config: EngineConfig, quantization: QuantizationConfig, folder: Path, batch_sizes: Sequence[int] = (1,)
) -> SelectedEngine:
    """Choose the engine: the one named, else the last of :data:`engines.ENGINES` that can run here.

    Args:
        config: Its ``name`` is the choice.
        quantization: As :func:`make_engine` takes it.
        folder: The run's folder.
        batch_sizes: As :func:`make_engine` takes them.

    Raises:
        InputError: an engine was named that cannot be used on this machine.
    """

    def make(name: EngineName) -> Engine:
        return make_engine(name, config, quantization, folder, batch_sizes)

    if config.name != "auto":
        engine = make(config.name)
        reason = engine.unavailable()
        if reason is not None:
            raise InputError(f"engine {config.name} cannot be used here: {reason}; take --engine auto")
        return SelectedEngine(engine, "asked for by name")
    return _first_available(make)


def _first_available(make: Callable[[EngineName], Engine]) -> SelectedEngine:
    passed: list[str] = []
    always, *preferred = ENGINES
    for name in reversed(preferred):
        engine = make(name)
        reason = engine.unavailable()
        if reason is None:
            return SelectedEngine(engine, "; ".join(["the first that can run here", *passed]), make(always))
        passed.append(f"not {name}: {reason}")
    return SelectedEngine(make(always), "; ".join(["always available", *passed]))
