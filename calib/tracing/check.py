"""What a model computes, to compare with what was traced of it, and where in its code something failed."""

from __future__ import annotations

import dataclasses
import linecache
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree

from calib.network import Shapes
from common.errors import InputError, first_line

_PACKAGE: Final = Path(__file__).parents[1]
_LONGEST_REASON: Final = 90
_LONGEST_CODE: Final = 60
_SAID: Final = {
    "GuardOnDataDependentSymNode": "it branches on a value that depends on the images",
    "Node arity mismatch": "its forward keeps something in an attribute of the model",
    **dict.fromkeys(
        ("expected scalar type", "mat1 and mat2 must have the same dtype", "Input type ("),
        "its forward changes the type of its values (weights are float32 here): leave that out",
    ),
}
"""Type or first words of an error of PyTorch -> what it means, where its own text speaks of PyTorch's inside."""

_STANDARD_LIBRARY: Final = Path(linecache.__file__).parent


class RefusedError(InputError):
    """A network that no way of tracing can make fit."""


class ModelCheck:
    """What a model says of two images, to compare with what was traced of it."""

    def __init__(self, model: nn.Module, name: str, shape: tuple[int, int, int]) -> None:
        self._name = name
        parameter = next(model.parameters(), torch.empty(0))
        images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
        self.images = images.to(parameter.device)
        result = self._run(model, self.images)
        _open_dataclasses(result)
        if isinstance(result, list) and len(result) == len(images) and all(isinstance(one, dict) for one in result):
            raise RefusedError(
                f"network {name} gives a dictionary for each image, as a detector that has picked its boxes does: pass "
                "what comes before that, its backbone and heads (of torchvision's detectors, models.DetectorCore)"
            )
        paths, _ = _pytree.tree_flatten_with_path(result)
        outputs = {_key(path): value for path, value in paths if isinstance(value, Tensor)}
        if not outputs:
            raise RefusedError(f"network {name} gives no tensor")
        if not any(value.is_floating_point() for value in outputs.values()):
            kind = str(next(iter(outputs.values())).dtype).removeprefix("torch.")
            raise RefusedError(
                f"network {name} gives {kind}, as an argmax does: pass the network that gives the scores, which show "
                "how close INT8 is"
            )
        self.output_names = tuple(outputs)
        self._expected = list(outputs.values())

    def _run(self, model: nn.Module, images: Tensor, forward: Callable[[Tensor], Any] | None = None) -> Any:
        try:
            with torch.no_grad():
                return (forward or model)(images.clone())
        except Exception as error:  # what user code raises is open-ended
            shape = tuple(self.images.shape)
            raise InputError(
                f"network {self._name} does not take images of shape {shape}: {told(error, model)}"
            ) from error

    def shapes(self, module: fx.GraphModule) -> dict[str, torch.Size]:
        """Node of ``module`` -> shape of its value for the two images, where that is a tensor."""
        shapes = Shapes(module)
        self._run(shapes.module, self.images, shapes.run)
        return shapes.found

    def compare(self, module: nn.Module) -> None:
        """Raise InputError if ``module`` computes something else than the model, or only for this number of images."""
        found = _pytree.tree_leaves(self._run(module, self.images))
        if not self._agree(found, self._expected):
            raise InputError(
                f"network {self._name} computes something else once traced: random, or changing a value in place that "
                "other operations see through a view, or branching on something that tracing fixes"
            )
        count = len(self.images)
        for i in range(count):
            alone = [value[i : i + 1] if value.dim() and len(value) == count else value for value in self._expected]
            if not self._agree(_pytree.tree_leaves(self._run(module, self.images[i : i + 1])), alone):
                raise InputError(f"network {self._name} computes something else for another number of images")

    def tell_shapes(self, module: fx.GraphModule) -> None:
        """Note on each output of ``module`` the shape of one image's value."""
        outputs = next(node for node in module.graph.nodes if node.op == "output").all_input_nodes
        if len(outputs) == len(self._expected):
            for node, value in zip(outputs, self._expected, strict=True):
                node.meta["shape"] = tuple(value.shape[1:])

    @staticmethod
    def _agree(found: list[Any], expected: list[Tensor]) -> bool:
        if [value.shape for value in found] != [value.shape for value in expected]:
            return False
        for value, reference in zip(found, expected, strict=True):
            # Folded batch normalisation rounds otherwise.
            finite = reference.double()[reference.isfinite()]
            tolerance = 1e-3 * max(1.0, float(finite.abs().max())) if finite.numel() else 0.0
            if not torch.allclose(value.double(), reference.double(), rtol=0, atol=tolerance, equal_nan=True):
                return False
        return True


def _open_dataclasses(result: Any) -> None:
    """Let PyTorch see the tensors inside dataclasses, for which it needs to know their classes."""
    for leaf in _pytree.tree_leaves(result):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            torch.export.register_dataclass(type(leaf))
            _open_dataclasses(leaf)


def _key(path: Sequence[Any]) -> str:
    """The name of an output in the model's result: ``logits``, ``0``, ``boxes.1``."""
    return "_".join(re.sub(r"\W", "", _pytree.keystr((key,))) for key in path) or "output"


def told(error: BaseException, model: nn.Module) -> str:
    """What failed, for a message of one line: the innermost module of ``model``, what was said, and the line of code.

    ``in layer1.0 (Block): proxies cannot branch (resnet.py:87: if x.sum() > 0:)``
    """
    names = {module: name for name, module in model.named_modules()}
    inside, place, step = "", "", error.__traceback__
    while step is not None:
        frame = step.tb_frame
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and names.get(owner):
            inside = f"in {names[owner]} ({type(owner).__name__}): "
        # Not by traceback.extract_tb, which fails on frames that torch.fx has patched.
        name = frame.f_code.co_filename
        folders = Path(name).parents
        own = "/torch/" not in name and _PACKAGE not in folders and folders[0] != _STANDARD_LIBRARY
        if own and Path(name).is_file():
            line = step.tb_lineno or frame.f_code.co_firstlineno  # a patched frame may have none
            place = f" ({Path(name).name}:{line}: {_short(linecache.getline(name, line).strip(), _LONGEST_CODE)})"
        step = step.tb_next
    meant = [text for start, text in _SAID.items() if start == type(error).__name__ or str(error).startswith(start)]
    said = meant[0] if meant else first_line(error)
    return f"{inside}{_short(said, _LONGEST_REASON)}{place}"


def _short(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 3].rstrip()}..."
