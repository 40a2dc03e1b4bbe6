"""Tables and legacy thresholds that TensorRT 10.6.0 wrote on an H100 (``tensorrt/seeded``, see the README there)."""

import gzip
import json

import numpy as np
import pytest

from calib.algorithms import threshold
from calib.histogram.base import BINS, AbsHistogram
from calib.onnx.model import read_float_model
from calib.onnx.observe import Observed
from calib.onnx.rules import entries
from calib.table import CalibrationTable
from tests.calib.onnx.networks import table_of
from tests.calib.seeded_networks import HERE, write
from tests.calib.test_tensorrt_thresholds import histograms  # noqa: F401

TABLES = sorted(path.name for path in (HERE / "tables").glob("*.cache"))

ROUNDING = {
    # Means of normalized values, and their product: zero but for rounding, 1e-7 beside values of 1.
    "preact": {"adaptive_avg_pool2d", "adaptive_avg_pool2d/flatten", "fc"},
    # A value 1.7e-6 above the edge of a bin that is empty here, and which TensorRT's approximate SiLU fills.
    "efficientnet_b0": {"features.1.0.block.0.2"},
}
# A constant without a name.
MISSING = {"mixed": {"(Unnamed Layer* 54) [Constant]_output"}}
# Divergences this close are decided by the last bits of a convolution.
TIE = 1e-5
# None is left on the CPUs tried; on others, a value may fall beside the edge of a bin that is empty here.
ELSEWHERE = 2


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_tensorrt(name, tmp_path):
    network, algorithm, _ = name.split(".")
    onnx_file, batches = write(network, tmp_path)
    wanted = CalibrationTable.read(HERE / "tables" / name)
    version = ["--algorithm", algorithm, "--tensorrt-version", "10.6.0"]
    found = table_of(onnx_file, batches, tmp_path, *version)
    assert found.header == wanted.header

    fused = algorithm == "entropy"
    assert wanted.scales.keys() - found.scales.keys() == (set() if fused else MISSING.get(network, set()))
    extra = found.scales.keys() - wanted.scales.keys()
    assert not extra

    differ = {
        tensor
        for tensor in wanted.scales.keys() & found.scales.keys() - ROUNDING.get(network, set())
        if found.scales[tensor] != pytest.approx(wanted.scales[tensor], rel=1e-4, abs=0)
    }
    assert not differ or algorithm == "entropy2"
    unexplained = {
        tensor
        for tensor, values in _values(onnx_file, np.load(batches), differ).items()
        if not (_is_tie(values, wanted.scales[tensor]) or _doubled_otherwise(values, wanted.scales[tensor]))
    }
    assert len(unexplained) <= ELSEWHERE, unexplained


def _values(path, batches, names):
    """The values behind some entries of the table, by batches."""
    found, model = entries(read_float_model(path), "entropy2", path.parent)
    sources = {entry.name: entry.value for entry in found if entry.value}
    # All of them, so that ONNX Runtime fuses what it fuses in calibration.
    observed = Observed(path, model, list(sources.values())) if names else None
    runs = [observed.run({model.graph.input[0].name: batch}) for batch in batches] if observed else []
    return {name: [run[sources[name]] for run in runs] for name in names}


def _is_tie(batches, scale):
    """Whether TensorRT's candidate is as good as the one taken here, but for the last bits."""
    histogram = AbsHistogram()
    for batch in batches:
        histogram.add(batch)
    divergences = threshold(histogram).divergences
    kept = scale * 127 * BINS / histogram.range - 0.5
    candidate = round(kept) - 128
    near = abs(kept - round(kept)) < 0.01 and 0 <= candidate < len(divergences)
    # And what two values change that fall into other bins.
    return near and divergences[candidate] < divergences.min() + TIE + 2 / histogram.total


def _doubled_otherwise(batches, scale):
    """Whether the batches' largest values are the same but for rounding, so that a range doubles on one machine and not
    on another, and the other range gives TensorRT's scale."""
    maxima = [float(batch.abs().max()) for batch in batches]
    if max(maxima[1:]) != pytest.approx(maxima[0], rel=1e-6):
        return False
    never, at_once = AbsHistogram(), AbsHistogram()
    never.widen(max(maxima))
    for batch in batches:
        never.add(batch)
        at_once.add(batch)
        at_once.widen(float(np.nextafter(np.float32(maxima[0]), np.float32(np.inf))))
    return any(threshold(one).value / 127 == pytest.approx(scale, rel=1e-4, abs=0) for one in (never, at_once))


def _legacy():
    return json.loads(gzip.decompress((HERE / "legacy.json.gz").read_bytes()))


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.99, 1.0])
def test_legacy_at_other_quantiles(histograms, quantile):  # noqa: F811
    (case,) = [
        case
        for case in _legacy()
        if (case["distributions"], case["quantile"], case["cutoff"]) == ("distributions", quantile, 1)
    ]
    assert len(case["scales"]) == 296
    found = {
        name: np.float32(threshold(histograms[name], "legacy", quantile=quantile).value / 127).view(np.uint32)
        for name in case["scales"]
    }
    assert found == {name: int(digits, 16) for name, digits in case["scales"].items()}
