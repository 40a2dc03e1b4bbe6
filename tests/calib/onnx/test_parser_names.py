"""The numbers in names that TensorRT 10.6.0's ONNX parser gave (``tensorrt/parser``, see the README there)."""

import json
import re
import zlib
from pathlib import Path

import numpy as np
import onnx
import pytest

from calib.onnx.graph import Graph
from calib.onnx.names import network_names
from calib.onnx.parser_names import ParserNames
from calib.table import scale_from_hex
from tests.calib.onnx.networks import stored_models, table_of

HERE = Path(__file__).parents[1] / "tensorrt" / "parser"
NAMES = json.loads((HERE / "broadcasts.json").read_text())

# What the parser computes for their shapes is not counted: numbers behind it are too low.
NOT_COUNTED = {
    "lrn",  # branches of If
    "cumsum",
    "where2",  # a mean of everything
}

TABLES = json.loads((HERE / "tables.json").read_text())

# What becomes several layers in TensorRT and is one operator here: the values inside have no entries.
INSIDE = {
    "argmax": re.compile("/ArgMax_output"),
    "clampmin": re.compile(r"\(Unnamed Layer\* \d+\) \[(Constant|ElementWise)\]_output"),
    "cumsum": re.compile(r"\(Unnamed.*|ONNXTRT_(Shape|cast).*"),
    "lrn": re.compile("/a(_1)?/(AveragePool_output_0_InputLayer_output|Squeeze_output_0)"),
    "norm": re.compile(r"\(Unnamed.*"),
    "where2": re.compile(r"\(Unnamed.*|ONNXTRT_ShapeShuffle_3_output"),
}
OTHERWISE = {
    # The mean of everything in a batch: a sum of 16,384 values near zero, whose last bits (another processor's are
    # others) decide which values are greater.
    "where2": {"/ReduceMean_output_0", "/Where_output_0", "/Mul_output_0", "prob"},
}


@pytest.fixture(scope="module")
def networks():
    return stored_models(HERE / "networks.tar.xz")


def images(name):
    """Float32 [4, 16, 16, 8, 8]: 4 batches of 16, as TensorRT was given them."""
    generator, shape = np.random.default_rng(zlib.crc32(name.encode())), (4, 16, 16, 8, 8)
    values = generator.integers(-127, 128, shape) * generator.integers(1, 5, shape)
    return (values / np.float32(128)).astype(np.float32)


@pytest.mark.parametrize("name", sorted(TABLES))
def test_tables_of_tensorrt(name, networks, tmp_path):
    onnx.save(networks[name], tmp_path / "network.onnx")
    np.save(tmp_path / "images.npy", images(name))
    found = table_of(tmp_path / "network.onnx", tmp_path / "images.npy", tmp_path).scales
    wanted = {entry: scale_from_hex(digits.zfill(8)) for entry, digits in TABLES[name].items()}

    known = network_names(tmp_path / "network.onnx")
    assert [entry for entry in found if not known.knows(entry)] == []

    numbered = re.compile(r"ONNXTRT_Broadcast(_\d+)?_output")
    if name in NOT_COUNTED:
        found, wanted = ({key: one[key] for key in one if not numbered.fullmatch(key)} for one in (found, wanted))
    assert not found.keys() - wanted.keys()
    missing = wanted.keys() - found.keys()
    assert all(INSIDE[name].fullmatch(entry) for entry in missing) if missing else name not in INSIDE
    differ = {entry for entry in found if found[entry] != pytest.approx(wanted[entry], rel=1e-4, abs=0)}
    assert differ <= OTHERWISE.get(name, set())


@pytest.mark.parametrize("name", sorted(NAMES))
def test_broadcasts_have_the_parsers_names(name, networks):
    model = networks[name]
    graph = Graph(model)
    stored = set(graph.weights) | {node.output[0] for node in model.graph.node if node.op_type == "Constant"}
    parser = ParserNames(model, frozenset(graph.constant))
    found = []
    for node in graph.nodes:
        if node.op_type != "Constant":
            given = parser.read(node)
            found += [given[index] for index in sorted(given) if node.input[index] in stored]
            found += [name for name, _ in parser.made if name.startswith("ONNXTRT_Broadcast")]
    # A bound of Clip that is missing comes before the other one, or behind it.
    found.sort(key=lambda name: int(name.removeprefix("ONNXTRT_Broadcast").lstrip("_") or -1))
    assert (found == NAMES[name]) == (name not in NOT_COUNTED)
