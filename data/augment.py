"""Random affine augmentation of whole batches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


@dataclass(frozen=True)
class Affine:
    """Ranges of a random affine transform; every parameter is uniform in [-x, x].

    Attributes:
        degrees: Rotation.
        shift: Translation along each axis, as a share of the image's size.
        scale: Change of size, as a share: 0.1 is 90 to 110 %.
        shear: Horizontal shear, degrees.
    """

    degrees: float = 12.0
    shift: float = 0.08
    scale: float = 0.1
    shear: float = 8.0

    def draw(self, count: int, generator: Generator) -> Tensor:
        """Random transforms for ``count`` images, on the generator's device.

        Returns:
            float32 [count, 2, 3], from output to input coordinates in [-1, 1], as
            ``torch.nn.functional.affine_grid`` takes them.
        """
        uniform = torch.rand(count, 5, generator=generator, device=generator.device).mul_(2).sub_(1)
        angle = uniform[:, 0] * math.radians(self.degrees)
        size = 1 + uniform[:, 1] * self.scale
        shear = torch.tan(uniform[:, 2] * math.radians(self.shear))
        cosine, sine = torch.cos(angle) / size, torch.sin(angle) / size
        # Coordinates run over [-1, 1]: a shift by a share of the size is twice that.
        shift_x, shift_y = uniform[:, 3] * 2 * self.shift, uniform[:, 4] * 2 * self.shift
        rows = (cosine, shear * cosine - sine, shift_x, sine, shear * sine + cosine, shift_y)
        return torch.stack(rows, dim=1).view(count, 2, 3)


def apply_affine(images: Tensor, transforms: Tensor) -> Tensor:
    """Transform each image by its own matrix, with bilinear interpolation; what comes from outside is 0.

    Args:
        images: float32 [B, C, H, W].
        transforms: float32 [B, 2, 3], as :meth:`Affine.draw` gives them.

    Returns:
        float32 [B, C, H, W].
    """
    height, width = images.shape[-2:]
    # One product over all pixels: affine_grid makes one small product per image, which costs more than the sampling.
    grid = transforms.flatten(0, 1) @ _pixel_centres(height, width, images)
    grid = grid.view(len(images), 2, height, width).permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _pixel_centres(height: int, width: int, like: Tensor) -> Tensor:
    """Homogeneous coordinates (x, y, 1) of the pixel centres in [-1, 1]: [3, H * W]."""
    y = (torch.arange(height, device=like.device, dtype=like.dtype) * 2 + 1) / height - 1
    x = (torch.arange(width, device=like.device, dtype=like.dtype) * 2 + 1) / width - 1
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack((grid_x.flatten(), grid_y.flatten(), torch.ones(height * width).to(like)))
