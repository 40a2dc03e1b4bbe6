"""Running an ONNX network in ONNX Runtime with any of its values as outputs.

Imports onnx and onnxruntime inside functions: they are slow to load.
"""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib.onnx.model import name_nodes
from calib.onnx.source import Batch
from common.errors import InputError, first_line
from common.threads import available_cores

if TYPE_CHECKING:
    import onnx
    from torch import Tensor

_BUDGET = 192 * 2**20
"""Bytes of observed values at a time; a batch that has more is run in parts, one after the other."""

_BUDGET_OF_A_CORE = 24 * 2**20
"""The same where there are many cores, each of which should have an image: resnet18's values at 224 x 224 are 22 MB."""

_CUDA = "CUDAExecutionProvider"

_FLOATS = ("tensor(float)", "tensor(float16)", "tensor(double)")

_LEAST = 1e-300

_UNKNOWN_OPERATOR = ("is not a registered function/op", "No Op registered", "NOT_IMPLEMENTED")


class Observed:
    """An ONNX network whose values can be asked for.

    The graph is optimized as ONNX Runtime always does, except that what is asked for is computed as a value of its own:
    nothing is fused across it. On an NVIDIA GPU, where ONNX Runtime has its CUDA provider, it computes in float32, not
    TF32.

    Args:
        path: The file, whose folder holds external weights.
        model: Its network, without these.
        values: Values of the main graph; those that ONNX Runtime finds to be no float tensors are left out.

    Attributes:
        values: The float ones of them.
        rectified: Those of them of which a ReLU makes another one of them -> that one.
        provider: What ONNX Runtime computes with, such as ``CPUExecutionProvider``.

    Raises:
        InputError: ONNX Runtime does not take the network.
    """

    def __init__(self, path: Path, model: onnx.ModelProto, values: Sequence[str]) -> None:
        inputs = {value.name for value in model.graph.input}
        self._passed = [name for name in values if name in inputs]
        asked = [name for name in dict.fromkeys(values) if name not in inputs]
        self._path, self._model = path, with_outputs(model, asked)
        self._cores = available_cores()
        self._session = open_session(path, self._model, 1)
        given = {item.name for item in self._session.get_inputs() if item.type in _FLOATS}
        self._passed = [name for name in self._passed if name in given]
        kinds = {output.name: output.type for output in self._session.get_outputs()}
        floats = {name for name, kind in kinds.items() if kind in _FLOATS}
        self._asked = [name for name in asked if name in floats]
        self.values = [*self._passed, *self._asked]
        self.rectified = {
            node.input[0]: node.output[0]
            for node in model.graph.node
            if node.op_type == "Relu" and {node.input[0], node.output[0]} <= {*self.values}
        }
        self.provider: str = self._session.get_providers()[0]
        self._fixed = next((item.shape[0] for item in self._session.get_inputs() if _is_fixed(item)), None)
        self._images = self._at_a_time = 0

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
            self._session = open_session(self._path, self._model, self._cores - self._at_a_time + 1)
        del self._model  # as large as its weights

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
            found = self._session.run_with_ort_values(self._asked, fed) if self._asked else []
        except Exception as error:  # its exceptions share no base class of their own
            raise InputError(f"ONNX Runtime does not run {self._path}: {_reason(error)}") from error
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


def with_outputs(model: onnx.ModelProto, values: Sequence[str]) -> onnx.ModelProto:
    """The network with these values as its outputs, and no others."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    name_nodes(copy)  # ONNX Runtime refuses two of one name, which TensorRT takes
    del copy.graph.output[:]
    known = {value.name: value for value in model.graph.output}
    copy.graph.output.extend(known.get(name, onnx.ValueInfoProto(name=name)) for name in values)
    return copy


def open_session(path: Path, model: onnx.ModelProto, threads: int) -> Any:
    """A session for ``model``, whose external weights lie where ``path`` is, with so many threads for an operator.

    Raises:
        InputError: ONNX Runtime does not take the network.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors are raised as well
    options.add_session_config_entry("session.intra_op.spin_duration_us", "1000")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent.resolve()))
    if platform.machine() in ("x86_64", "AMD64"):
        # Sums of two products of integers do not saturate with this.
        options.add_session_config_entry("session.x64quantprecision", "1")
    providers: list[Any] = ["CPUExecutionProvider"]
    if has_cuda():
        providers.insert(0, (_CUDA, {"use_tf32": "0"}))
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)
    except Exception as error:  # its exceptions share no base class of their own
        foreign = ", ".join(_foreign_operators(model))
        if foreign and any(text in str(error) for text in _UNKNOWN_OPERATOR):
            raise InputError(
                f"{path} has operators that ONNX Runtime does not have: {foreign}; cut the network before them, "
                "or calibrate with TensorRT"
            ) from error
        raise InputError(f"ONNX Runtime does not take {path}: {_reason(error)}") from error


def has_cuda() -> bool:
    """Whether the ONNX Runtime that is installed has the CUDA provider, which yet may find no GPU or library."""
    import onnxruntime

    return _CUDA in onnxruntime.get_available_providers()


def _foreign_operators(model: onnx.ModelProto) -> Iterator[str]:
    """The operators of a model that ONNX does not define, once each, and those of other domains."""
    import onnx

    versions = {item.domain: item.version for item in model.opset_import}
    seen = set()
    for node in model.graph.node:
        domain = node.domain if node.domain != "ai.onnx" else ""
        known = domain in ("", "ai.onnx.ml") and onnx.defs.has(node.op_type, versions.get(domain, 1), domain)
        known = known or domain.startswith("com.microsoft")
        if not known and (domain, node.op_type) not in seen:
            seen.add((domain, node.op_type))
            yield f"{node.op_type} (domain {domain})" if domain else node.op_type


def _reason(error: Exception) -> str:
    """The first line of ONNX Runtime's message, without its error code."""
    text = first_line(error).rpartition("[ONNXRuntimeError] : ")[2]
    return re.sub(r"^[0-9]+ : [A-Z_]+ : ", "", text)[:300]


def compare_outputs(
    path: Path, model: onnx.ModelProto, quantized: onnx.ModelProto, batches: Iterable[Batch]
) -> dict[str, float | None]:
    """Signal-to-quantization-noise ratio of each float output over the batches, in dB; None where there is no error.

    10 log10(sum of x**2 / sum of (x - y)**2), with x of the float network and y of the quantized one.

    Raises:
        InputError: ONNX Runtime does not run one of them.
    """
    names = [value.name for value in model.graph.output]
    floats, other = Observed(path, model, names), Observed(path, quantized, names)
    signal, noise = dict.fromkeys(floats.values, 0.0), dict.fromkeys(floats.values, 0.0)
    with ThreadPoolExecutor(available_cores()) as pool:
        for batch in batches:
            for wave, same in zip(floats.waves(batch), other.waves(batch), strict=True):
                for found, approximate in zip(pool.map(floats.run, wave), pool.map(other.run, same), strict=True):
                    for name, value in found.items():
                        if value.shape == approximate[name].shape:
                            x, y = value.double(), approximate[name].double()
                            signal[name] += float((x**2).sum())
                            noise[name] += float(((x - y) ** 2).sum())
    return {
        name: 10 * math.log10(max(signal[name], _LEAST) / noise[name]) if noise[name] else None
        for name in floats.values
    }
