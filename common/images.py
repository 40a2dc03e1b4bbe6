"""Images of all depths in the 8 bits that networks are trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from common.errors import InputError

if TYPE_CHECKING:
    from PIL import Image


def in_eight_bits(image: Image.Image) -> Image.Image:
    """A deeper gray image (16 bits, or float) in 8 bits, which Pillow's own conversion cuts off at 255; others as is.

    The whole range of 16 bits becomes that of 8, and so does [0, 1] of a float image, as in torchvision and
    scikit-image. A palette with several degrees of transparency loses them, as alpha does.

    Raises:
        InputError: the values lie elsewhere, so that it cannot be known what is black and what is white.
    """
    from PIL import Image

    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        return image.convert("RGBA")
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image).astype(np.float64)
    white, kind = (1.0, "float") if image.mode == "F" else (65535.0, "integer")
    if not ((values >= 0) & (values <= white)).all():
        raise InputError(
            f"holds {kind} values from {values.min():g} to {values.max():g}, not from 0 to {white:g}: "
            "convert it to 8 or 16 bits"
        )
    return Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))
