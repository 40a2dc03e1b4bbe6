"""The ONNX files of a run: written with a table that names all of their values, and those that are stale."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from calib.calibrator import algorithm_options
from calib.network import INPUT, Network
from calib.onnx.calibrate import complete_table
from calib.onnx.source import Batches
from calib.plan import plan_int8
from calib.subset import SubsetImages
from calib.table import CalibrationTable
from common.config import Config
from common.errors import InputError
from common.run import Run
from engines.onnx.export import export

logger = logging.getLogger(__name__)


def write_files(
    network: Network,
    table: CalibrationTable | None,
    run: Run,
    provenance: Mapping[str, str],
    subset: Callable[[], SubsetImages],
    config: Config,
    any_size: bool = False,
) -> tuple[Path, ...]:
    """Write what ``--export onnx`` writes: the float network and, with a table, its INT8 forms and its own table.

    Without one, the INT8 files of the run that are of other weights are named in a warning.

    Args:
        network: Traced with an ``input_shape``.
        table: The calibration table; None for the float network alone.
        run: Whose folder gets the files.
        provenance: Stored as the files' metadata; ``weights`` is the fingerprint of the checkpoint's.
        subset: Opens the data and gives the images that complete the table.
        config: Which layers stay in float, and the parameters of the algorithm.
        any_size: Whether height and width of the images are left free.

    Raises:
        InputError: as :func:`engines.onnx.export.export` does.
    """
    if table is None:
        written = export(network, None, None, run, provenance, any_size=any_size)
        _warn_of_stale(stale_files(run, network.name, provenance["weights"]))
        return tuple(written.files)
    quantization, calibration = config.quantization, config.calibration
    plan = plan_int8(network, table, quantization.keep_fp, quantization.quantize_output)
    provenance = {**provenance, "calibration": table.header, "algorithm": table.algorithm}
    # The table may be another run's, of another algorithm.
    options = algorithm_options(calibration) if calibration.algorithm == table.algorithm else None
    complete = _completer(subset, table.algorithm, options)
    return tuple(export(network, plan, table, run, provenance, complete, any_size).files)


def stale_files(run: Run, network: str, weights: str) -> list[Path]:
    """The INT8 ONNX files of the run that do not say that they hold ``weights``.

    Args:
        run: Whose folder has the files, if any.
        network: Name of its network.
        weights: Fingerprint of the checkpoint's.
    """
    stale = []
    for precision in ("int8", "int8_cpu"):
        path = run.onnx(network, precision)
        try:
            model = onnx.load(path, load_external_data=False)
        except FileNotFoundError:
            continue
        except (OSError, DecodeError):  # no file of this export either
            stale.append(path)
            continue
        if {entry.key: entry.value for entry in model.metadata_props}.get("weights") != weights:
            stale.append(path)
    return stale


def _warn_of_stale(stale: Sequence[Path]) -> None:
    if stale:
        logger.warning(
            "%s stale, exported from other weights: run quantize.py --export onnx for INT8 again, or remove %s",
            f"{stale[0]} is" if len(stale) == 1 else f"{' and '.join(map(str, stale))} are",
            "it" if len(stale) == 1 else "them",
        )


def _completer(
    subset: Callable[[], SubsetImages], algorithm: str, options: Mapping[str, float] | None
) -> Callable[[Path], CalibrationTable] | None:
    """What calibrates an exported file over the subset; None where the images are not there, although a table is."""
    try:
        images = subset()
    except InputError as error:
        logger.warning("what only the ONNX file names takes another tensor's scale in its table: %s", error)
        return None
    sizes = tuple(len(positions) for positions in images.subset.batches)

    def load(begin: int, end: int) -> dict[str, Any]:
        return {INPUT: images.between(begin, end).numpy()}

    batches = Batches(sum(sizes), sizes, load)
    return lambda path: complete_table(path, batches, algorithm, options)
