"""The numbers in names that TensorRT 10.6.0's ONNX parser gave (``tensorrt/parser``, see the README there)."""

import json
import lzma
import tarfile
from io import BytesIO
from pathlib import Path

import onnx
import pytest

from calib.onnx_parser_names import ParserNames
from calib.onnx_rules import Graph

HERE = Path(__file__).parent / "tensorrt" / "parser"
NAMES = json.loads((HERE / "broadcasts.json").read_text())

# What the parser computes for their shapes is not counted: numbers behind it are too low.
NOT_COUNTED = {
    *("lrn", "pad", "padr"),  # Pad, and slices of its sizes
    "cumsum",
    "where2",  # a mean of everything
}


@pytest.fixture(scope="module")
def networks():
    with tarfile.open(fileobj=BytesIO(lzma.decompress((HERE / "networks.tar.xz").read_bytes()))) as archive:
        return {
            member.name.removesuffix(".onnx"): onnx.load_from_string(archive.extractfile(member).read())
            for member in archive.getmembers()
        }


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
