"""Torch-TensorRT: FP32, FP16 and INT8 engines, all through the TorchScript front end, so that precision alone differs.

An engine has a static shape. A network that is ready to run therefore holds one engine per batch size, each in a file
of its own under ``<run>/engines/`` and used again only for exactly what it was built from.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calib.cache import Provenance, read_provenance, weights_fingerprint
from calib.explicit import fake_quantize, place_in_front
from calib.network import Network
from calib.plan import Int8Plan, plan_int8
from calib.subset import Subset
from calib.table import CalibrationTable
from common.config import AlgorithmName, EngineConfig, PrecisionName, QuantizationConfig
from common.errors import InputError, first_line
from common.macs import MacCount
from data.base import ImageSet
from engines.base import Compiled, Engine, Outputs, OwnCalibration, map_outputs
from engines.cuda import capture
from engines.gpu import Gpu
from engines.tensorrt import build as building
from engines.tensorrt import files
from engines.tensorrt.build import Build, BuilderLog, build_engine, build_error, takes_half
from engines.tensorrt.calibration import calibrate
from engines.tensorrt.calibrator import CalibratorRun, table_calibrator
from engines.tensorrt.files import EngineRecord
from engines.tensorrt.form import for_tensorrt
from engines.tensorrt.layers import EngineLayer, executed_macs, read_layers
from engines.tensorrt.support import (
    Installed,
    Mode,
    TensorRTError,
    algorithm_problem,
    quantization_mode,
    strongly_typed,
    table_problem,
    usable,
)

logger = logging.getLogger(__name__)


class TorchTensorRTEngine(Engine):
    """Torch-TensorRT on an NVIDIA GPU.

    Args:
        config: Its options.
        quantization: How INT8 goes, and which layers stay in float.
        folder: The run's folder: engines go to ``engines/``, TensorRT's own table lies in ``tensorrt/``.
        batch_sizes: That will be run. Their engines are built by ``compile``, so that what cannot be built is known
            there and costs one precision alone. A batch from the CPU of another size is padded to one of these where
            it fits.
    """

    name = "torch-tensorrt"
    keeps_builds = True

    def __init__(
        self,
        config: EngineConfig,
        quantization: QuantizationConfig,
        folder: Path,
        batch_sizes: Sequence[int] = (1,),
    ) -> None:
        self._config = config
        self._quantization = quantization
        self._folder = folder
        self._batch_sizes = tuple(batch_sizes)

    def unavailable(self) -> str | None:
        """Why TensorRT cannot be used on this machine, or None."""
        try:
            usable(self._config.device)
        except TensorRTError as error:
            return str(error)
        return None

    def mode(self, algorithm: AlgorithmName) -> tuple[Mode, str]:
        """Which way INT8 goes here, and why.

        Args:
            algorithm: Of the calibration.

        Raises:
            TensorRTError: what was asked for is not possible here.
        """
        _, installed, _ = usable(self._config.device)
        return self._mode(installed, algorithm)

    def _mode(self, installed: Installed, algorithm: AlgorithmName) -> tuple[Mode, str]:
        needs = algorithm_problem(algorithm)
        if self._quantization.keep_fp:
            needs = f"{', '.join(self._quantization.keep_fp)} kept in float"
        elif self._quantization.quantize_output:
            needs = "the output quantized"
        return quantization_mode(self._quantization.mode, installed, needs, self._config.dla_core is not None)

    def compile(self, network: Network, precision: PrecisionName, table: CalibrationTable | None) -> Compiled:
        """See :meth:`engines.base.Engine.compile`."""
        torch_tensorrt, installed, gpu = usable(self._config.device)
        job = self._job(torch_tensorrt, installed, network, precision, table)
        engines = Engines(job, torch_tensorrt, installed, gpu, self._folder / "engines", self._batch_sizes)
        if network.input_shape is not None:
            for size in self._batch_sizes:
                engines.try_once((size, *network.input_shape))
        counts = engines.macs()
        details = {**job.details, **{f"engine of batch {size}": count.summary() for size, count in counts.items()}}
        details["TF32"] = "allowed" if self._config.tf32 else "off"
        if self._config.dla_core is not None and job.build.dla_core is None:
            details["DLA"] = "none: a DLA core does not compute in FP32, this runs on the GPU"
        graphs = self._config.cuda_graphs
        return Compiled(
            engine=self.name,
            precision=precision,
            device=gpu.name if job.build.dla_core is None else f"{gpu.name}, DLA core {job.build.dla_core}",
            run=engines.on_cpu,
            run_on_device=engines.on_device,
            captured=(lambda images: capture(engines.on_device, images)) if graphs else None,
            size_bytes=engines.size_bytes,
            details={
                "TensorRT": installed.tensorrt,
                "Torch-TensorRT": installed.torch_tensorrt,
                **details,
                "CUDA graphs": "the engine replayed, for its latency" if graphs else "none",
            },
            macs=counts[max(counts)] if counts else None,
        )

    def own_calibration(
        self,
        network: Network,
        table: CalibrationTable,
        images: Callable[[], tuple[ImageSet, Subset]],
        provenance: Provenance,
        recalibrate: bool = False,
    ) -> OwnCalibration | None:
        """See :meth:`engines.base.Engine.own_calibration`: TensorRT's own, where INT8 is implicit."""
        # The table's own, as ``compile`` asks for it, whatever the configuration says.
        algorithm: AlgorithmName = table.algorithm
        mode, why = self.mode(algorithm)
        logger.info("INT8 through TensorRT is %s: %s", mode, why)
        if mode == "explicit":
            return None
        path = self._own_table_path(network)
        provenance = replace(provenance, algorithm=algorithm)
        own = calibrate(network, images, path, provenance, self._config, recalibrate)
        if own.calibrated:
            logger.info("TensorRT calibrated in %.3f s and wrote %s", own.seconds, path)
        else:
            logger.info("using TensorRT's cached table: %s", own.reason)
        return own

    def _own_table_path(self, network: Network) -> Path:
        return self._folder / "tensorrt" / f"CalibrationTable{network.name}"

    def _job(
        self,
        torch_tensorrt: ModuleType,
        installed: Installed,
        network: Network,
        precision: PrecisionName,
        table: CalibrationTable | None,
    ) -> Job:
        build = Build.of(self._config, precision)
        if precision != "int8":
            return Job(network.name, precision, network.module, build, takes_half(installed, build))
        if table is None:
            raise TensorRTError("INT8 needs a calibration table: run quantize.py --precision int8")
        mode, why = self._mode(installed, table.algorithm)
        details = {"quantization": f"{mode} ({why})"}
        plan = plan_int8(network, table, self._quantization.keep_fp, self._quantization.quantize_output)
        if mode == "explicit":
            if self._config.int8_fp16 and strongly_typed(installed):
                raise TensorRTError(
                    f"TensorRT {installed.tensorrt} has no flag for FP16 layers in an INT8 engine: "
                    "leave --engine.int8_fp16 out"
                )
            plan = for_tensorrt(plan)
            details["int8 layers"] = ", ".join(layer.name for layer in network.layers if layer.name in plan.layers)
            content = table.dumps().encode()
            module = fake_quantize(plan, place_in_front(plan))
            return Job(network.name, "int8-explicit", module, build, False, content, None, details, plan)
        path = self._own_table_path(network)
        content = self._own_table(path, network, table.algorithm, installed)

        def calibrator() -> CalibratorRun:
            device = building.gpu_device(self._config.device)
            return table_calibrator(torch_tensorrt, path, table.algorithm, device)

        return Job(network.name, "int8-implicit", network.module, build, False, content, calibrator, details, plan)

    @staticmethod
    def _own_table(path: Path, network: Network, algorithm: AlgorithmName, installed: Installed) -> bytes:
        """The bytes of the table that TensorRT wrote, if it can be given to it again for this network."""
        again = "run quantize.py --precision int8 --engine torch-tensorrt"
        if not path.exists():
            raise TensorRTError(f"TensorRT has not calibrated {network.name} yet: {again}")
        try:
            problem = table_problem(CalibrationTable.read(path), algorithm, installed.tensorrt)
            provenance = read_provenance(path)
        except InputError as error:
            raise TensorRTError(f"TensorRT's calibration table cannot be used ({error}): {again}") from error
        if problem is None and (provenance is None or provenance.weights != weights_fingerprint(network.module)):
            problem = "its table is of other weights"
        if problem:
            raise TensorRTError(f"TensorRT has to calibrate {network.name} again ({problem}): {again}")
        return path.read_bytes()


@dataclass(frozen=True)
class Job:
    """What one precision is built from.

    Attributes:
        network: Name of the network.
        label: ``fp32``, ``fp16``, ``int8-implicit`` or ``int8-explicit``.
        module: What TensorRT is given.
        build: Options.
        half: Whether the built module takes and gives float16.
        table: Bytes of the calibration table; empty without one.
        calibrator: Makes the calibrator of one build, for implicit INT8.
        details: For the report.
        plan: What is to run in INT8, of the network that ``module`` computes; the layers that did are counted.
    """

    network: str
    label: str
    module: nn.Module
    build: Build
    half: bool
    table: bytes = b""
    calibrator: Callable[[], CalibratorRun] | None = None
    details: dict[str, str] = field(default_factory=dict)
    plan: Int8Plan | None = None


class Engines:
    """The engines of one network in one precision: one per input shape, built or loaded when first needed.

    Args:
        job: What they are built from.
        torch_tensorrt: The module.
        installed: The versions.
        gpu: Where they run.
        folder: Of the engine files.
        batch_sizes: That will be run.
    """

    def __init__(
        self,
        job: Job,
        torch_tensorrt: ModuleType,
        installed: Installed,
        gpu: Gpu,
        folder: Path,
        batch_sizes: Sequence[int],
    ) -> None:
        self._job = job
        self._torch_tensorrt = torch_tensorrt
        self._installed = installed
        self._gpu = gpu
        self._folder = folder
        self._sizes = set(batch_sizes)
        self._device = building.gpu_device(gpu.index)
        self._weights = _fingerprint(job.module)
        self._modules: dict[tuple[int, ...], Any] = {}
        self._files: list[Path] = []
        self._layers: dict[int, list[EngineLayer]] = {}

    def macs(self) -> dict[int, MacCount]:
        """Batch size -> what its engine multiplies in INT8 and in float, where its builder told."""
        plan = self._job.plan
        if plan is None:
            return {}
        counts = {
            size: executed_macs(plan, layers, f"as TensorRT's engine of batch {size} executes it")
            for size, layers in sorted(self._layers.items())
        }
        return {size: count for size, count in counts.items() if count is not None}

    @property
    def size_bytes(self) -> int:
        """Size of the first engine's file; of the float32 weights where none is built yet."""
        if self._files:
            return self._files[0].stat().st_size
        return sum(item.numel() * item.element_size() for item in self._job.module.parameters())

    def try_once(self, shape: tuple[int, ...]) -> None:
        """Build or load the engine for inputs of ``shape``, and run it on zeros: a full GPU may show only then.

        Raises:
            TensorRTError: it cannot be built, or does not run.
            InputError: its file cannot be written.
        """
        self.module(shape)
        self.on_cpu(torch.zeros(shape))

    def on_device(self, images: Tensor) -> Tensor | Outputs:
        """float32 [B, C, H, W] on the GPU -> what the network gives, float32, there; builds for exactly this B.

        The GPU must be the current device.
        """
        module = self.module(tuple(images.shape))
        with torch.no_grad():
            return map_outputs(Tensor.float, module(images.half())) if self._job.half else module(images)

    def on_cpu(self, images: Tensor) -> Tensor | Outputs:
        """float32 [B, C, H, W] on the CPU -> what the network gives there; an odd B is padded to one that is built for.

        Raises:
            TensorRTError: the engine cannot be built, or does not run, as where the GPU has too little memory.
        """
        count = len(images)
        larger = [size for size in self._sizes if size >= count]
        padded = min(larger, default=count)
        batch = F.pad(images, (0, 0, 0, 0, 0, 0, 0, padded - count)) if padded > count else images
        try:
            with on(self._device):
                return map_outputs(lambda output: output[:count].cpu(), self.on_device(batch.to(self._device)))
        except torch.cuda.OutOfMemoryError as error:
            raise TensorRTError(
                f"{self._gpu.name} has too little free memory for a batch of {padded}: take smaller batches"
            ) from error
        except RuntimeError as error:  # of TensorRT's runtime and of CUDA
            raise TensorRTError(f"TensorRT does not run its engine of batch {padded}: {build_error(error)}") from error

    def module(self, shape: tuple[int, ...]) -> Any:
        """The engine for inputs of ``shape``: held, loaded, or built and stored.

        Raises:
            TensorRTError: it cannot be built.
            InputError: its file cannot be written.
        """
        if shape not in self._modules:
            with on(self._device):
                self._modules[shape] = self._load_or_build(shape)
            self._sizes.add(shape[0])
        return self._modules[shape]

    def _load_or_build(self, shape: tuple[int, ...]) -> Any:
        record = self._record(shape)
        path = record.file(self._folder, self._gpu.name, self._installed.tensorrt)
        reason = files.why_build(path, record)
        if reason is None:
            try:
                with self._torch_tensorrt.logging.errors():
                    module = torch.jit.load(str(path), map_location=self._device)
            except RuntimeError as error:
                reason = f"the engine's file cannot be loaded: {first_line(error)}"
            else:
                logger.info("using the engine %s", path)
                self._files.append(path)
                self._layers[shape[0]] = files.read_record(path).layers
                return module
        logger.info("building %s: %s", path.name, reason)
        start = time.perf_counter()
        log = BuilderLog() if self._job.plan is not None else None
        module = self._build(shape, log)
        if log is not None:
            record = replace(record, layers=read_layers(log.text))
        files.store(path, record, lambda target: torch.jit.save(module, target))
        logger.info("  built in %.1f s", time.perf_counter() - start)
        self._files.append(path)
        self._layers[shape[0]] = record.layers
        return module

    def _build(self, shape: tuple[int, ...], log: BuilderLog | None) -> Any:
        job = self._job
        run = job.calibrator() if job.calibrator else None
        try:
            return build_engine(
                self._torch_tensorrt,
                self._installed,
                job.module,
                shape,
                job.build,
                run.calibrator if run else None,
                self._device,
                log,
            )
        finally:
            if run:
                run.check()  # what a callback raised is the cause, or a table that was not accepted

    def _record(self, shape: tuple[int, ...]) -> EngineRecord:
        build = {name: str(value) for name, value in asdict(self._job.build).items()}
        build["precisions"] = ", ".join(sorted(self._job.build.precisions))
        return EngineRecord(
            network=self._job.network,
            precision=self._job.label,
            shape=list(shape),
            weights=self._weights,
            table=hashlib.sha256(self._job.table).hexdigest() if self._job.table else "",
            build=build,
            gpu=f"{self._gpu.name}, compute capability {'.'.join(map(str, self._gpu.capability))}",
            versions=asdict(self._installed),
        )


def _fingerprint(module: nn.Module) -> str:
    """Hex digest of a module's weights and operations."""
    operations = str(getattr(module, "code", "")) + repr(module)
    return hashlib.sha256(f"{weights_fingerprint(module)}\n{operations}".encode()).hexdigest()


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
