"""The time of a network by kind of operator."""

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper
from torch import nn

from benchmarks import kernels


def test_a_model_is_taken_apart() -> None:
    weight = numpy_helper.from_array(np.ones((64, 64), np.float32), "weight")
    nodes = [
        helper.make_node("MatMul", ["data", "weight"], ["product"]),
        helper.make_node("Softmax", ["product"], ["prob"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [8, 64]) for name in ("data", "prob")]
    graph = helper.make_graph(nodes, "network", ends[:1], ends[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)

    seconds = kernels.profile({"one": model, "two": model}, np.zeros((8, 64), np.float32), rounds=3)

    for found in seconds.values():
        assert list(found) == [*kernels.KINDS, kernels.OTHERS]
        assert found[kernels.PRODUCTS] > 0 or found[kernels.OTHERS] > 0
        assert found["pooling"] == 0


def test_events_are_summed_by_kind_and_the_first_do_not_count() -> None:
    def events(name: str, operator: str, durations: list[int]) -> list[dict[str, object]]:
        return [
            {"cat": "Node", "name": f"{name}_kernel_time", "args": {"op_name": operator}, "dur": d} for d in durations
        ]

    found = kernels._by_kind(
        [
            {"cat": "Session", "name": "model_run", "dur": 999},
            *events("conv1", "Conv", [900, 900, 900, 10, 20, 30]),
            *events("conv2", "Conv", [900, 900, 900, 1, 2, 3]),
            *events("pool1", "MaxPool", [0, 0, 0, 7, 7, 7]),
        ]
    )

    expected = {kernels.PRODUCTS: 22e-6, "pooling": 7e-6, "conversion of type and layout": 0, kernels.OTHERS: 0}
    assert found == pytest.approx(expected)


def test_a_training_step_is_taken_apart() -> None:
    """Multiply-accumulates count as two; the first layer's input needs no gradient, the linear layer's does."""
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4 * 6 * 6, 5))
    images = torch.rand(3, 2, 8, 8)

    parts = kernels.training_parts(lambda: network(images).sum().backward(), rounds=2)

    convolution, linear = 3 * 36 * 9 * 2 * 4, 3 * 144 * 5
    assert {kind: part.operations for kind, part in parts.items()} == {
        kernels.FORWARD: 2 * convolution,
        kernels.BACKWARD: 2 * convolution,
        kernels.MATRICES: 2 * 3 * linear,
        kernels.OTHERS: 0,
    }
    assert all(part.seconds > 0 for part in parts.values())
