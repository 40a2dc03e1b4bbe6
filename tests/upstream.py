"""A stand-in for Torch-TensorRT, for tests of what surrounds it; tests/contract has the real one."""

from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

from calib.table import CalibrationTable
from engines.tensorrt.support import Installed

INSTALLED = Installed("2.8.0", "2.8.0", "10.12.0.36")
TABLE = CalibrationTable({"input_0": 0.01, "output_0": 0.02})
"""What its TensorRT writes."""


class Upstream(ModuleType):
    """What of ``torch_tensorrt`` is used; ``compile`` drives the calibrator as TensorRT would."""

    def __init__(self, error=None, table=TABLE, batches=None, supported=True):
        super().__init__("torch_tensorrt")
        self.calls: list[Any] = []
        self.error, self.table, self.batches = error, table, batches
        self.Input = lambda shape, dtype: (shape, dtype)
        self.DeviceType = SimpleNamespace(GPU="gpu", DLA="dla")
        self.logging = SimpleNamespace(errors=nullcontext, debug=nullcontext)
        self.ts = SimpleNamespace(
            check_method_op_support=lambda module, name: supported,
            ptq=SimpleNamespace(
                DataLoaderCalibrator=self._calibrator,
                CalibrationAlgo={"ENTROPY_CALIBRATION_2": "e2", "MINMAX_CALIBRATION": "mm"},
            ),
        )

    @staticmethod
    def _calibrator(loader, algo_type, cache_file, use_cache, device):
        batches = iter(loader)

        def get_batch(self, names):
            batch = next(batches, None)
            return None if batch is None else [batch.data_ptr()]

        def write(self, content):
            with open(cache_file, "wb") as stream:
                stream.write(content)

        members = {"use_cache": use_cache, "get_batch": get_batch, "write_calibration_cache": write}
        return type("Calibrator", (), members)()

    def compile(self, module, **arguments):
        self.calls.append((module, arguments))
        calibrator = arguments.get("calibrator")
        if calibrator is not None and not calibrator.read_calibration_cache():
            taken = 0
            while taken != self.batches and calibrator.get_batch(["input_0"]) is not None:
                taken += 1
            if self.table is not None:
                calibrator.write_calibration_cache(self.table.dumps().encode())
        if self.error:
            raise self.error
        return module
