"""``<net>_int8.onnx`` in TensorRT's own parser and builder on a GPU: the engine gives the simulation's answer."""

import pytest
import torch
from torch import nn

from benchmarks.bare_tensorrt import TensorRT
from calib.plan import plan_int8
from calib.table import CalibrationTable
from calib.tracing import trace
from engines.integer import IntegerNetwork
from engines.onnx.int8 import int8_model
from engines.tensorrt.form import for_tensorrt
from tests.networks import NETWORKS, images, make_network, make_plan

pytestmark = pytest.mark.gpu

BATCH = 100


@pytest.fixture(scope="module")
def engine_of(installed):
    """Plan -> what TensorRT's engine of its file, with whatever kernels, gives for images."""
    tensorrt = TensorRT()

    def make(plan):
        engine = tensorrt.build(int8_model(plan).SerializeToString(), BATCH, int8=True, level=0, timings=1)
        return lambda inputs: torch.cat([engine(batch) for batch in inputs.split(BATCH)])

    return make


class Pooled(nn.Module):
    """Average pooling between two convolutions, of which the second gives the codes that it reads."""

    def __init__(self, pool):
        super().__init__()
        self.first, self.pool, self.last = nn.Conv2d(3, 32, 3, padding=1), pool, nn.Conv2d(32, 32, 1, bias=False)
        nn.init.dirac_(self.last.weight)

    def forward(self, x):
        return self.last(self.pool(torch.relu(self.first(x))))


POOLS = {
    "even": nn.AvgPool2d(2),
    "padding counts": nn.AvgPool2d(3, 1, 1),
    "padding does not count": nn.AvgPool2d(3, 1, 1, count_include_pad=False),
    "beyond the border": nn.AvgPool2d(3, 2, ceil_mode=True),
}


@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
def test_average_pooling_rounds_as_the_simulation_does(engine_of, pool):
    torch.manual_seed(0)
    network = trace(Pooled(pool).eval(), "pooled", (3, 16, 16))
    inputs = torch.rand(BATCH, 3, 16, 16)
    scale = 0.006077843252569437  # in float32 its product with its inverse is less than 1
    plan = plan_int8(network, CalibrationTable(dict.fromkeys(network.tensors, scale)))
    form = for_tensorrt(plan)
    codes = (IntegerNetwork(form)(inputs) / scale).round()
    found = (engine_of(plan)(inputs) / scale).round()
    # A sum of the convolution can lie within rounding of the middle between two codes.
    assert (found != codes).float().mean() < 1e-4


@pytest.mark.parametrize("name", NETWORKS)
def test_gives_what_the_simulation_gives(engine_of, name):
    plan = make_plan(make_network(name))
    inputs = images(name, 10 * BATCH, seed=7)
    found = engine_of(plan)(inputs)
    with torch.inference_mode():
        expected = torch.cat([IntegerNetwork(for_tensorrt(plan))(batch) for batch in inputs.split(BATCH)])
    # Sums in another order can round a value to the other side: single outputs may be off, not their mean.
    off = (found.reshape(expected.shape) - expected).abs() / (expected.max() - expected.min())
    assert off.mean() < 1e-3
    assert off.max() < 0.1
