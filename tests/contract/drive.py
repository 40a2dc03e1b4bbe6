"""What the contract tests run in a subprocess: our code over the real Torch-TensorRT wheel, without TensorRT or a GPU.

    python tests/contract/drive.py <folder>

prints one JSON object as the last line of stdout: what each scenario of FACTS found, and how each of ENDINGS, which
end in a request for a TensorRT builder or worse, came out. Those run in a fork each, since importing is what takes
the time.
"""

from __future__ import annotations

import ctypes
import gc
import inspect
import json
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

# What Torch-TensorRT asks a GPU for while it is imported.
torch.cuda.current_device = lambda: 0
torch.cuda.get_device_capability = lambda device=None: (9, 0)

from calib.explicit import fake_quantize  # noqa: E402
from calib.plan import plan_int8  # noqa: E402
from calib.subset import Subset  # noqa: E402
from calib.table import CalibrationTable  # noqa: E402
from calib.tracing import trace  # noqa: E402
from common.config import EngineConfig, QuantizationConfig  # noqa: E402
from engines.gpu import Gpu  # noqa: E402
from engines.tensorrt import build as building  # noqa: E402
from engines.tensorrt import calibration, support  # noqa: E402
from engines.tensorrt.build import Build, build_engine, compile_arguments, to_torchscript  # noqa: E402
from engines.tensorrt.calibrator import CalibratorRun, data_calibrator, table_calibrator  # noqa: E402
from engines.tensorrt.support import Installed, TensorRTError  # noqa: E402
from models import LeNet  # noqa: E402
from tests.records import provenance  # noqa: E402

CPU = torch.device("cpu")
SHAPE = (2, 1, 28, 28)
SCALES = {"data": 0.0078, "conv1": 0.03, "pool1": 0.03, "conv2": 0.09, "pool2": 0.09, "ip1": 0.05, "ip2": 0.2}


class Images:
    """Twelve images, each filled with its own position."""

    def __init__(self, broken_at: int | None = None) -> None:
        self.asked: list[list[int]] = []
        self._broken_at = broken_at

    def __len__(self) -> int:
        return 12

    def images(self, index: Tensor) -> Tensor:
        self.asked.append(index.tolist())
        if self._broken_at is not None and self._broken_at in index.tolist():
            raise ValueError("this image cannot be read")
        return index.float().reshape(-1, 1, 1, 1).expand(-1, 1, 28, 28)


SUBSET = Subset(torch.tensor([7, 3, 11, 0, 5, 9]), batch_size=2)


class VirtualFunctions:
    """A calibrator as TensorRT sees it: a C++ object, called through its table of virtual functions.

    The order is that of NvInferRuntimeBase.h: the language, the interface's info, two destructors, and then
    getBatchSize, getBatch, readCalibrationCache, writeCalibrationCache, getAlgorithm, and for IInt8LegacyCalibrator
    getQuantile and getRegressionCutoff.
    """

    def __init__(self, calibrator: object) -> None:
        # A pybind11 object holds the address of its C++ object right after the Python header.
        self.this = ctypes.c_void_p.from_address(id(calibrator) + object.__basicsize__).value
        table = ctypes.c_void_p.from_address(int(self.this or 0)).value
        self._slots = (ctypes.c_void_p * 13).from_address(int(table or 0))

    def _call(self, slot: int, result: Any, *arguments: Any) -> Any:
        types: list[Any] = [type(item) for item in arguments]
        return ctypes.CFUNCTYPE(result, ctypes.c_void_p, *types)(int(self._slots[slot] or 0))(self.this, *arguments)

    def get_batch_size(self) -> int:
        return int(self._call(4, ctypes.c_int32))

    def get_batch(self, *names: str) -> list[int] | None:
        bindings = (ctypes.c_void_p * len(names))()
        texts = (ctypes.c_char_p * len(names))(*(name.encode() for name in names))
        function = ctypes.CFUNCTYPE(
            ctypes.c_bool, ctypes.c_void_p, ctypes.c_void_p * len(names), ctypes.c_char_p * len(names), ctypes.c_int32
        )(int(self._slots[5] or 0))
        return [int(item or 0) for item in bindings] if function(self.this, bindings, texts, len(names)) else None

    def read_cache(self) -> tuple[int, int]:
        length = ctypes.c_size_t()
        address = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t))(
            int(self._slots[6] or 0)
        )(self.this, ctypes.byref(length))
        return int(address or 0), length.value

    def write_cache(self, content: bytes) -> None:
        self._call(7, None, ctypes.c_char_p(content), ctypes.c_size_t(len(content)))

    def get_algorithm(self) -> int:
        return int(self._call(8, ctypes.c_int32))

    def get_quantile(self) -> float:
        return float(self._call(9, ctypes.c_double))

    def get_regression_cutoff(self) -> float:
        return float(self._call(10, ctypes.c_double))


def churn() -> None:
    """Reuse freed memory, so that what is not kept alive is overwritten."""
    gc.collect()
    for _ in range(50):
        torch.full(SHAPE, -1.0)
        bytes(500)


def values(addresses: list[int]) -> list[list[float]]:
    """First pixel of each image of the batches at these addresses."""
    pixels = SHAPE[1] * SHAPE[2] * SHAPE[3]
    result = []
    for address in addresses:
        batch = (ctypes.c_float * (SHAPE[0] * pixels)).from_address(address)
        assert len(set(batch[:pixels])) == 1
        result.append([batch[0], batch[pixels]])
    return result


def network() -> Any:
    torch.manual_seed(1)
    return trace(LeNet(), "LeNet", SHAPE[1:])


def table() -> CalibrationTable:
    return CalibrationTable(SCALES)


def data_run(torch_tensorrt: Any, source: Images, path: Path, algorithm: Any = "entropy2") -> CalibratorRun:
    return data_calibrator(torch_tensorrt, source, SUBSET, path, algorithm, CPU, quantile=0.999)


def versions() -> dict[str, Any]:
    """What is installed, and what ``torch_tensorrt.compile`` takes."""
    torch_tensorrt, installed = support.load()
    signature = inspect.signature(torch_tensorrt.ts.compile)
    plain = Build(frozenset({"fp32"}))
    known = set(inspect.signature(torch_tensorrt.compile).parameters) | set(signature.parameters)
    return {
        "versions": [installed.torch, installed.torch_tensorrt, installed.tensorrt],
        "calibrator": hasattr(torch_tensorrt.ts, "ptq"),
        "takes_calibrator": "calibrator" in signature.parameters,
        "unknown_arguments": sorted(set(compile_arguments(torch_tensorrt, SHAPE, plain)) - known),
        "capture_warnings": warnings.showwarning.__module__,
    }


def delivers() -> dict[str, Any]:
    """The calibrator as TensorRT drives it, batch by batch, through C++."""
    torch_tensorrt, _ = support.load()
    source = Images()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table"
        run = data_run(torch_tensorrt, source, path)
        functions = VirtualFunctions(run.calibrator)
        cache = functions.read_cache()
        batches: list[list[int] | None] = []
        while len(batches) < 10 and (not batches or batches[-1] is not None):
            batches.append(functions.get_batch("input_0"))
            churn()
        functions.write_cache(table().dumps().encode())
        run.check()
        return {
            "type": type(run.calibrator).__mro__[1].__name__,
            "algorithm": functions.get_algorithm(),
            "batch_size": functions.get_batch_size(),
            "cache_length": cache[1],
            "batches": values([item[0] for item in batches if item]),
            "pointers_per_batch": sorted({len(item) for item in batches if item}),
            "stopped": batches[-1] is None,
            "stays_stopped": functions.get_batch("input_0") is None,
            "asked": source.asked,
            "given": run.given,
            "written": run.written,
            "table": CalibrationTable.read(path).dumps() == table().dumps(),
            "shared_class": type(run.calibrator) is type(data_run(torch_tensorrt, Images(), path).calibrator),
        }


def algorithms() -> dict[str, Any]:
    """Each algorithm makes TensorRT's calibrator of that name."""
    torch_tensorrt, _ = support.load()
    result: dict[str, Any] = {}
    for name in ("entropy2", "entropy", "minmax", "legacy"):
        run = data_run(torch_tensorrt, Images(), Path("unused"), name)
        functions = VirtualFunctions(run.calibrator)
        result[name] = [type(run.calibrator).__mro__[1].__name__, functions.get_algorithm()]
        if name == "legacy":
            result["legacy_numbers"] = [functions.get_quantile(), functions.get_regression_cutoff()]
            result["legacy_batch"] = values(functions.get_batch("input_0") or [])
        run.check()
    try:
        data_run(torch_tensorrt, Images(), Path("unused"), "percentile")
    except TensorRTError as error:
        result["percentile"] = str(error)
    return result


def reads_table() -> dict[str, Any]:
    """The calibrator that has TensorRT read a table: the bytes stay alive, no data is touched, nothing is written."""
    torch_tensorrt, _ = support.load()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table"
        table().write(path)
        before = path.read_bytes()
        run = table_calibrator(torch_tensorrt, path, "entropy2", CPU)
        functions = VirtualFunctions(run.calibrator)
        address, length = functions.read_cache()
        churn()
        seen = ctypes.string_at(address, length)
        functions.write_cache(b"something else")
        calm = run.error is None
        asked = functions.get_batch("input_0")
        return {
            "read": seen == before,
            "unchanged": path.read_bytes() == before,
            "calm": calm,
            "batch_after_rejection": asked,
            "rejection": str(run.error),
        }


def keeps_exceptions() -> dict[str, Any]:
    """What callbacks raise does not reach C++."""
    torch_tensorrt, _ = support.load()
    with tempfile.TemporaryDirectory() as folder:
        run = data_run(torch_tensorrt, Images(broken_at=11), Path(folder) / "table")
        functions = VirtualFunctions(run.calibrator)
        batches = [functions.get_batch("input_0") for _ in range(3)]
        functions.write_cache(b"a table of half the data")
        unreadable = table_calibrator(torch_tensorrt, _written(Path(folder) / "old"), "entropy2", CPU)
        (Path(folder) / "old").unlink()
        gone = VirtualFunctions(unreadable.calibrator).read_cache()
        two = data_run(torch_tensorrt, Images(), Path(folder) / "two")
        inputs = VirtualFunctions(two.calibrator).get_batch("input_0", "input_1")
        unwritable = data_run(torch_tensorrt, Images(), Path(folder) / "missing" / "table")
        VirtualFunctions(unwritable.calibrator).write_cache(b"x")
        return {
            "batches": [item is not None for item in batches],
            "error": repr(run.error),
            "written": run.written or (Path(folder) / "table").exists(),
            "gone_length": gone[1],
            "gone": type(unreadable.error).__name__,
            "two_inputs": inputs,
            "two_inputs_error": str(two.error),
            "unwritable": type(unwritable.error).__name__,
            "unwritable_written": unwritable.written,
        }


def _written(path: Path) -> Path:
    table().write(path)
    return path


def upstream_aborts() -> dict[str, Any]:
    """The control: what the same exception does to the upstream calibrator. Does not return."""
    torch_tensorrt, _ = support.load()
    images: Any = [torch.zeros(1, 28, 28)]
    loader: Any = torch.utils.data.DataLoader(images, batch_size=1)
    calibrator = torch_tensorrt.ts.ptq.DataLoaderCalibrator(
        loader, cache_file="/nonexistent/table", use_cache=True, device=CPU
    )
    VirtualFunctions(calibrator).read_cache()
    return {}


def parses() -> dict[str, Any]:
    """Every set of options goes through the real parser of the compile spec, with and without a calibrator."""
    torch_tensorrt, _ = support.load()
    from torch_tensorrt.ts._compile_spec import _parse_compile_spec

    builds = {
        "fp32": Build.of(EngineConfig(tf32=True), "fp32"),
        "fp16": Build.of(EngineConfig(workspace=64, timing_iterations=3), "fp16"),
        "int8": Build.of(EngineConfig(int8_fp16=True, full_compilation=True), "int8"),
        "dla": Build.of(EngineConfig(dla_core=1), "int8"),
    }
    result: dict[str, Any] = {}
    for name, build in builds.items():
        arguments = compile_arguments(torch_tensorrt, SHAPE, build)
        arguments.pop("ir")
        full = arguments.pop("require_full_compilation")
        fallback = {"enabled": not full, "forced_fallback_ops": [], "forced_fallback_modules": [], "min_block_size": 3}
        spec = _parse_compile_spec({**arguments, "torch_fallback": fallback, "input_signature": None})
        result[name] = str(spec)
    if hasattr(torch_tensorrt.ts, "ptq"):
        run = data_run(torch_tensorrt, Images(), Path("unused"))
        arguments = compile_arguments(torch_tensorrt, SHAPE, builds["int8"])
        for name, calibrator in (("with_calibrator", run.calibrator), ("without_calibrator", None)):
            spec = _parse_compile_spec({"inputs": arguments["inputs"], "calibrator": calibrator})
            result[name] = spec._get_calibrator_handle()  # an address
    return result


def explicit() -> Any:
    return fake_quantize(plan_int8(network(), table()))


def supports() -> dict[str, Any]:
    """The front end converts every operation of LeNet and of LeNet with fake quantization, scripted and traced."""
    torch_tensorrt, _ = support.load()
    modules = {"float": LeNet().eval(), "explicit": explicit()}
    check = torch_tensorrt.ts.check_method_op_support
    unsupported = torch.jit.script(torch.nn.Sequential(torch.nn.LogSigmoid()))
    result: dict[str, Any] = {"another": check(unsupported, "forward")}
    for name, module in modules.items():
        result[f"{name}_traced"] = check(to_torchscript(module, SHAPE, CPU), "forward")
        result[f"{name}_scripted"] = check(torch.jit.script(module), "forward")
    graph = str(to_torchscript(modules["explicit"], SHAPE, CPU).inlined_graph)
    result["per_tensor"] = graph.count("aten::fake_quantize_per_tensor_affine")
    result["per_channel"] = graph.count("aten::fake_quantize_per_channel_affine")
    return result


def built(module: Any, precision: Any, installed: Installed | None = None) -> dict[str, Any]:
    """Compile; ends in the stand-in's request for a builder."""
    torch_tensorrt, really = support.load()
    build = Build.of(EngineConfig(full_compilation=True), precision)
    build_engine(torch_tensorrt, installed or really, module, SHAPE, build, device=CPU)
    return {"returned": True}


def build_fp32() -> dict[str, Any]:
    return built(network().module, "fp32")


def build_fp16() -> dict[str, Any]:
    return built(network().module, "fp16")


def build_explicit() -> dict[str, Any]:
    return built(explicit(), "int8")


def lowered() -> dict[str, Any]:
    """As build_explicit, with the front end printing the graph that it converts."""
    torch_tensorrt, _ = support.load()
    build = Build.of(EngineConfig(full_compilation=True), "int8")
    traced = to_torchscript(explicit(), SHAPE, CPU)
    with torch_tensorrt.logging.info():
        torch_tensorrt.compile(traced, **compile_arguments(torch_tensorrt, SHAPE, build))
    return {"returned": True}


def build_half() -> dict[str, Any]:
    """FP16 as strongly typed versions want it: a float16 module with float16 inputs."""
    _, really = support.load()
    return built(network().module, "fp16", Installed(really.torch, "2.13.0", "11.0.0"))


def needs_builder() -> dict[str, Any]:
    """TensorRT is asked for a builder before Torch-TensorRT is."""
    _, installed = support.load()
    support.require_builder(installed, 0)
    return {"returned": True}


def without_builder() -> dict[str, Any]:
    """A null pointer in place of a builder, to our check."""
    os.environ["TENSORRT_WITHOUT_BUILDER"] = "1"
    _, installed = support.load()
    try:
        support.require_builder(installed, 3 << 29)
    except TensorRTError as error:
        print(error, flush=True)
    return {"returned": True}


def upstream_crashes() -> dict[str, Any]:
    """The same to Torch-TensorRT."""
    os.environ["TENSORRT_WITHOUT_BUILDER"] = "1"
    return build_fp32()


def _pretend_gpu() -> None:
    support.find_gpu = lambda index: Gpu(index, "NVIDIA Stand-in", (9, 0))


def calibrate() -> dict[str, Any]:
    """The whole calibration, up to the builder; the old table must survive."""
    _pretend_gpu()
    building.gpu_device = lambda index: CPU
    path = Path(sys.argv[1]) / "CalibrationTableLeNet"
    path.write_text("the old table\n")
    config = EngineConfig()
    calibration.calibrate(network(), lambda: (Images(), SUBSET), path, provenance(), config, recalibrate=True)
    return {"returned": True}


def engine(mode: Literal["implicit", "explicit"] = "implicit") -> dict[str, Any]:
    """The engine behind the interface, from configuration to the builder; implicit INT8 is from TensorRT's table."""
    from engines.tensorrt.engine import TorchTensorRTEngine

    _pretend_gpu()
    _, installed = support.load()
    building.gpu_device = lambda index: CPU
    net = network()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tensorrt" / "CalibrationTableLeNet"
        calibration.store(path, table().dumps().encode(), calibration.own_provenance(provenance(), net, installed))
        engine = TorchTensorRTEngine(EngineConfig(), QuantizationConfig(mode=mode), Path(folder), SHAPE[:1])
        assert engine.unavailable() is None
        print(json.dumps(engine.mode("entropy2")), flush=True)
        engine.compile(net, "int8", table())
    return {"returned": True}


def engine_explicit() -> dict[str, Any]:
    return engine("explicit")


FACTS = (versions, delivers, algorithms, reads_table, keeps_exceptions, parses, supports)
ENDINGS = (
    build_fp32,
    build_fp16,
    build_half,
    build_explicit,
    needs_builder,
    without_builder,
    upstream_crashes,
    lowered,
    calibrate,
    engine,
    engine_explicit,
    upstream_aborts,
)
NEED_CALIBRATOR = (delivers, algorithms, reads_table, keeps_exceptions, calibrate, engine, upstream_aborts)


def ending(scenario: Callable[[], dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Run a scenario in a fork: its exit code (negative for a signal), stdout and stderr."""
    out, err = folder / f"{scenario.__name__}.out", folder / f"{scenario.__name__}.err"
    child = os.fork()
    if child == 0:
        for path, stream in ((out, sys.stdout), (err, sys.stderr)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream.fileno())
        code = 1
        try:
            scenario()
            code = 0
        except BaseException:  # noqa: BLE001 - the child reports it and ends
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return {"code": os.waitstatus_to_exitcode(status), "stdout": out.read_text(), "stderr": err.read_text()}


def main() -> None:
    torch.set_num_threads(1)  # the threads of a pool do not survive a fork
    folder = Path(sys.argv[1])
    facts = {"versions": versions()}
    able = [item for item in (*FACTS, *ENDINGS) if item not in NEED_CALIBRATOR or facts["versions"]["calibrator"]]
    endings = {item.__name__: ending(item, folder) for item in ENDINGS if item in able}
    facts |= {item.__name__: item() for item in FACTS if item in able}
    print(json.dumps({**facts, "endings": endings}))


if __name__ == "__main__":
    main()
