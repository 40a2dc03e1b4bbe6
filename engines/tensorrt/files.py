"""Built TensorRT engines on disk: their names, what each was built from, and when one may be used again."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from common import side_file
from common.errors import InputError
from common.files import atomic_path
from engines.tensorrt.layers import EngineLayer

FORMAT = 1


@dataclass(frozen=True)
class EngineRecord:
    """What an engine was built from: the content of its side file ``<engine>.json``.

    Attributes:
        network: Name of the network.
        precision: ``fp32``, ``fp16``, ``int8-implicit`` or ``int8-explicit``.
        shape: [B, C, H, W] that the engine takes.
        weights: Fingerprint of the module that TensorRT was given, weights and operations.
        table: SHA-256 of the calibration table; empty without one.
        build: Options of the build.
        gpu: Name and compute capability.
        versions: Of torch, Torch-TensorRT and TensorRT.
        layers: Of the engine, as its builder listed them; none where that was not asked for.
        engine: SHA-256 of the engine's file, so that the two cannot drift apart.
        format: Of this file.
    """

    network: str
    precision: str
    shape: list[int]
    weights: str
    table: str
    build: dict[str, str]
    gpu: str
    versions: dict[str, str]
    layers: list[EngineLayer] = field(default_factory=list)
    engine: str = ""
    format: int = field(default=FORMAT)

    def file(self, folder: Path, gpu: str, tensorrt: str) -> Path:
        """Where this engine lies in ``folder``; ``gpu`` and ``tensorrt`` are the names that its file shows."""
        return folder / engine_file(self.network, self.precision, self.shape[0], gpu, tensorrt)


def engine_file(network: str, precision: str, batch_size: int, gpu: str, tensorrt: str) -> str:
    """Name of an engine's file: ``LeNet_int8-implicit_b32_NVIDIA-H200_trt10.12.0.36.ts``.

    Args:
        network: Name of the network.
        precision: ``fp32``, ``fp16``, ``int8-implicit`` or ``int8-explicit``.
        batch_size: Images per batch; the engine takes no other.
        gpu: Name of the GPU that it was built on.
        tensorrt: Version that built it.
    """
    parts = (network, precision, f"b{batch_size}", gpu, f"trt{tensorrt}")
    return "_".join(re.sub(r"[^A-Za-z0-9.-]+", "-", part).strip("-.") for part in parts) + ".ts"


def read_record(engine: Path) -> EngineRecord:
    """The side file of ``engine``.

    Raises:
        InputError: there is none, or it is damaged or of another format.
    """
    record = side_file.read_record(EngineRecord, side_file.side_file(engine), FORMAT, "build the engine again")
    if record is None:
        raise InputError(f"{engine.name} has no side file")
    return record


def why_build(engine: Path, wanted: EngineRecord) -> str | None:
    """Why the file ``engine`` cannot be used for ``wanted``, or None if it is exactly that."""
    if not engine.exists():
        return "there is no such engine yet"
    try:
        recorded = read_record(engine)
    except InputError as error:
        return f"nothing tells what the engine there was built from: {error}"
    if changed := side_file.changes(recorded, wanted, apart=("engine", "layers")):
        return f"changed since the engine was built: {', '.join(changed)}"
    if recorded.engine != side_file.digest(engine):
        return "the engine's file is not the one that was written"
    return None


def store(engine: Path, record: EngineRecord, save: Callable[[str], None]) -> None:
    """Write an engine with ``save``, then its side file, each atomically."""
    with atomic_path(engine) as temporary:
        save(str(temporary))
    side_file.write_side_file(engine, record, "engine")
