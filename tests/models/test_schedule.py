import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import OptimizerConfig
from common.errors import InputError
from models.schedule import learning_rate_factor


def test_inv_is_that_of_caffe():
    """SGDSolver::GetLearningRate: base_lr * (1 + gamma * iter) ^ -power, with lenet_solver.prototxt's values."""
    config = OptimizerConfig(lr=0.01, schedule="inv", gamma=1e-4, power=0.75)
    rates = [config.lr * learning_rate_factor(config, iteration, None) for iteration in (0, 100, 5000, 10_000)]
    # As Caffe prints them: lr = 0.01, 0.00992565, 0.00737788, 0.00594604.
    assert rates == pytest.approx([0.01, 0.00992565, 0.00737788, 0.00594604], rel=1e-6)


def test_onecycle_rises_for_a_quarter_then_falls_to_nothing():
    config = OptimizerConfig(schedule="onecycle")
    factors = [learning_rate_factor(config, iteration, 400) for iteration in range(401)]
    assert factors[0] == pytest.approx(0.04)
    assert factors[100] == max(factors) == pytest.approx(1)
    assert factors[400] == pytest.approx(0)
    assert all(a < b for a, b in itertools.pairwise(factors[:101]))
    assert all(a > b for a, b in itertools.pairwise(factors[100:]))


def test_cosine_and_constant():
    cosine = OptimizerConfig(schedule="cosine")
    assert [learning_rate_factor(cosine, i, 10) for i in (0, 5, 10)] == pytest.approx([1, 0.5, 0])
    assert learning_rate_factor(OptimizerConfig(schedule="constant"), 12345, None) == 1


@given(st.sampled_from(["onecycle", "inv", "cosine", "constant"]), st.integers(1, 10_000), st.integers(0, 20_000))
def test_factors_are_in_range(schedule, total, iteration):
    assert 0 <= learning_rate_factor(OptimizerConfig(schedule=schedule), iteration, total) <= 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 0.0},
        {"lr": float("nan")},
        {"momentum": 1.0},
        {"weight_decay": -1.0},
        {"bias_weight_decay": -1.0},
        {"gamma": -1.0},
        {"average": 1.0},
        {"label_smoothing": 1.0},
    ],
)
def test_values_out_of_range(wrong):
    (name,) = wrong
    with pytest.raises(InputError, match=rf"^optimizer\.{name} must"):
        OptimizerConfig(**wrong)
