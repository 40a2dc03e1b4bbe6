import math

import torch

from models import LeNet


def test_names_and_parameters():
    network = LeNet()
    assert [name for name, _ in network.named_children()] == [
        *("conv1", "pool1", "conv2", "pool2", "ip1", "relu1", "ip2", "prob"),
    ]
    assert sum(parameter.numel() for parameter in network.parameters()) == 431_080


def test_layers_are_those_of_caffe():
    """conv 20 5x5, max 2/2, conv 50 5x5, max 2/2, 500, ReLU, 10, softmax; nothing between convolution and pooling."""
    network = LeNet().eval()
    images = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    functional = torch.nn.functional
    values = functional.max_pool2d(functional.conv2d(images, network.conv1.weight, network.conv1.bias), 2, 2)
    assert values.shape == (3, 20, 12, 12)
    assert values.min() < 0
    values = functional.max_pool2d(functional.conv2d(values, network.conv2.weight, network.conv2.bias), 2, 2)
    assert values.shape == (3, 50, 4, 4)
    values = torch.relu(values.reshape(3, 800) @ network.ip1.weight.T + network.ip1.bias)
    values = values @ network.ip2.weight.T + network.ip2.bias
    torch.testing.assert_close(network.logits(images), values)
    torch.testing.assert_close(network(images), values.softmax(1))


def test_starts_as_caffe_does():
    """The "xavier" filler: uniform in +-sqrt(3 / fan_in), biases 0."""
    torch.manual_seed(0)
    network = LeNet()
    for layer, fan_in in ((network.conv1, 25), (network.conv2, 500), (network.ip1, 800), (network.ip2, 500)):
        bound = math.sqrt(3 / fan_in)
        assert 0.9 * bound < layer.weight.abs().max() <= bound
        assert layer.bias.count_nonzero() == 0
