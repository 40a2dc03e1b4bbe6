"""Calibrating over a stand-in for Torch-TensorRT (the real one: tests/contract)."""

import pytest
import torch

from calib import cache
from calib.subset import Subset
from calib.table import CalibrationTable
from common.config import EngineConfig
from engines.tensorrt import calibration
from engines.tensorrt.support import TensorRTError
from tests.records import provenance
from tests.upstream import TABLE, Upstream

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


def calibrate(network, source, path, recalibrate=False, **changes):
    """Calibrate with TensorRT over SUBSET of ``source``."""
    return calibration.calibrate(
        network, lambda: (source, SUBSET), path, provenance(**changes), EngineConfig(), recalibrate
    )


class TestCalibrating:
    @pytest.fixture
    def path(self, tmp_path):
        return tmp_path / "tensorrt" / "CalibrationTableLeNet"

    def test_calibrates_once_and_then_touches_no_data(self, machine, network, path):
        upstream = machine()
        source = Images()
        first = calibrate(network, source, path)
        assert first.calibrated
        assert first.table.scales == TABLE.scales
        assert path.read_text() == TABLE.dumps()
        assert source.asked[-2:] == [[7, 3], [11, 0]]
        asked = len(source.asked)
        again = calibrate(network, source, path)
        assert not again.calibrated
        assert len(source.asked) == asked
        assert len(upstream.calls) == 1

    def test_gives_tensorrt_the_static_shape_and_records_what_it_was_given(self, machine, network, path):
        upstream = machine()
        calibrate(network, Images(), path)
        assert upstream.calls[0][1]["inputs"] == [(SHAPE, torch.float)]
        assert upstream.calls[0][1]["enabled_precisions"] == {torch.int8, torch.float}
        recorded = cache.read_provenance(path)
        assert recorded is not None
        assert (recorded.maker, recorded.tensorrt_version) == ("tensorrt", "10.12.0")
        assert recorded.weights == cache.weights_fingerprint(network.module)

    @pytest.mark.parametrize(
        ("upstream", "message"),
        [
            (Upstream(error=RuntimeError("[Error thrown at a.cpp:1] no kernel")), "no kernel"),
            (Upstream(batches=1), "took 1 of 2 calibration batches"),
            (Upstream(table=None), "without writing a calibration table"),
            (Upstream(supported=False), "a calibrator serves one engine"),
        ],
    )
    def test_a_failure_keeps_the_old_table(self, machine, network, path, upstream, message):
        machine()
        calibrate(network, Images(), path)
        before = {item.name: item.read_bytes() for item in path.parent.iterdir()}
        machine(upstream)
        with pytest.raises(TensorRTError, match=message):
            calibrate(network, Images(), path, recalibrate=True)
        assert {item.name: item.read_bytes() for item in path.parent.iterdir()} == before

    @pytest.mark.parametrize("error", [None, RuntimeError("no ranges")])
    def test_what_a_callback_raised_is_the_cause(self, machine, network, path, error):
        machine(Upstream(error=error))
        with pytest.raises(OSError, match="disk gone"):
            calibrate(network, Images(broken=True), path)
        assert not path.exists()

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            ("TRT-101200-Entropy", "line 1"),
            (CalibrationTable({"input_0": 0.5, "output_0": 0.02}).dumps(), "the table was changed since"),
        ],
    )
    def test_a_torn_or_edited_table_is_made_again(self, machine, network, path, content, reason):
        machine()
        calibrate(network, Images(), path)
        path.write_text(content)
        again = calibrate(network, Images(), path)
        assert again.calibrated
        assert reason in again.reason

    def test_percentile(self, machine, network, path):
        machine()
        with pytest.raises(TensorRTError, match="no percentile calibration"):
            calibrate(network, Images(), path, algorithm="percentile")
