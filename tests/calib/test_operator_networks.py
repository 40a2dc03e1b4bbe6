"""Tables that TensorRT 10.6.0 wrote on an H100 for networks with an operator behind each of many poolings.

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
    )
}
# Convolutions of one value, of which TensorRT makes one: it counts other values of the first of them.
SIBLINGS = {
    "chains": {"/Conv_output_0"},
    "incept": {f"/Relu_{number}_output_0" for number in (1, 2, 6, 7)},
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
    if algorithm == "entropy":
        # After layer fusion, the names of three networks are all found; what is fused in the others is not.
        assert name not in ("dense", "incept", "shuf") or found.keys() == wanted.keys()
        both = (found.keys() & wanted.keys()) - SIBLINGS.get(name, set())
        differ = {entry for entry in both if found[entry] != pytest.approx(wanted[entry], rel=1e-4, abs=0)}
        assert len(differ) <= ELSEWHERE, differ
        return
    missing = wanted.keys() - found.keys()
    assert all(MISSING[name].fullmatch(entry) for entry in missing) if missing else name not in MISSING
    assert all(entry.startswith("ONNXTRT_Broadcast") for entry in found.keys() - wanted.keys())
    assert name in MISSING or found.keys() == wanted.keys()
    both = found.keys() & wanted.keys()
    differ = {entry for entry in both if found[entry] != pytest.approx(wanted[entry], rel=1e-4, abs=0)}
    assert len(differ) <= (ELSEWHERE if algorithm == "entropy2" else 0), differ
