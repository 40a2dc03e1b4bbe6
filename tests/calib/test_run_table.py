"""Which table a run takes: the cached one or a new one, and how it is made."""

import dataclasses
from pathlib import Path

import pytest
import torch

from calib.cache import read_provenance
from calib.calibrator import calibrate, find_thresholds
from calib.collect import collect
from calib.run_table import collector, run_table
from calib.tracing import trace
from common.config import EngineConfig
from common.errors import InputError
from common.processes import ALONE
from models import LeNet
from tests.records import provenance


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return trace(LeNet(), "LeNet", (1, 28, 28))


@pytest.fixture(scope="module")
def images():
    return list(torch.rand(2, 4, 1, 28, 28, generator=torch.Generator().manual_seed(1)))


@pytest.fixture
def wanted():
    return provenance()


@pytest.fixture
def make(network, images):
    """Calibrates, and counts how often."""

    def run():
        run.calls += 1
        return find_thresholds(collect(network, images), "entropy2")

    run.calls = 0
    return run


def test_a_table_is_made_once_and_then_reused(tmp_path: Path, wanted, make):
    own = tmp_path / "CalibrationTableLeNet"
    made, again = (run_table(own, None, wanted, make) for _ in range(2))
    assert make.calls == 1
    assert made.calibration is not None
    assert again.calibration is None
    assert again.table == made.table
    assert read_provenance(own).weights == "def"
    assert run_table(own, None, wanted, make, recalibrate=True).calibration is not None


def test_a_named_table_goes_before_the_runs_own(tmp_path: Path, wanted, make):
    own, named = tmp_path / "own", tmp_path / "named"
    run_table(own, None, wanted, make)
    assert run_table(own, named, wanted, make).path == named
    assert named.read_bytes() == own.read_bytes()
    with pytest.raises(InputError, match="was made for other weights"):
        run_table(own, named, dataclasses.replace(wanted, weights="other"), make)
    assert make.calls == 2


def test_a_calibration_that_fails_leaves_the_old_table(tmp_path: Path, wanted, make):
    own = tmp_path / "own"
    run_table(own, None, wanted, make)
    before = own.read_bytes()

    def fail():
        raise InputError("no images")

    with pytest.raises(InputError, match="no images"):
        run_table(own, None, wanted, fail, recalibrate=True)
    assert own.read_bytes() == before


def test_the_collector_counts_all_batches(network, images):
    histograms = collector(network, images, ALONE, EngineConfig())()
    assert histograms.images == 8
    assert len(histograms.batch_seconds) == len(images)
    assert find_thresholds(histograms, "entropy2").table == calibrate(network, images)
