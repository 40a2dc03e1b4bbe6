"""``<net>_int8.onnx`` in TensorRT's own parser and builder on a GPU: the engine gives the simulation's answer."""

import pytest
import torch

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
