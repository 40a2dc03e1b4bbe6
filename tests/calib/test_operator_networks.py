"""Tables that TensorRT 10.6.0 wrote on an H100: operators behind poolings, and what layer fusion leaves.

``tensorrt/operators/networks.tar.xz`` holds them, ``tables.json`` network -> algorithm -> entry -> scale as hex digits
that are not padded (TF32 off, builder level 0). The images come from a seed.
"""

import json
import re
import zlib
from pathlib import Path

import numpy as np
import onnx
import pytest

from calib.onnx.rules import FUSED_ALGORITHMS
from calib.table import scale_from_hex
from tests.calib.onnx.networks import stored_models, table_of

HERE = Path(__file__).parent / "tensorrt" / "operators"
TABLES = json.loads((HERE / "tables.json").read_text())


@pytest.fixture(scope="module")
def networks():
    return stored_models(HERE / "networks.tar.xz")


def images(name, shape):
    """Float32 [4, N, C, ...]: 4 batches, as TensorRT was given them."""
    generator = np.random.default_rng(zlib.crc32(name.encode()) + 1)
    values = generator.integers(-127, 128, (4, *shape))
    values = values * generator.integers(1, 5, (4, *shape[:2]) + (1,) * (len(shape) - 2))
    return (values / np.float32(128)).astype(np.float32)


# Layers that the parser does not name, ArgMax, ReduceLogSum, and CumSum, behind which numbers are too low.
MISSING = {
    "inside": re.compile(
        r"\(Unnamed.*|ONNXTRT_(ShapeShuffle|ShapeSlice|castHelper|Broadcast).*|/(ArgMax|ReduceLogSum)_output"
    ),
    # The factors of a Gemm and of a mean, the bias times its factor, and a mean of one.
    "products": re.compile(r"\(Unnamed.*|ONNXTRT_Broadcast_33_output"),
    "several": re.compile(r"\(Unnamed.*|ONNXTRT_identity_8_output"),
}
# After layer fusion: the mean of a single value, and what a product of matrices is followed by.
EXTRA_AFTER_FUSION = {
    "chains": {"/GlobalAveragePool_9_output_0"},
    "flat": {"/Relu_2_output_0", "/Gemm_1_output_0", "/Gemm_2_output_0", "/Sigmoid_output_0"},
}
# A near-tie is decided by the last bits of a sum, on other CPUs as well.
ELSEWHERE = 1


@pytest.mark.parametrize("case", [f"{name}.{algorithm}" for name in TABLES for algorithm in TABLES[name]])
def test_tables_of_tensorrt(case, networks, tmp_path):
    name, algorithm = case.split(".")
    shape = [size.dim_value for size in networks[name].graph.input[0].type.tensor_type.shape.dim]
    onnx.save(networks[name], tmp_path / "network.onnx")
    np.save(tmp_path / "images.npy", images(name, shape))
    found = table_of(tmp_path / "network.onnx", tmp_path / "images.npy", tmp_path, "--algorithm", algorithm).scales
    wanted = {entry: scale_from_hex(digits) for entry, digits in TABLES[name][algorithm].items()}
    if algorithm in FUSED_ALGORITHMS:
        assert found.keys() - wanted.keys() == EXTRA_AFTER_FUSION.get(name, set())
        assert wanted.keys() <= found.keys()
        differ = {entry for entry in wanted if found[entry] != pytest.approx(wanted[entry], rel=1e-4, abs=0)}
        assert len(differ) <= ELSEWHERE, differ
        return
    missing = wanted.keys() - found.keys()
    assert all(MISSING[name].fullmatch(entry) for entry in missing) if missing else name not in MISSING
    assert all(entry.startswith("ONNXTRT_Broadcast") for entry in found.keys() - wanted.keys())
    assert name in MISSING or found.keys() == wanted.keys()
    both = found.keys() & wanted.keys()
    differ = {entry for entry in both if found[entry] != pytest.approx(wanted[entry], rel=1e-4, abs=0)}
    assert len(differ) <= (ELSEWHERE if algorithm == "entropy2" else 0), differ
