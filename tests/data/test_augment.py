import math

import torch
import torch.nn.functional as F

from data.augment import Affine, apply_affine


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_agrees_with_torch():
    images = torch.rand(6, 3, 9, 12, generator=generator())
    transforms = Affine(30, 0.2, 0.3, 20).draw(6, generator())
    grid = F.affine_grid(transforms, [6, 3, 9, 12], align_corners=False)
    expected = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    assert torch.allclose(apply_affine(images, transforms), expected, atol=1e-5)


def test_no_range_is_no_change():
    images = torch.rand(4, 1, 28, 28, generator=generator())
    transforms = Affine(0, 0, 0, 0).draw(4, generator())
    assert torch.allclose(apply_affine(images, transforms), images, atol=1e-5)


def test_drawn_parameters_stay_in_range():
    ranges = Affine(degrees=15, shift=0.1, scale=0.2, shear=0)
    transforms = ranges.draw(5000, generator())
    size = 1 / torch.linalg.det(transforms[:, :, :2]).sqrt()
    angle = torch.atan2(transforms[:, 1, 0], transforms[:, 0, 0])
    assert 0.8 - 1e-5 <= size.min() < 0.81
    assert 1.19 < size.max() <= 1.2 + 1e-5
    assert math.radians(14.5) < angle.max() <= math.radians(15) + 1e-5
    assert angle.mean().abs() < math.radians(0.5)
    assert 0.195 < transforms[:, :, 2].abs().max() <= 0.2 + 1e-6


def test_the_seed_decides():
    assert torch.equal(Affine().draw(7, generator(3)), Affine().draw(7, generator(3)))
    assert not torch.equal(Affine().draw(7, generator(3)), Affine().draw(7, generator(4)))
