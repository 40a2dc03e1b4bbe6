"""The ONNX files that are written: float and INT8 forms of a network, and the table that names their values.

The graphs are made by :mod:`engines.onnx.float` and :mod:`engines.onnx.int8`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from calib.network import INPUT, Network
from calib.onnx.external import LARGEST_HELD, loadable, weights_beside, write_network
from calib.onnx.model import without_weights
from calib.plan import Int8Plan
from calib.table import CalibrationTable
from common.errors import InputError, first_line
from common.run import Run
from engines.base import as_outputs
from engines.onnx.float import float_model, overwritten_as, value_names
from engines.onnx.int8 import int8_model
from engines.onnx.sizes import check_size_is_free, free_size

_PROJECT: Final = "int8-workflow"
_LONGEST_REASON: Final = 200

_TOLERANCE: Final = 1e-2
"""Of the largest output: far more than float32 rounds, far less than another operation would change."""

_SMALL: Final = 1e-3
"""A largest output below this may be what is left of larger sums, and their rounding."""


@dataclass(frozen=True)
class Exported:
    """What :func:`export` wrote.

    Attributes:
        fp32: The float network.
        int8: The network with explicit quantization, or None.
        int8_cpu: The same for ONNX Runtime on a CPU, or None.
        table: The table for tools that match it to ``fp32`` by name, or None.
    """

    fp32: Path
    int8: Path | None = None
    int8_cpu: Path | None = None
    table: Path | None = None

    @property
    def files(self) -> list[Path]:
        """All that were written, with the weights of networks above 2 GiB, which lie beside them."""
        networks = [path for path in (self.fp32, self.int8, self.int8_cpu) if path is not None]
        beside = [path for path in map(weights_beside, networks) if path.exists()]
        return [*networks, *beside, *([self.table] if self.table else [])]


def export(
    network: Network,
    plan: Int8Plan | None,
    table: CalibrationTable | None,
    run: Run,
    provenance: Mapping[str, str],
    calibrated: Callable[[Path], CalibrationTable] | None = None,
    any_size: bool = False,
) -> Exported:
    """Write everything that ``--export onnx`` writes, each file atomically.

    Args:
        network: Traced with an ``input_shape``.
        plan: Which layers run in INT8; None for the float file alone.
        table: The table that ``plan`` was made from; None for the float file alone.
        run: Whose folder gets the files.
        provenance: Stored as the files' metadata.
        calibrated: Calibrates the float file itself, which has values that ``table`` does not name.
        any_size: Whether height and width of the images are left free.

    Raises:
        InputError: the network cannot be exported, or takes no other size, or a file cannot be written.
    """
    fp32 = run.onnx(network.name, "fp32")
    model = export_fp32(network, fp32, provenance, any_size)
    if plan is None or table is None:
        return Exported(fp32)
    beside = run.onnx_table(network.name)
    onnx_table(network, table, model, calibrated(fp32) if calibrated else None).write(beside)
    del model  # of many weights, before others like it are made
    int8, int8_cpu = run.onnx(network.name, "int8"), run.onnx(network.name, "int8_cpu")
    export_int8(plan, int8, provenance, any_size=any_size)
    export_int8(plan, int8_cpu, provenance, for_cpu=True, any_size=any_size)
    return Exported(fp32, int8, int8_cpu, beside)


def export_fp32(
    network: Network,
    path: str | Path,
    provenance: Mapping[str, str] | None = None,
    any_size: bool = False,
    largest: int = LARGEST_HELD,
) -> onnx.ModelProto:
    """Write the float network to ``path`` as ONNX, atomically.

    Args:
        network: Traced with an ``input_shape``.
        path: Replaced if it is there.
        provenance: Stored as the model's metadata.
        any_size: Whether height and width of the images are left free.
        largest: Bytes of weights above which they go into a file of their own beside it, ``<path>.data``.

    Returns:
        What the file holds.

    Raises:
        InputError: the network cannot be exported, or takes no other size, or the file cannot be written.
    """
    model = float_model(network)
    if any_size:
        free_size(model)
        check_size_is_free(network, model)
    _write(model, network, Path(path), provenance or {}, network.module, largest)
    return model


def export_int8(
    plan: Int8Plan,
    path: str | Path,
    provenance: Mapping[str, str] | None = None,
    for_cpu: bool = False,
    any_size: bool = False,
    largest: int = LARGEST_HELD,
) -> None:
    """Write the network with explicit quantization to ``path`` as ONNX, atomically.

    Args:
        plan: Which layers run in INT8; of a network traced with an ``input_shape``.
        path: Replaced if it is there.
        provenance: Stored as the model's metadata.
        for_cpu: See :func:`engines.onnx.int8.int8_model`.
        any_size: Whether height and width of the images are left free, as :func:`export_fp32` tries it.
        largest: As :func:`export_fp32` takes it.

    Raises:
        InputError: the network cannot be exported, or the file cannot be written.
    """
    model = int8_model(plan, for_cpu, any_size=any_size)
    if any_size:
        free_size(model)
    _write(model, plan.network, Path(path), provenance or {}, largest=largest)


def _write(
    model: onnx.ModelProto,
    network: Network,
    path: Path,
    provenance: Mapping[str, str],
    module: nn.Module | None = None,
    largest: int = LARGEST_HELD,
) -> None:
    """Write a model that the checker accepts and that, where ONNX Runtime is installed, runs.

    Args:
        model: The network, as it is written.
        network: What it was exported from.
        path: The file.
        provenance: Stored as the model's metadata.
        module: What the model must compute, within what float32 rounds; None where nothing in float says.
        largest: Bytes of weights above which they go into a file beside it.
    """
    onnx.helper.set_model_props(model, dict(provenance))
    model.producer_name = _PROJECT
    with contextlib.suppress(PackageNotFoundError):
        model.producer_version = version(_PROJECT)
    try:
        onnx.checker.check_model(without_weights(model), full_check=True)
    except Exception as error:  # those of the checker and of shape inference have no base class of their own
        raise InputError(f"{path} is not written: {' '.join(str(error).split())[:_LONGEST_REASON]}") from error
    assert network.input_shape is not None  # the export has asked for it
    # Two, since some exports fix that there is one.
    number = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value or 2
    images = torch.rand(number, *network.input_shape, generator=torch.Generator().manual_seed(0))
    try:
        found = _run_once(model, images.numpy(), largest)
    except Exception as error:  # what ONNX Runtime raises has no base class of its own
        raise InputError(f"{path} is not written, since ONNX Runtime does not run it: {first_line(error)}") from error
    if module is not None and found and not _agree(found, module, images):
        raise InputError(
            f"{path} is not written, since it computes something else than the network: PyTorch's exporter gets one of "
            "the operations wrong; quantize a part of the network without it"
        )
    write_network(path, model, largest)


def _run_once(model: onnx.ModelProto, images: NDArray[np.float32], largest: int) -> list[Any]:
    """Run a model: an operator that no kernel takes as it is shows neither before nor while loading.

    Returns:
        Its outputs; none where ONNX Runtime is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        return []
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4  # errors are raised as well
    # A second copy of the weights, in the order that the kernels like, takes longer than one run gains.
    options.add_session_config_entry("session.disable_prepacking", "1")
    with loadable(model, largest) as source:
        session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {INPUT: images}))


def _agree(found: list[Any], module: nn.Module, images: Tensor) -> bool:
    """Whether a file's outputs are a network's, but for what rounding makes of them."""
    with torch.inference_mode():
        expected = module(images)
    for value, reference in zip(found, as_outputs(expected), strict=True):
        if value.shape != tuple(reference.shape):
            return False
        if not reference.is_floating_point() or not reference.numel():
            continue
        largest = float(reference.abs().max())
        most = _TOLERANCE * max(largest, _SMALL)
        if math.isfinite(largest) and not (np.abs(value - reference.numpy()) <= most).all():
            return False
    return True


def onnx_table(
    network: Network, table: CalibrationTable, model: onnx.ModelProto, observed: CalibrationTable | None = None
) -> CalibrationTable:
    """The calibration table, with an entry for those values of the ONNX file that have none of their own.

    TensorRT runs a layer in INT8 from a table only if every tensor that it reads and writes has an entry. What
    ``table`` does not name has the entry of ``observed``, which is TensorRT's. Without one, a reshaped value takes its
    tensor's scale, and a value that an in-place ReLU overwrites that of what overwrites it: TensorRT merges the ReLU
    into the layer before it.

    Args:
        network: What ``table`` was made for.
        table: The calibration table.
        model: The network as :func:`engines.onnx.float.float_model` exports it.
        observed: Made from the ONNX file itself.
    """
    values = {value.name for value in model.graph.input} | {name for node in model.graph.node for name in node.output}
    shared = {}
    for node, name in value_names(network).items():
        tensor = network.tensor_of.get(node) or overwritten_as(network, node)
        if name in values and tensor in table.scales:
            shared[name] = table.scales[tensor]
    own = {name: scale for name, scale in shared.items() if name in table.scales}
    scales = {**(observed.scales if observed else {}), **own}
    return dataclasses.replace(table, scales={**scales, **{k: v for k, v in shared.items() if k not in scales}})
