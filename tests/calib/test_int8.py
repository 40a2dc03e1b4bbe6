"""INT8 arithmetic: rounding, saturation, weight scales."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from calib.int8 import quantize, quantize_weight, weight_scales

FLOATS = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)


def test_ties_round_to_even_and_codes_saturate() -> None:
    values = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, 1e9, -127.5, -128.5, -1e9])
    expected = [0, 2, 2, 0, -2, 126, 127, 127, -128, -128, -128]
    assert quantize(values, 1.0).tolist() == expected


@given(npst.arrays(np.float32, 20, elements=FLOATS), st.floats(2.0**-20, 2.0**10, width=32))
def test_codes_are_those_of_the_definition(values: np.ndarray, scale: float) -> None:
    expected = np.clip(np.rint(values / np.float32(scale)), -128, 127)
    np.testing.assert_array_equal(quantize(torch.from_numpy(values), scale).numpy(), expected)


def test_weights_are_scaled_by_their_channels_maximum() -> None:
    weight = torch.tensor([[1.0, -2.54, 0.5], [0.0, 0.0, 0.0], [127.0, 1.0, -0.5]])
    codes, scales = quantize_weight(weight)
    torch.testing.assert_close(scales, torch.tensor([2.54 / 127, 1.0, 1.0]))
    assert codes.tolist() == [[50, -127, 25], [0, 0, 0], [127, 1, 0]]


def test_a_channel_too_small_for_its_scale_is_zero() -> None:
    scales = weight_scales(torch.full((1, 2), 1e-45))
    assert scales.tolist() == [1.0]
