"""Our ONNX files with explicit quantization in the real parser and builder of TensorRT-RTX, which need no GPU.

``int8`` is what ``quantize.py --export onnx`` writes, ``qdq`` what ``python -m calib calibrate --qdq`` makes of a float
file.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

from calib.onnx.qdq import quantize
from calib.table import CalibrationTable
from engines.onnx.float import float_model
from engines.onnx.int8 import int8_model
from tests.contract.made import FOLDER, require
from tests.networks import NETWORKS, make_network, make_plan

pytestmark = pytest.mark.contract

RTX = FOLDER / "rtx"
BUILD = Path(__file__).with_name("build_rtx.py")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Name of a file -> what became of it."""
    require(RTX, "TensorRT-RTX")
    folder = tmp_path_factory.mktemp("rtx")
    paths = []
    for name in NETWORKS:
        plan = make_plan(make_network(name))
        models = {"fp32": float_model(plan.network), "int8": int8_model(plan)}
        values = ["data", *(value for node in models["fp32"].graph.node for value in node.output)]
        models["qdq"] = quantize(models["fp32"], CalibrationTable(dict.fromkeys(values, 0.05)), folder).model
        if name == "lenet":
            models["int8_cpu"] = int8_model(plan, for_cpu=True)
        for form, model in models.items():
            paths.append(folder / f"{name}_{form}.onnx")
            onnx.save(model, paths[-1])
    command = [sys.executable, str(BUILD), str(RTX / "site"), *map(str, paths)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout.splitlines()[-1])
    return {Path(item["file"]).stem: item for item in found}


@pytest.mark.parametrize("form", ["fp32", "int8", "qdq"])
@pytest.mark.parametrize("name", NETWORKS)
def test_is_parsed_and_built(built: dict[str, dict[str, Any]], name: str, form: str) -> None:
    result = built[f"{name}_{form}"]
    assert result["parsed"], result["errors"]
    assert result["size"] > 0, result["errors"]


def test_int8_weights_make_a_smaller_engine(built: dict[str, dict[str, Any]]) -> None:
    assert built["lenet_int8"]["size"] < built["lenet_fp32"]["size"]


def test_the_form_for_the_cpu_is_not_for_tensorrt(built: dict[str, dict[str, Any]]) -> None:
    """Its values are uint8 with zero point 128: TensorRT quantizes symmetrically."""
    result = built["lenet_int8_cpu"]
    assert result["size"] == 0
    assert result["errors"]
