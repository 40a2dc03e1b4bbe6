"""TensorRT's own parser, builder and runtime, without Torch-TensorRT: engines of ONNX files, run and timed on a GPU."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from common.errors import InputError
from engines.tensorrt.support import library_version

WARM_UP_RUNS = 5


class TensorRT:
    """A builder and a runtime.

    Attributes:
        version: Of TensorRT's library.
    """

    def __init__(self) -> None:
        import tensorrt

        self._trt = tensorrt
        self._logger = tensorrt.Logger(tensorrt.Logger.ERROR)
        self._builder = tensorrt.Builder(self._logger)
        self._runtime = tensorrt.Runtime(self._logger)
        self.version = library_version(tensorrt.__version__)

    def build(
        self, model: bytes, batch: int, *, int8: bool = False, table: bytes = b"", level: int = 3, timings: int = 8
    ) -> BareEngine:
        """Build an engine of an ONNX network with one input and one output; FP32 without TF32, and INT8 if asked for.

        Args:
            model: The ONNX file.
            batch: Images of a batch; the engine takes no other.
            int8: Whether TensorRT may compute in INT8.
            table: Calibration table of this version, for implicit quantization; empty where the network has its own.
            level: Optimization level of the builder; at 0 it takes whatever kernel there is.
            timings: Averaged for each choice of a kernel.

        Raises:
            InputError: TensorRT does not parse or build it; its own messages have gone to stderr before.
        """
        trt = self._trt
        network = self._builder.create_network(0)
        parser = trt.OnnxParser(network, self._logger)
        if not parser.parse(model):
            raise InputError(f"TensorRT does not parse the network: {parser.get_error(0)}")
        config = self._builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)
        if int8:
            config.set_flag(trt.BuilderFlag.INT8)
        config.builder_optimization_level = level
        config.avg_timing_iterations = timings
        source = network.get_input(0)
        shape = (batch, *source.shape[1:])
        profile = self._builder.create_optimization_profile()
        profile.set_shape(source.name, shape, shape, shape)
        config.add_optimization_profile(profile)
        calibrator = _reading(trt, table) if table else None
        if calibrator is not None:
            config.int8_calibrator = calibrator
            config.set_calibration_profile(profile)
        begin = time.perf_counter()
        plan = self._builder.build_serialized_network(network, config)
        if plan is None:
            raise InputError("TensorRT does not build the network, for the reason above")
        return BareEngine(self._runtime.deserialize_cuda_engine(plan), time.perf_counter() - begin)


def _reading(trt: Any, table: bytes) -> Any:
    """A calibrator of entropy 2 that has TensorRT read a table, and no images."""

    class Reading(trt.IInt8EntropyCalibrator2):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IInt8EntropyCalibrator2.__init__(self)

        def get_batch_size(self) -> int:
            return 1

        def get_batch(self, names: list[str]) -> None:
            return None

        def read_calibration_cache(self) -> bytes:
            return table

        def write_calibration_cache(self, content: Any) -> None:
            pass

    return Reading()


class BareEngine:
    """An engine, ready to run on a stream of its own.

    Attributes:
        seconds: That its build took.
        layers: That it has.
    """

    def __init__(self, engine: Any, seconds: float) -> None:
        self.seconds, self.layers = seconds, engine.num_layers
        self._engine, self._context = engine, engine.create_execution_context()
        source, result = (engine.get_tensor_name(index) for index in range(2))
        self._input = torch.zeros(tuple(self._context.get_tensor_shape(source)), device="cuda")
        self._output = torch.empty(tuple(self._context.get_tensor_shape(result)), device="cuda")
        self._context.set_tensor_address(source, self._input.data_ptr())
        self._context.set_tensor_address(result, self._output.data_ptr())
        self._stream, self._graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UP_RUNS):
                self._run()
            self._stream.synchronize()
            with torch.cuda.graph(self._graph, stream=self._stream):
                self._run()

    def __call__(self, images: Tensor) -> Tensor:
        """float32 [batch, C, H, W] on the CPU -> float32 output there."""
        self._input.copy_(images)
        torch.cuda.synchronize()
        self._run()
        self._stream.synchronize()
        return self._output.cpu()

    def milliseconds(self, replays: int) -> float:
        """Of a replay as a CUDA graph, the mean of so many in a row."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(self._stream):
            self._graph.replay()
            begin.record(self._stream)
            for _ in range(replays):
                self._graph.replay()
            end.record(self._stream)
        self._stream.synchronize()
        return float(begin.elapsed_time(end)) / replays

    def _run(self) -> None:
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise InputError("TensorRT does not run its engine, for the reason above")


def in_turns(engines: dict[str, BareEngine], turns: int, replays: int) -> dict[str, float]:
    """Median milliseconds of each engine's turns."""
    times: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(turns):
        for name, engine in engines.items():
            times[name].append(engine.milliseconds(replays))
    return {name: statistics.median(values) for name, values in times.items()}
