"""The user's own preprocessing: what the configuration names, called with a Pillow image."""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from common.dotted import locate
from common.errors import InputError, first_line

if TYPE_CHECKING:
    from PIL import Image

_OPTION = "data.transform"
_WEIGHTS = re.compile(r"torchvision\.models[.:](\w+\.)*\w+_Weights\.\w+\.transforms")
"""Preprocessing of torchvision's own weights: importing it runs nobody's code but torchvision's."""


@dataclass(frozen=True)
class Transform:
    """Makes the network's input of an image.

    Attributes:
        path: As the configuration names it.
        channels: Of the images that it is given: 3 for RGB, 1 for gray.
        call: From a Pillow image to a tensor, float [C, H, W].
        digest: Of its source or its parameters, so that a change of either is noticed; None where they cannot be had.
    """

    path: str
    channels: int
    call: Callable[[Image.Image], Any]
    digest: str | None

    def __call__(self, image: Image.Image) -> Tensor:
        """One image's input, float32 [C, H, W].

        Raises:
            InputError: the transform fails, or gives something else than a finite float tensor of three dimensions.
        """
        try:
            values = self.call(image)
        except Exception as error:  # what user code raises is open-ended
            raise InputError(f"{_OPTION} {self.path} failed: {type(error).__name__}: {first_line(error)}") from error
        if not isinstance(values, Tensor) or values.dim() != 3 or not values.is_floating_point():
            given = f"{values.dtype} {[*values.shape]}" if isinstance(values, Tensor) else type(values).__name__
            raise InputError(f"{_OPTION} {self.path} gives {given}, not a float tensor [channels, height, width]")
        values = values.detach().float().cpu().contiguous()
        if not bool(values.isfinite().all()):
            raise InputError(f"{_OPTION} {self.path} gives NaN or infinity")
        return values


def open_transform(path: str, channels: int) -> Transform:
    """The transform that ``path`` names; a class, or a ``weights.transforms`` of torchvision, is called to make it.

    Raises:
        InputError: it cannot be imported or made.
    """
    found = locate(path, _OPTION)
    if isinstance(found, type | functools.partial):
        try:
            found = found()
        except Exception as error:  # what user code raises is open-ended
            raise InputError(f"{_OPTION} {path} cannot be made: {type(error).__name__}: {first_line(error)}") from error
        if not callable(found):
            raise InputError(f"{_OPTION} {path} makes a {type(found).__name__}, which cannot be called with an image")
    return Transform(path, channels, found, _digest(found))


def is_torchvisions(path: str) -> bool:
    """Whether ``path`` names the preprocessing of torchvision's own weights."""
    return _WEIGHTS.fullmatch(path) is not None


def _digest(transform: Callable[..., Any]) -> str | None:
    """Of a function's source, or of an object's text and its class's source."""
    parts = []
    code = transform if inspect.isroutine(transform) else type(transform)
    try:
        parts.append(inspect.getsource(code))
    except (OSError, TypeError):
        return None
    if code is not transform and " at 0x" not in repr(transform):
        parts.append(repr(transform))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
