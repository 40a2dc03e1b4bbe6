"""ONNX Runtime on the CPU: FP32, INT8 with its integer kernels, and FP16 where it has kernels for it."""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import torch

from calib.network import INPUT, Network
from calib.onnx.external import LARGEST_HELD, loadable, network_bytes, weight_bytes
from calib.plan import plan_int8
from calib.table import CalibrationTable
from common.config import EngineConfig, PrecisionName, QuantizationConfig
from common.errors import InputError, first_line
from common.threads import available_cores
from engines.base import Compiled, Engine, EngineError
from engines.onnxruntime.macs import IN_FLOAT, executed_macs

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[np.float32]
Runner = Callable[[Array], list[Array]]

_INTEGER: Final = frozenset({"QGemm", "MatMulInteger", "MatMulIntegerToFloat", "ConvInteger", "NhwcMaxPool"})
_TRIAL: Final = 0.03
"""Seconds of trying one way to run a batch."""

_LONG: Final = 0.02
"""Seconds of a run from which on nothing is tried: handing out the shares of a batch then costs nothing that counts."""

_DOT_PRODUCTS: Final = {
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX-VNNI",
    "avx_vnni_int8": "AVX-VNNI-INT8",
    "amx_int8": "AMX",
    "asimddp": "Arm dot product",
    "i8mm": "Arm int8 matrix product",
}


class OnnxRuntimeEngine(Engine):
    """ONNX Runtime's CPU provider.

    Args:
        config: ``threads`` sets the threads of one inference.
        quantization: Which layers an INT8 network keeps in float.
    """

    name = "onnxruntime"

    def __init__(self, config: EngineConfig, quantization: QuantizationConfig, *_: object) -> None:
        self._threads = config.threads or available_cores()
        self._quantization = quantization

    def unavailable(self) -> str | None:
        """See :meth:`engines.base.Engine.unavailable`."""
        for package in ("onnx", "onnxruntime"):
            try:
                __import__(package)
            except ImportError as error:
                return f"{package} cannot be imported ({error}): pip install {package}"
        return None

    def compile(self, network: Network, precision: PrecisionName, table: CalibrationTable | None) -> Compiled:
        """See :meth:`engines.base.Engine.compile`; ``network`` must have been traced with an ``input_shape``."""
        model = self._model(network, precision, table)
        run, optimized = open_runner(model, self._threads)
        if precision == "fp16":
            _require_half(optimized)
        macs = executed_macs(network, model, optimized) if precision == "int8" else None
        assert network.input_shape is not None  # the export has asked for it
        try:
            run(np.zeros((1, *network.input_shape), np.float32))
        except Exception as error:  # its exceptions share no base class of their own
            raise EngineError(f"ONNX Runtime does not run the network: {first_line(error)}") from error
        return Compiled(
            self.name,
            precision,
            f"CPU ({self._threads} thread{'s' if self._threads > 1 else ''})",
            lambda images: tuple(map(torch.from_numpy, run(images.numpy()))),
            network_bytes(model),
            details=_details(optimized, precision),
            macs=macs,
        )

    def _model(self, network: Network, precision: PrecisionName, table: CalibrationTable | None) -> onnx.ModelProto:
        from engines.onnx.float import float_model
        from engines.onnx.int8 import int8_model

        plan = None
        if precision == "int8":
            if table is None:
                raise EngineError("INT8 needs a calibration table: run quantize.py --precision int8")
            plan = plan_int8(network, table, self._quantization.keep_fp, self._quantization.quantize_output)
            fault = integer_fault()
            if fault is not None:
                raise EngineError(fault)
        try:
            model = int8_model(plan, for_cpu=True) if plan else float_model(network)
        except InputError as error:
            raise EngineError(str(error)) from error
        if precision == "fp16":
            from onnxruntime.transformers.float16 import convert_float_to_float16

            model = convert_float_to_float16(model, keep_io_types=True, disable_shape_infer=True)
        return model


def open_session(
    model: onnx.ModelProto, threads: int, optimize: bool = True, largest: int = LARGEST_HELD
) -> tuple[Any, onnx.ModelProto]:
    """A CPU session for ``model``, and the graph that it runs after ONNX Runtime's optimisation.

    Args:
        model: Of any size, its weights inside.
        threads: Threads of one inference.
        optimize: Whether it may; without, every operator is computed as it is written.
        largest: Bytes of weights above which they pass through a file of their own, and the graph comes without them.

    Raises:
        EngineError: ONNX Runtime does not take the model.
    """
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    # Its threads wait for the next run spinning, by default for some 30 ms on current CPUs, and slow down whatever runs
    # meanwhile; 1 ms is as fast in a loop. Versions before 1.26 do not have the option.
    options.add_session_config_entry("session.intra_op.spin_duration_us", "1000")
    # It warns that the optimised graph, which is only looked at, fits this CPU alone, and prints errors that it raises.
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "optimized.onnx")
        options.optimized_model_filepath = str(path)
        if weight_bytes(model) > largest:
            options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
        try:
            with loadable(model, largest) as source:
                session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions share no base class of their own
            raise EngineError(f"ONNX Runtime does not take the network: {first_line(error)}") from error
        return session, onnx.load(path, load_external_data=False)


@cache
def integer_fault() -> str | None:
    """Why the integer kernels of this ONNX Runtime cannot be trusted on this CPU, or None if they compute right.

    Those for int8 weights may saturate, where a network has uint8 ones (:mod:`engines.onnxruntime.weights`).

    The versions up to 1.25 give wrong sums on CPUs with AMX where the number of terms is no multiple of 64
    (microsoft/onnxruntime, pull request 27671).
    """
    import onnxruntime

    if sums_are_exact(np.int8) or sums_are_exact(np.uint8):
        return None
    return (
        f"ONNX Runtime {onnxruntime.__version__} computes integer matrix products wrongly on this CPU "
        "(known with AMX up to 1.25): install onnxruntime 1.26 or later"
    )


def sums_are_exact(weights: type[np.int8] | type[np.uint8]) -> bool:
    """Whether products of uint8 values with weights of this type are right, at the ends of both ranges too."""
    from onnx import TensorProto, helper, numpy_helper

    generator = np.random.default_rng(0)
    middle = 128 if weights is np.uint8 else 0
    for rows, terms, columns in ((64, 500, 50), (576, 25, 20)):
        left = generator.integers(0, 256, (rows, terms), np.uint8)
        right = generator.integers(-127, 128, (terms, columns), np.int16)
        left[::2] = np.where(left[::2] < 128, 0, 255)
        right[:, ::2] = np.where(right[:, ::2] < 0, -127, 127)
        graph = helper.make_graph(
            [helper.make_node("MatMulInteger", [INPUT, "weight", "zero_point", "weight_zero_point"], ["sums"])],
            "check",
            [helper.make_tensor_value_info(INPUT, TensorProto.UINT8, left.shape)],
            [helper.make_tensor_value_info("sums", TensorProto.INT32, (rows, columns))],
            [
                numpy_helper.from_array((right + middle).astype(weights), "weight"),
                numpy_helper.from_array(np.array(128, np.uint8), "zero_point"),
                numpy_helper.from_array(np.array(middle, weights), "weight_zero_point"),
            ],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        session, _ = open_session(model, 1)
        if not np.array_equal(_infer(session, left)[0], (left.astype(np.int32) - 128) @ right.astype(np.int32)):
            return False
    return True


def open_runner(model: onnx.ModelProto, threads: int) -> tuple[Runner, onnx.ModelProto]:
    """A function that runs ``model`` on up to ``threads`` threads and gives its outputs, and its optimised graph.

    ONNX Runtime divides the work of one operator on one image after the other, which is too little to divide for
    integer kernels on small images. But the images of a batch are independent: threads can share them, each through
    a session of one thread. Which is faster, and on how many threads, depends on the network and the batch, and is
    tried with the first batch of each size; where one run takes long, all threads share a batch that has two images for
    each of them. The numbers are the same.

    Args:
        model: The network.
        threads: Threads of one inference.

    Raises:
        EngineError: ONNX Runtime does not take the model.
    """
    whole, optimized = open_session(model, threads)
    if threads == 1 or not _every_output_is_per_image(model):
        return partial(_infer, whole), optimized
    single, _ = open_session(model, 1)
    others = ThreadPoolExecutor(threads - 1, "onnxruntime")

    def shared(images: Array, parts: int) -> list[Array]:
        first, *rest = np.array_split(images, parts)
        pending = [others.submit(_infer, single, part) for part in rest]
        results = [_infer(single, first), *(job.result() for job in pending)]
        return [np.concatenate(output) for output in zip(*results, strict=True)]

    def choose(images: Array) -> Runner:
        most = min(threads, len(images) // 2)
        counts = sorted({most, *(2**power for power in range(1, most.bit_length()))} - {0, 1})
        sharing = [partial(shared, parts=parts) for parts in counts]
        at_once = partial(_infer, whole)
        seconds = min(_seconds(at_once, images) for _ in range(2))  # the first run is slower
        if seconds > _LONG:
            return sharing[-1] if len(images) >= 2 * threads else at_once
        # The last way's threads keep spinning after it, and would slow down whatever came next.
        return _fastest([partial(_infer, single), *sharing, at_once], images, 2 * seconds)

    chosen: dict[int, Runner] = {}

    def run(images: Array) -> list[Array]:
        size = len(images)
        if size not in chosen:
            chosen[size] = choose(images)
        return chosen[size](images)

    return run, optimized


def _fastest(ways: Sequence[Runner], images: Array, limit: float) -> Runner:
    """The way with the lowest median latency; one whose first run takes more seconds than ``limit`` is run once."""
    medians = []
    for way in ways:
        end = time.perf_counter() + _TRIAL
        times = [_seconds(way, images)]
        while times[0] <= limit and (len(times) < 4 or time.perf_counter() < end):
            times.append(_seconds(way, images))
        # The first half warms up.
        medians.append(statistics.median(times[len(times) // 2 :]))
    return ways[medians.index(min(medians))]


def _seconds(way: Runner, images: Array) -> float:
    begin = time.perf_counter()
    way(images)
    return time.perf_counter() - begin


def _every_output_is_per_image(model: onnx.ModelProto) -> bool:
    """Whether the first axis of all outputs is the batch's; others, such as anchors, cannot be put together."""
    sizes = [output.type.tensor_type.shape.dim[:1] for output in model.graph.output]
    return all(size and not size[0].dim_value for size in sizes)


def _infer(session: Any, images: npt.NDArray[Any]) -> list[Array]:
    results: list[Array] = session.run(None, {INPUT: images})
    return results


def integer_operators(optimized: onnx.ModelProto) -> dict[str, int]:
    """Operator -> number, of those in a graph that compute on integers."""
    counts = Counter(node.op_type for node in optimized.graph.node)
    return {name: count for name, count in counts.items() if name in _INTEGER or name.startswith("QLinear")}


def _details(optimized: onnx.ModelProto, precision: PrecisionName) -> dict[str, str]:
    import onnxruntime

    details = {"version": onnxruntime.__version__}
    if precision == "int8":
        in_float = Counter(node.op_type for node in optimized.graph.node if node.op_type in IN_FLOAT)
        details["integer operators"] = _counted(integer_operators(optimized)) or "none"
        details["convolutions and matrix products in float"] = _counted(in_float) or "none"
        details["integer dot products of the CPU"] = describe_dot_products(dot_products())
    return details


def _counted(operators: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(operators.items()))


def dot_products(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str] | None:
    """The instructions for int8 dot products that this CPU has; None where that cannot be told."""
    try:
        text = cpuinfo.read_text(encoding="ascii", errors="replace")
    except OSError:
        return [_DOT_PRODUCTS["asimddp"]] if platform.machine() == "arm64" else None
    lines = [line for line in text.splitlines() if line.startswith(("flags", "Features"))]
    flags = {flag for line in lines for flag in line.partition(":")[2].split()}
    return [title for flag, title in _DOT_PRODUCTS.items() if flag in flags]


def describe_dot_products(found: list[str] | None) -> str:
    """What :func:`dot_products` found, for a reader of latencies."""
    if found is None:
        return "not known on this system"
    return ", ".join(found) or "none (no VNNI): INT8 gains less speed here than with them"


def _require_half(optimized: onnx.ModelProto) -> None:
    """Check that the convolutions and matrix products of an FP16 network were left in FP16.

    Raises:
        EngineError: ONNX Runtime has no FP16 kernel for one here, and computes it in float32.
    """
    import onnx

    types = {value.name: value.data_type for value in optimized.graph.initializer}
    in_float = {
        node.op_type
        for node in optimized.graph.node
        if node.op_type in IN_FLOAT and types.get(node.input[1]) != onnx.TensorProto.FLOAT16
    }
    if in_float:
        raise EngineError(
            f"ONNX Runtime has no FP16 kernel for {', '.join(sorted(in_float))} on this CPU and would compute in FP32"
        )
