"""Eager PyTorch: FP32 and FP16 as they are, INT8 as the exact integer simulation. Runs anywhere."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from calib.network import Network
from calib.plan import plan_int8
from calib.table import CalibrationTable
from common.config import EngineConfig, PrecisionName, QuantizationConfig
from engines.base import Compiled, Engine, EngineError, Outputs, as_outputs, int8_size
from engines.integer import IntegerNetwork


class TorchEngine(Engine):
    """PyTorch on the CPU, layer by layer."""

    name = "torch"

    def __init__(self, config: EngineConfig, quantization: QuantizationConfig, *_: object) -> None:
        self._config = config
        self._quantization = quantization

    def unavailable(self) -> str | None:
        """None: PyTorch is always there."""
        return None

    def compile(self, network: Network, precision: PrecisionName, table: CalibrationTable | None) -> Compiled:
        """See :meth:`engines.base.Engine.compile`."""
        if self._config.threads is not None:
            torch.set_num_threads(self._config.threads)
        device = f"CPU ({torch.get_num_threads()} threads)"
        parameters = sum(parameter.numel() for parameter in network.module.parameters())
        if precision == "fp32":
            module = network.module

            def run_fp32(images: Tensor) -> Tensor | Outputs:
                with torch.inference_mode():
                    return module(images)  # type: ignore[no-any-return]

            return Compiled(self.name, precision, device, run_fp32, 4 * parameters)
        if precision == "fp16":
            half = _half(network)

            def run_fp16(images: Tensor) -> Outputs:
                with torch.inference_mode():
                    return tuple(output.float() for output in as_outputs(half(images.half())))

            note = "FP16 on a CPU: the accuracy counts, the latency is not representative"
            return Compiled(self.name, precision, device, run_fp16, 2 * parameters, latency_note=note)
        if table is None:
            raise EngineError("INT8 needs a calibration table: run quantize.py --precision int8")
        plan = plan_int8(network, table, self._quantization.keep_fp, self._quantization.quantize_output)
        return Compiled(
            self.name,
            precision,
            device,
            IntegerNetwork(plan),
            int8_size(plan),
            latency_note="simulated: exact integer arithmetic in float kernels",
            details={"int8 layers": ", ".join(layer.name for layer in network.layers if layer.name in plan.layers)},
        )


def _half(network: Network) -> torch.nn.Module:
    """A float16 copy of the network."""
    return copy.deepcopy(network.module).half()
