"""Calibrating over a stand-in for Torch-TensorRT (the real one: tests/contract)."""

import pytest
import torch

from calib import cache
from calib.subset import Subset
from calib.table import CalibrationTable
from calib.tracing import trace
from common.config import EngineConfig
from engines.gpu import Gpu
from engines.tensorrt import build, calibration, support
from engines.tensorrt.support import TensorRTError
from models import LeNet
from tests.upstream import INSTALLED, TABLE, Upstream, provenance

CPU = torch.device("cpu")
SHAPE = (2, 1, 28, 28)


class Images:
    def __init__(self, broken=False):
        self.asked = []
        self._broken = broken

    def __len__(self):
        return 12

    def images(self, index):
        self.asked.append(index.tolist())
        if self._broken and len(self.asked) > 2:
            raise OSError("disk gone")
        return torch.rand(len(index), 1, 28, 28)


SUBSET = Subset(torch.tensor([7, 3, 11, 0]), 2)


@pytest.fixture
def network():
    torch.manual_seed(1)
    return trace(LeNet(), "LeNet", (1, 28, 28))


@pytest.fixture
def here(monkeypatch):
    """A machine with a GPU and an upstream that the test gives."""
    monkeypatch.setattr(build, "gpu_device", lambda index: CPU)

    def use(upstream, capability=(9, 0)):
        monkeypatch.setattr(support, "find_gpu", lambda index: Gpu(index, "NVIDIA Test", capability))
        monkeypatch.setattr(support, "load", lambda: (upstream, INSTALLED))
        return upstream

    return use


def calibrate(network, source, path, recalibrate=False, **changes):
    """Calibrate with TensorRT over SUBSET of ``source``."""
    return calibration.calibrate(
        network, lambda: (source, SUBSET), path, provenance(**changes), EngineConfig(), recalibrate
    )


class TestCalibrating:
    def path(self, tmp_path):
        return tmp_path / "tensorrt" / "CalibrationTableLeNet"

    def test_calibrates_once_and_then_touches_no_data(self, here, network, tmp_path):
        upstream = here(Upstream())
        source = Images()
        first = calibrate(network, source, self.path(tmp_path))
        assert first.calibrated
        assert first.table.scales == TABLE.scales
        assert self.path(tmp_path).read_text() == TABLE.dumps()
        assert source.asked[-2:] == [[7, 3], [11, 0]]
        asked = len(source.asked)
        again = calibrate(network, source, self.path(tmp_path))
        assert not again.calibrated
        assert len(source.asked) == asked
        assert len(upstream.calls) == 1

    def test_records_what_tensorrt_was_given(self, here, network, tmp_path):
        here(Upstream())
        calibrate(network, Images(), self.path(tmp_path))
        recorded = cache.read_provenance(self.path(tmp_path))
        assert recorded is not None
        assert recorded.maker == "tensorrt"
        assert recorded.tensorrt_version == "10.12.0"
        assert recorded.weights == cache.weights_fingerprint(network.module)

    def test_uses_the_static_shape_of_the_calibration_batch(self, here, network, tmp_path):
        upstream = here(Upstream())
        calibrate(network, Images(), self.path(tmp_path))
        assert upstream.calls[0][1]["inputs"] == [(SHAPE, torch.float)]
        assert upstream.calls[0][1]["enabled_precisions"] == {torch.int8, torch.float}

    @pytest.mark.parametrize(
        ("upstream", "message"),
        [
            (Upstream(error=RuntimeError("[Error thrown at a.cpp:1] no kernel")), "no kernel"),
            (Upstream(batches=1), "took 1 of 2 calibration batches"),
            (Upstream(table=None), "without writing a calibration table"),
            (Upstream(supported=False), "a calibrator serves one engine"),
        ],
    )
    def test_a_failure_keeps_the_old_table(self, here, network, tmp_path, upstream, message):
        here(Upstream())
        path = self.path(tmp_path)
        calibrate(network, Images(), path)
        before = {item.name: item.read_bytes() for item in path.parent.iterdir()}
        here(upstream)
        with pytest.raises(TensorRTError, match=message):
            calibrate(network, Images(), path, recalibrate=True)
        assert {item.name: item.read_bytes() for item in path.parent.iterdir()} == before

    @pytest.mark.parametrize("error", [None, RuntimeError("no ranges")])
    def test_what_a_callback_raised_is_the_cause(self, here, network, tmp_path, error):
        here(Upstream(error=error))
        with pytest.raises(OSError, match="disk gone"):
            calibrate(network, Images(broken=True), self.path(tmp_path))
        assert not self.path(tmp_path).exists()

    def test_a_torn_table_is_made_again(self, here, network, tmp_path):
        here(Upstream())
        path = self.path(tmp_path)
        calibrate(network, Images(), path)
        path.write_text("TRT-101200-Entropy")
        again = calibrate(network, Images(), path)
        assert again.calibrated
        assert "line 1" in again.reason

    def test_an_edited_table_is_made_again(self, here, network, tmp_path):
        here(Upstream())
        path = self.path(tmp_path)
        calibrate(network, Images(), path)
        path.write_text(CalibrationTable({"input_0": 0.5, "output_0": 0.02}).dumps())
        assert calibrate(network, Images(), path).calibrated

    def test_a_gpu_without_int8(self, here, network, tmp_path, monkeypatch):
        here(Upstream(), capability=(6, 0))
        monkeypatch.setattr(support, "gpu_problem", lambda gpu: None)
        with pytest.raises(TensorRTError, match="no INT8 arithmetic"):
            calibrate(network, Images(), self.path(tmp_path))

    def test_percentile(self, here, network, tmp_path):
        here(Upstream())
        with pytest.raises(TensorRTError, match="no percentile calibration"):
            calibrate(network, Images(), self.path(tmp_path), algorithm="percentile")
