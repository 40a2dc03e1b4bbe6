"""scikit-learn's bundled handwritten digits, at MNIST's size: real data on any machine, without a download.

1,797 scans of 8 x 8 pixels with 17 grey levels, the test part of the UCI "Optical Recognition of Handwritten Digits"
set (E. Alpaydin, C. Kaynak, 1998).
"""

from __future__ import annotations

import torch
from torch import Tensor

from data.mnist import SIZE, Split

CLASSES = tuple("0123456789")
NOTE = (
    "these are scikit-learn's 1,797 digits (8 x 8 scans, enlarged to 28 x 28), not MNIST: "
    "the figures do not compare with MNIST's"
)

_SOURCE_SIZE = 8
_LEVELS = 16
_TEST_SHARE = 5


def load() -> tuple[Split, Split]:
    """The training and the test split: every fifth image of each class is a test image, 1,442 and 355 in all.

    No random number takes part, and the enlargement is exact integer arithmetic, so that the pixels are the same
    everywhere.
    """
    from sklearn.datasets import load_digits

    source = load_digits()
    pixels = enlarge(torch.from_numpy(source.images).to(torch.int64))
    labels = torch.from_numpy(source.target).to(torch.int64)
    test = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(len(CLASSES)):
        test[torch.nonzero(labels == label).flatten()[_TEST_SHARE - 1 :: _TEST_SHARE]] = True
    return Split(pixels[~test], labels[~test]), Split(pixels[test], labels[test])


def enlarge(levels: Tensor) -> Tensor:
    """Bilinear enlargement of 8 x 8 images, with pixel centres as in OpenCV and torch (``align_corners=False``).

    Args:
        levels: int64 [N, 8, 8], 0 to 16.

    Returns:
        uint8 [N, 28, 28], 0 to 255, rounded half up.
    """
    weights, total = _weights()
    sums = weights @ levels @ weights.T
    whole = _LEVELS * total * total
    enlarged: Tensor = (sums * 255 * 2 + whole) // (2 * whole)
    return enlarged.to(torch.uint8)


def _weights() -> tuple[Tensor, int]:
    """Interpolation weights int64 [28, 8], and what each row sums to.

    Output pixel i lies at (i + 1/2) * 8/28 - 1/2 = (4i - 5) / 14 in source pixels: weights are multiples of 1/14.
    """
    total = 2 * SIZE // 4
    weights = torch.zeros(SIZE, _SOURCE_SIZE, dtype=torch.int64)
    for row in range(SIZE):
        left, share = divmod(4 * row - 5, total)
        weights[row, max(left, 0)] += total - share
        weights[row, min(left + 1, _SOURCE_SIZE - 1)] += share
    return weights, total
