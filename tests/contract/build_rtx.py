"""Parse and build ONNX files with TensorRT-RTX, for a GPU that need not be here; prints JSON.

    python tests/contract/build_rtx.py .contract/rtx network.onnx ...

TensorRT-RTX has the parser and the builder of TensorRT and takes explicit quantization alone. Engines are built for
compute capability 8.9 (Ada), ahead of time.
"""

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

BATCH = 4


def load(site: Path) -> Any:
    """The module ``tensorrt_rtx_bindings`` over the libraries that ONNX Runtime's package of TensorRT-RTX carries."""
    libraries = site / "onnxruntime_ep_nv_tensorrt_rtx"
    for stem in ("libcudart", "libtensorrt_rtx", "libtensorrt_onnxparser_rtx"):
        (library,) = libraries.glob(f"{stem}.so.*")
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    sys.path.insert(0, str(site))
    import tensorrt_rtx_bindings

    return tensorrt_rtx_bindings


def build(trt: Any, path: str) -> dict[str, Any]:
    """What became of one file: ``size`` of the engine, 0 if there is none, and what the parser and builder said."""
    errors: list[str] = []

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                errors.append(message)

    logger = Log()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(path):
        return {"file": path, "parsed": False, "size": 0, "errors": errors}
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    profile = builder.create_optimization_profile()
    source = network.get_input(0)
    shape = (BATCH, *source.shape[1:])
    profile.set_shape(source.name, shape, shape, shape)
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    return {"file": path, "parsed": True, "size": engine.nbytes if engine else 0, "errors": errors}


if __name__ == "__main__":
    bindings = load(Path(sys.argv[1]))
    print(json.dumps([build(bindings, path) for path in sys.argv[2:]]))
