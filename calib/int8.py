"""INT8 numbers: symmetric, zero point 0, as TensorRT defines them.

Activations are quantized per tensor to [-128, 127], weights per output channel to [-127, 127].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

ACTIVATION_MIN = -128
ACTIVATION_MAX = 127
WEIGHT_MAX = 127


def quantize(values: Tensor, scale: float) -> Tensor:
    """Codes of activations: clamp(round_half_even(values / scale), -128, 127).

    Args:
        values: float32, any shape.
        scale: Size of one step, positive.

    Returns:
        The integer codes as float32, which holds them exactly (and so serve a float matrix product).
    """
    return (values / scale).round_().clamp_(ACTIVATION_MIN, ACTIVATION_MAX)


def weight_scales(weight: Tensor) -> Tensor:
    """Scale of each output channel: its largest magnitude / 127; 1 for a channel of zeros, whose codes are all 0.

    Args:
        weight: float32 [out, ...].

    Returns:
        float32 [out].
    """
    scales = weight.detach().flatten(1).abs().amax(dim=1) / WEIGHT_MAX
    # A magnitude below 127 * 2^-149 divides to zero; no code can represent such a channel.
    return torch.where(scales > 0, scales, torch.ones_like(scales))


def channel_axis(layer: nn.Module) -> int:
    """The axis of the output channels in the weight of a convolution, transposed convolution or linear layer."""
    return 1 if isinstance(layer, nn.ConvTranspose2d) else 0


def along(scales: Tensor, weight: Tensor, axis: int) -> Tensor:
    """Scales [out] in a shape that multiplies a weight along the axis of its output channels."""
    return scales.reshape([-1 if index == axis else 1 for index in range(weight.dim())])


def quantize_weight(weight: Tensor, axis: int = 0) -> tuple[Tensor, Tensor]:
    """Codes and scales of a layer's weights.

    Args:
        weight: float32, any shape.
        axis: Of its output channels (:func:`channel_axis`).

    Returns:
        Integer codes in [-127, 127] as float32, of ``weight``'s shape, and the scales, float32 [out].
    """
    scales = weight_scales(weight.movedim(axis, 0))
    shaped = along(scales, weight, axis)
    return (weight.detach() / shaped).round_().clamp_(-WEIGHT_MAX, WEIGHT_MAX), scales
