"""Ways to execute a network behind one interface: eager PyTorch, ONNX Runtime, Torch-TensorRT.

The package holds their names alone: the configuration reads them, and must start at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

ENGINES: Mapping[str, str] = MappingProxyType(
    {
        "torch": "engines.eager:TorchEngine",
        "onnxruntime": "engines.onnxruntime.engine:OnnxRuntimeEngine",
        "torch-tensorrt": "engines.tensorrt.engine:TorchTensorRTEngine",
    }
)
"""Name -> ``module:class``. ``auto`` takes the last that can run; the first one always can."""
