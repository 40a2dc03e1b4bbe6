"""The upstream ``torch_tensorrt.ts.ptq.DataLoaderCalibrator``, with what it leaves to its caller.

Read in its source (py/torch_tensorrt/ts/ptq.py at v2.8.0) and in the C++ that calls it
(py/torch_tensorrt/csrc/torch_tensorrt_py.cpp):

- its callbacks run inside ``noexcept`` C++ functions, so that an exception there ends the process: each callback is
  wrapped, the exception is kept, and raised again once ``compile`` has returned;
- a batch that is a list has every element's address returned, labels too: it is given images alone;
- it takes the end of the data from ``len(dataset)`` and runs past a sampler that gives fewer: it is given a Subset and
  full batches;
- it returns bare addresses and lets go of what lies there: the batches and the bytes of a table are kept here;
- it writes the table in place: it is given a temporary path.

The module ``torch_tensorrt`` is an argument here: only ``support.load`` imports it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data import Subset as DatasetSubset

from calib.algorithms import ALGORITHMS
from calib.subset import Subset
from calib.table import CalibrationTable, Legacy
from common.config import AlgorithmName
from data.base import ImageSet
from engines.tensorrt.support import TENSORRT_ALGORITHMS, TensorRTError, algorithm_problem


class _Batches(Dataset[Tensor]):
    """Images alone, whole batches at a time (``__getitems__`` is what a DataLoader asks for a batch)."""

    def __init__(self, source: ImageSet) -> None:
        self._source = source

    def __getitem__(self, index: int) -> Tensor:
        return self._source.images(torch.tensor([index]))[0]

    def __getitems__(self, indices: list[int]) -> Tensor:
        return self._source.images(torch.tensor(indices))


@dataclass
class CalibratorRun:
    """A calibrator for one compile, and what must live as long as that.

    Attributes:
        calibrator: The upstream object, for ``torch_tensorrt.compile(calibrator=...)``.
        table: Where it writes, or reads with ``use_cache``.
        expected: Batches that it has to give.
        given: Batches that it gave.
        written: Whether TensorRT handed it a table.
        batches: Every device batch: TensorRT holds nothing but their addresses.
        cache: The bytes of the table that was read: TensorRT holds nothing but their address.
        error: The first exception in a callback.
    """

    table: Path
    expected: int
    calibrator: Any = None
    given: int = 0
    written: bool = False
    batches: list[Tensor] = field(default_factory=list)
    cache: bytes = b""
    error: BaseException | None = None

    def guard(self, callback: Callable[..., Any], refusal: Any) -> Callable[..., Any]:
        """``callback`` with its exception kept and ``refusal`` returned: C++ must not see one."""

        def guarded(*arguments: Any) -> Any:
            if self.error is not None:
                return refusal
            try:
                return callback(*arguments)
            except BaseException as error:  # noqa: BLE001 - an interrupt would end the process just the same
                self.error = error
                return refusal

        return guarded

    def check(self) -> None:
        """Raise what a callback raised."""
        if self.error is not None:
            raise self.error


def data_calibrator(
    torch_tensorrt: ModuleType,
    source: ImageSet,
    subset: Subset,
    table: Path,
    algorithm: AlgorithmName,
    device: torch.device,
    quantile: float = 0.9999,
) -> CalibratorRun:
    """A DataLoaderCalibrator over the subset, writing its table to ``table``.

    Args:
        torch_tensorrt: The module.
        source: The images that ``subset`` has positions in.
        subset: What to calibrate on; every batch is full.
        table: A temporary path: TensorRT's table is written there in place.
        algorithm: Of TensorRT.
        device: Where TensorRT reads the batches.
        quantile: Of ``legacy``.

    Raises:
        TensorRTError: TensorRT does not have the algorithm.
    """
    positions = subset.positions.tolist()
    run = CalibratorRun(table, expected=len(positions) // subset.batch_size)

    def keep(batch: Tensor) -> Tensor:
        batch = batch.to(device).contiguous()
        run.batches.append(batch)
        return batch

    loader = DataLoader(
        DatasetSubset(_Batches(source), positions),
        batch_size=subset.batch_size,
        shuffle=False,
        drop_last=True,
        collate_fn=keep,  # type: ignore[arg-type]  # __getitems__ gives a whole batch, not a list
    )
    run.calibrator = _upstream(torch_tensorrt, loader, algorithm, table, use_cache=False, device=device)
    _finish_class(run, algorithm, quantile)
    return run


def table_calibrator(
    torch_tensorrt: ModuleType,
    table: Path,
    algorithm: AlgorithmName,
    device: torch.device,
    quantile: float = 0.9999,
) -> CalibratorRun:
    """A DataLoaderCalibrator that has TensorRT read ``table`` (which TensorRT wrote) and touches no data.

    Raises:
        InputError: the table cannot be read.
        TensorRTError: TensorRT does not have the algorithm.
    """
    run = CalibratorRun(table, expected=0)
    CalibrationTable.read(table)
    # Its loader is never asked for a batch, but the class wants one.
    loader: DataLoader[Tensor] = DataLoader([], batch_size=1)  # type: ignore[arg-type]
    run.calibrator = _upstream(torch_tensorrt, loader, algorithm, table, use_cache=True, device=device)
    _finish_class(run, algorithm, quantile)
    return run


def _upstream(
    torch_tensorrt: ModuleType,
    loader: DataLoader[Tensor],
    algorithm: AlgorithmName,
    table: Path,
    use_cache: bool,
    device: torch.device,
) -> Any:
    problem = algorithm_problem(algorithm)
    if problem:
        raise TensorRTError(problem)
    ptq = torch_tensorrt.ts.ptq
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return ptq.DataLoaderCalibrator(
            loader,
            algo_type=ptq.CalibrationAlgo[TENSORRT_ALGORITHMS[algorithm]],
            cache_file=str(table),
            use_cache=use_cache,
            device=device,
        )


def _finish_class(run: CalibratorRun, algorithm: AlgorithmName, quantile: float) -> None:
    """Wrap the callbacks on the calibrator's class, where the C++ side looks for them.

    Upstream makes a class of its own for each calibrator, so that no other one is touched.
    """
    kind: Any = type(run.calibrator)
    get_batch, write = kind.get_batch, kind.write_calibration_cache

    def give(self: Any, names: Sequence[str]) -> list[int] | None:
        if self.use_cache:
            raise TensorRTError(f"TensorRT did not accept the calibration table {run.table}: calibrate again")
        if len(names) != 1:
            raise TensorRTError(f"the engine has {len(names)} inputs ({', '.join(names)}); a calibrator feeds one")
        pointers: list[int] | None = get_batch(self, names)
        run.given += pointers is not None
        return pointers

    def read(self: Any) -> bytes:
        # The upstream function returns the same bytes, but they are freed before TensorRT looks at them.
        run.cache = run.table.read_bytes() if self.use_cache else b""
        return run.cache

    def keep(self: Any, content: Any) -> None:
        if self.use_cache:
            return  # TensorRT hands back what it has read
        write(self, content)
        run.written = True

    kind.get_batch = run.guard(give, None)
    kind.read_calibration_cache = run.guard(read, b"")
    kind.write_calibration_cache = run.guard(keep, None)
    if ALGORITHMS[algorithm].parameters_in_header:
        # Torch-TensorRT's C++ asks the object for these and takes -1 where they are missing.
        kind.get_quantile = lambda self: quantile
        kind.get_regression_cutoff = lambda self: Legacy.cutoff
        kind.read_histogram_cache = lambda self, length: None
        kind.write_histogram_cache = lambda self, content, length: None
