"""Average pooling between pairs: all readers of the CPU's file give the exact mean of the codes, rounded to even."""

from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from calib.onnx.from_qdq import table_of_quantized
from calib.onnx.pools import average_codes, pad_in_front
from calib.plan import plan_int8
from calib.table import CalibrationTable
from calib.tracing import trace
from engines.onnx.int8 import int8_model
from engines.onnxruntime.engine import open_session

SHAPE = (2, 8, 12, 12)
SCALE = 0.00426
POOLS = {
    "even": nn.AvgPool2d(2),
    "uneven": nn.AvgPool2d((2, 3), 1),
    "padded": nn.AvgPool2d(2, 2, 1),
    "padding not counted": nn.AvgPool2d(3, 1, 1, count_include_pad=False),
    "beyond the edge": nn.AvgPool2d(3, 2, ceil_mode=True),
    "beyond the padding": nn.AvgPool2d(3, 2, 1, ceil_mode=True),
}


def codes() -> Tensor:
    return torch.randint(-128, 128, SHAPE, generator=torch.Generator().manual_seed(0))


def model(pool: nn.AvgPool2d, behind: float = SCALE) -> onnx.ModelProto:
    """Codes in uint8, dequantized, pooled and quantized."""
    size, stride, padding = (
        [value, value] if isinstance(value, int) else list(value)
        for value in (pool.kernel_size, pool.stride, pool.padding)
    )
    settings = {
        "kernel_shape": size,
        "strides": stride,
        "pads": [*padding, *padding],
        "ceil_mode": int(pool.ceil_mode),
        "count_include_pad": int(pool.count_include_pad),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["values"], "before"),
        helper.make_node("AveragePool", ["values"], ["means"], "pool", **settings),
        helper.make_node("QuantizeLinear", ["means", "scale_behind", "zero"], ["result"], "behind"),
    ]
    weights = {"scale": np.float32(SCALE), "scale_behind": np.float32(behind), "zero": np.uint8(128)}
    graph = helper.make_graph(
        nodes,
        "pool",
        [helper.make_tensor_value_info("codes", TensorProto.UINT8, SHAPE)],
        [helper.make_tensor_value_info("result", TensorProto.UINT8, [None] * 4)],
        [numpy_helper.from_array(np.array(value), name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("name", POOLS)
def test_codes_are_averaged_exactly(name: str, optimize: bool) -> None:
    written = model(POOLS[name])
    average_codes(written)
    pad_in_front(written, codes=True)
    onnx.checker.check_model(written, full_check=True)
    session, optimized = open_session(written, 1, optimize)
    (found,) = session.run(None, {"codes": (codes() + 128).numpy().astype(np.uint8)})
    expected = POOLS[name](codes().double()).round()
    assert torch.equal(torch.from_numpy(found).double() - 128, expected)
    assert ("AveragePool" in {node.op_type for node in optimized.graph.node}) != optimize


@pytest.mark.parametrize("for_cpu", [False, True])
@pytest.mark.parametrize("name", ["even", "beyond the padding"])
def test_the_way_back_finds_the_scale_of_the_values(name: str, for_cpu: bool) -> None:
    pools = {"first": POOLS[name], "second": copy.deepcopy(POOLS[name])}
    layers = {"conv": nn.Conv2d(3, 4, 1), **pools, "last": nn.Conv2d(4, 2, 1), "flat": nn.Flatten()}
    network = trace(nn.Sequential(OrderedDict(layers)), "twice", (3, 12, 12))
    table = CalibrationTable(dict.fromkeys(network.tensors, SCALE))
    found = table_of_quantized(int8_model(plan_int8(network, table), for_cpu), Path("twice.onnx"))
    onnx.checker.check_model(found.model, full_check=True)
    assert [found.scales[tensor] for tensor in ("conv", "first", "second")] == pytest.approx([SCALE] * 3)


def test_pooling_to_another_scale_stays_as_it_is() -> None:
    written, before = (model(nn.AvgPool2d(2), 2 * SCALE) for _ in range(2))
    average_codes(written)
    pad_in_front(written, codes=True)
    assert written == before
