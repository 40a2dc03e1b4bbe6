import itertools

import pytest
import torch
from torch import nn

from models import LeNet, precision
from models.precision import BFLOAT16, FLOAT32, measure_precision


class Timed(nn.Module):
    """Takes a second of a clock of its own in float32, and ``bfloat16`` seconds under autocast (None: it fails)."""

    def __init__(self, bfloat16: float | None) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.bfloat16 = bfloat16
        self.clock = [0.0]

    def __deepcopy__(self, memo):
        copied = Timed(self.bfloat16)
        copied.clock = self.clock
        return copied

    def forward(self, images):
        mixed = torch.is_autocast_enabled("cpu")
        if mixed and self.bfloat16 is None:
            raise RuntimeError('"layer" not implemented for bfloat16')
        self.clock[0] += self.bfloat16 if mixed else 1.0
        return self.layer(images.flatten(1))


@pytest.mark.parametrize(
    ("bfloat16", "chosen", "reason"),
    [
        (0.5, BFLOAT16, "of 8 images take 500.0 ms in bfloat16 and 1000.0 ms in float32"),
        (0.9, FLOAT32, "900.0 ms in bfloat16"),  # too little to be found again
        (3.0, FLOAT32, "3000.0 ms in bfloat16"),
        (None, FLOAT32, "does not run in bfloat16"),
    ],
)
def test_the_faster_precision_is_chosen(monkeypatch, bfloat16, chosen, reason):
    network = Timed(bfloat16)
    monkeypatch.setattr(precision.time, "perf_counter", lambda: network.clock[0])
    found = measure_precision(network, (1, 2, 2), 3, 8)
    assert found.precision == chosen
    assert reason in found.reason


def test_slow_products_are_enough_to_know(monkeypatch):
    """Each look at the clock is a second after the one before; a product in bfloat16 takes three more."""
    clock = itertools.count()
    product = torch.Tensor.__matmul__

    def slow(one, other):
        for _ in range(3 if one.dtype == torch.bfloat16 else 0):
            next(clock)
        return product(one, other)

    monkeypatch.setattr(torch.Tensor, "__matmul__", slow)
    monkeypatch.setattr(precision.time, "perf_counter", lambda: next(clock))
    found = measure_precision(Timed(0.1), (1, 2, 2), 3, 8)
    assert found.precision == FLOAT32
    assert "4.0 times as long" in found.reason


def test_nothing_is_changed_by_measuring():
    """On this CPU, whichever precision it finds."""
    network = nn.Sequential(LeNet(), nn.Dropout(0.5), nn.BatchNorm1d(10)).eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.get_rng_state()
    found = measure_precision(network, (1, 28, 28), 10, 8)
    assert found.precision in (FLOAT32, BFLOAT16)
    assert torch.equal(torch.get_rng_state(), state)
    assert not network.training
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
