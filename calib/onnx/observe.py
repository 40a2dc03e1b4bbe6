"""Running an ONNX network in ONNX Runtime with any of its values as outputs.

Imports onnx and onnxruntime inside functions: they are slow to load.
"""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
import weakref
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib.onnx.blocks import has_blocks, in_blocks
from calib.onnx.session import open_session, reason, with_outputs
from calib.onnx.source import Batch
from common.errors import InputError
from common.threads import available_cores

if TYPE_CHECKING:
    import onnx
    from torch import Tensor

logger = logging.getLogger(__name__)

_BUDGET = 192 * 2**20
"""Bytes of observed values at a time; a batch that has more is run in parts, one after the other."""

_BUDGET_OF_A_CORE = 24 * 2**20
"""The same where there are many cores, each of which should have an image: resnet18's values at 224 x 224 are 22 MB."""

_FLOATS = ("tensor(float)", "tensor(float16)", "tensor(double)")

_LEAST = 1e-300


class Observed:
    """An ONNX network whose values can be asked for.

    The graph is optimized as ONNX Runtime always does, except that what is asked for is computed as a value of its own:
    nothing is fused across it. On an NVIDIA GPU, where ONNX Runtime has its CUDA provider, it computes in float32, not
    TF32.

    Args:
        path: The file, whose folder holds external weights.
        model: Its network, without these.
        values: Values of the main graph; those that ONNX Runtime finds to be no float tensors are left out.
        in_order: Those of them whose elements :meth:`run` gives in the network's order; None for all. Others may come
            in the order in which ONNX Runtime computes them, which is faster.

    Attributes:
        values: The float ones of them.
        rectified: Those of them of which a ReLU makes another one of them -> that one.
        provider: What ONNX Runtime computes with, such as ``CPUExecutionProvider``.

    Raises:
        InputError: ONNX Runtime does not take the network.
    """

    def __init__(
        self, path: Path, model: onnx.ModelProto, values: Sequence[str], in_order: Collection[str] | None = None
    ) -> None:
        inputs = {value.name for value in model.graph.input}
        self._passed = [name for name in values if name in inputs]
        asked = [name for name in dict.fromkeys(values) if name not in inputs]
        self._path = path
        self._cores = available_cores()
        whole = with_outputs(model, asked)
        outputs, self._open = asked, partial(open_session, path, whole)
        if in_order is not None and has_blocks(model):
            outputs = self._give_blocks(whole, in_order)
        self._session = self._open(1)
        given = {item.name for item in self._session.get_inputs() if item.type in _FLOATS}
        self._passed = [name for name in self._passed if name in given]
        kinds = {output.name: output.type for output in self._session.get_outputs()}
        # Value -> what the session calls it.
        self._asked = {name: output for name, output in zip(asked, outputs, strict=True) if kinds[output] in _FLOATS}
        self.values = [*self._passed, *self._asked]
        self.rectified = {
            node.input[0]: node.output[0]
            for node in model.graph.node
            if node.op_type == "Relu" and {node.input[0], node.output[0]} <= {*self.values}
        }
        self.provider: str = self._session.get_providers()[0]
        self._fixed = next((item.shape[0] for item in self._session.get_inputs() if _is_fixed(item)), None)
        self._images = self._at_a_time = 0

    def _give_blocks(self, model: onnx.ModelProto, in_order: Collection[str]) -> list[str]:
        """Take the network that :func:`calib.onnx.blocks.in_blocks` makes; the names of its outputs."""
        folder = Path(tempfile.mkdtemp())
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        optimized = folder / "optimized.onnx"
        try:
            blocked, outputs = in_blocks(self._path, model, in_order, optimized)
        except InputError as error:  # of a broken network, which the next session says again, or of a full disk
            logger.debug("the values of convolutions are put in order: %s", error)
            return [output.name for output in model.graph.output]
        self._open = partial(open_session, optimized, blocked, optimize=False)
        return outputs

    def waves(self, batch: Batch) -> list[list[Batch]]:
        """A batch cut into parts: lists of those that :meth:`run` takes at a time, in as many threads.

        The values of one list stay within a fixed amount of memory. Each part is run by a core of its own: the cores
        need not wait for each other then after every operator, as they do when they share its work. On a GPU the parts
        take turns, and each core copies and counts the values of one.
        """
        unit = self._fixed or 1
        units = len(next(iter(batch.values()))) // unit
        if not self._images:
            self._divide({name: array[:unit] for name, array in batch.items()}, units)
        # As many for each thread, so that none waits for another one.
        rounds = -(-units // self._at_a_time)
        count = -(-rounds // max(self._images // self._at_a_time, 1))
        bounds = [min(rounds * index // count * self._at_a_time, units) * unit for index in range(count + 1)]
        waves: list[list[Batch]] = []
        for begin, end in pairwise(bounds):
            length = unit if self._fixed else max(-(-(end - begin) // self._at_a_time), 1)
            ranges = [slice(start, min(start + length, end)) for start in range(begin, end, length)]
            waves.append([{name: array[part] for name, array in batch.items()} for part in ranges])
        return waves

    def _divide(self, first: Batch, units: int) -> None:
        """Find how many images (or fixed batches) are run at a time, and by how many threads.

        Args:
            first: One of them.
            units: How many a batch has.
        """
        size = sum(value.nbytes for value in self.run(first).values())
        self._images = max(max(_BUDGET, self._cores * _BUDGET_OF_A_CORE) // max(size, 1), 1)
        self._at_a_time = min(self._cores, self._images, units)
        if self._fixed:
            self._images = min(self._images, self._at_a_time)
        if self._cores > self._at_a_time:
            del self._session
            # A session has one set of threads for all that run it, beside the thread that each has of its own.
            self._session = self._open(self._cores - self._at_a_time + 1)
        del self._open  # holds the model, as large as its weights

    def run(self, batch: Batch) -> dict[str, Tensor]:
        """The float values of one part of a batch, by name, on the CPU; several threads may call it at a time.

        Raises:
            InputError: ONNX Runtime cannot run the network on it.
        """
        import onnxruntime
        import torch

        values = {name: batch[name] for name in self._passed}
        fed = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in batch.items()}
        try:
            found = self._session.run_with_ort_values([*self._asked.values()], fed) if self._asked else []
        except Exception as error:  # its exceptions share no base class of their own
            raise InputError(f"ONNX Runtime does not run {self._path}: {reason(error)}") from error
        tensors = {name: torch.from_numpy(array) for name, array in values.items()}
        tensors.update((name, _tensor(value)) for name, value in zip(self._asked, found, strict=True))
        # TensorRT computes double precision in float32.
        return {name: value.float() if value.dtype == torch.float64 else value for name, value in tensors.items()}


def _tensor(value: Any) -> Tensor:
    """An OrtValue as PyTorch's tensor, without a copy where ONNX Runtime (1.23 or newer) can hand over its memory."""
    from torch import from_numpy
    from torch.utils.dlpack import from_dlpack

    return from_dlpack(value) if hasattr(value, "__dlpack__") else from_numpy(value.numpy())


def _is_fixed(item: Any) -> bool:
    return bool(item.shape) and isinstance(item.shape[0], int)


def compare_outputs(
    path: Path, model: onnx.ModelProto, quantized: onnx.ModelProto, batches: Iterable[Batch]
) -> dict[str, float | None]:
    """Signal-to-quantization-noise ratio of each float output over the batches, in dB; None where there is no error.

    10 log10(sum of x**2 / sum of (x - y)**2), with x of the float network and y of the quantized one. NaN for an output
    whose values cannot be compared: it has none, or another number of them after quantization, as the boxes that a
    detector keeps.

    Raises:
        InputError: ONNX Runtime does not run one of them.
    """
    names = [value.name for value in model.graph.output]
    floats, other = Observed(path, model, names), Observed(path, quantized, names)
    signal, noise = dict.fromkeys(floats.values, 0.0), dict.fromkeys(floats.values, 0.0)
    compared = dict.fromkeys(floats.values, 0)
    with ThreadPoolExecutor(available_cores()) as pool:
        for batch in batches:
            for wave, same in zip(floats.waves(batch), other.waves(batch), strict=True):
                for found, approximate in zip(pool.map(floats.run, wave), pool.map(other.run, same), strict=True):
                    for name, value in found.items():
                        if value.shape != approximate[name].shape:
                            noise[name] = math.nan
                            continue
                        x, y = value.double(), approximate[name].double()
                        signal[name] += float((x**2).sum())
                        noise[name] += float(((x - y) ** 2).sum())
                        compared[name] += value.numel()
    ratios: dict[str, float | None] = {
        name: 10 * math.log10(max(signal[name], _LEAST) / noise[name]) if noise[name] else None
        for name in floats.values
    }
    return {name: ratio if compared[name] else math.nan for name, ratio in ratios.items()}
