"""``<net>_int8.onnx`` in TensorRT's own parser and builder on a GPU: the engine gives the simulation's answer."""

import pytest
import torch
from torch import nn

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
def trt(installed):
    import tensorrt

    return tensorrt


def built(trt, model):
    """An engine for batches of BATCH; any kernel will do."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(model.SerializeToString()), [str(parser.get_error(k)) for k in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.set_flag(trt.BuilderFlag.INT8)
    config.clear_flag(trt.BuilderFlag.TF32)
    config.builder_optimization_level = 0
    profile = builder.create_optimization_profile()
    source = network.get_input(0)
    shape = (BATCH, *source.shape[1:])
    profile.set_shape(source.name, shape, shape, shape)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None
    return trt.Runtime(logger).deserialize_cuda_engine(plan)


def run(engine, inputs):
    """float32 [1000, C, H, W] -> what the engine gives, on the CPU."""
    context = engine.create_execution_context()
    source, result = (engine.get_tensor_name(index) for index in range(2))
    taken = torch.empty(BATCH, *inputs.shape[1:], device="cuda")
    given = torch.empty(tuple(context.get_tensor_shape(result)), device="cuda")
    context.set_tensor_address(source, taken.data_ptr())
    context.set_tensor_address(result, given.data_ptr())
    stream = torch.cuda.Stream()
    parts = []
    for batch in inputs.split(BATCH):
        taken.copy_(batch)
        torch.cuda.synchronize()
        assert context.execute_async_v3(stream.cuda_stream)
        stream.synchronize()
        parts.append(given.cpu())
    return torch.cat(parts)


class Pooled(nn.Module):
    """Average pooling between two convolutions, of which the second gives the codes that it reads."""

    def __init__(self, pool):
        super().__init__()
        self.first, self.pool, self.last = nn.Conv2d(3, 32, 3, padding=1), pool, nn.Conv2d(32, 32, 1, bias=False)
        nn.init.dirac_(self.last.weight)

    def forward(self, x):
        return self.last(self.pool(torch.relu(self.first(x))))


@pytest.mark.parametrize("pool", [nn.AvgPool2d(2), nn.AvgPool2d(3, 1, 1)])
def test_average_pooling_rounds_as_the_simulation_does(trt, pool):
    torch.manual_seed(0)
    network = trace(Pooled(pool).eval(), "pooled", (3, 16, 16))
    inputs = torch.rand(BATCH, 3, 16, 16)
    scale = 2**-6  # with a scale whose inverse is rounded, TensorRT's product of the two may be less than 1
    plan = plan_int8(network, CalibrationTable(dict.fromkeys(network.tensors, scale)))
    form = for_tensorrt(plan)
    codes = (IntegerNetwork(form)(inputs) / scale).round()
    found = (run(built(trt, int8_model(plan)), inputs) / scale).round()
    # A sum of the convolution can lie within rounding of the middle between two codes.
    assert (found != codes).float().mean() < 1e-4


@pytest.mark.parametrize("name", NETWORKS)
def test_gives_what_the_simulation_gives(trt, name):
    plan = make_plan(make_network(name))
    inputs = images(name, 10 * BATCH, seed=7)
    found = run(built(trt, int8_model(plan)), inputs)
    with torch.inference_mode():
        expected = torch.cat([IntegerNetwork(for_tensorrt(plan))(batch) for batch in inputs.split(BATCH)])
    # Sums in another order can round a value to the other side: single outputs may be off, not their mean.
    off = (found.reshape(expected.shape) - expected).abs() / (expected.max() - expected.min())
    assert off.mean() < 1e-3
    assert off.max() < 0.1
