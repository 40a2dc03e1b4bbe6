"""What a network is for: what its outputs are compared by depends on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import fx

from common.config import Task, TaskName
from common.errors import InputError

if TYPE_CHECKING:
    from calib.network import Network

_NORMALISING = frozenset({"normalize", "linalg_vector_norm", "linalg_norm"})


@dataclass(frozen=True)
class Purpose:
    """A task, and what tells that it is this one."""

    task: Task
    reason: str

    def __str__(self) -> str:
        return f"{self.task} ({self.reason})"


def find_task(outputs: Sequence[fx.Node], kinds: Mapping[str, str]) -> Task:
    """Guess the task from the outputs' last operations.

    Args:
        outputs: fx nodes of the outputs; ``meta["shape"]`` is the shape of one image's value where known.
        kinds: fx node name -> kind of operation.
    """
    if len(outputs) != 1:
        return "detect"
    (output,) = outputs
    if kinds.get(output.name) == "softmax":
        return "classify"
    shape = output.meta.get("shape")
    if shape is not None and len(shape) > 1:
        return "detect"
    name = getattr(output.target, "__name__", str(output.target))
    before = {getattr(node.target, "__name__", str(node.target)) for node in (output, *output.all_input_nodes)}
    if before & _NORMALISING:
        return "embed"
    if shape in ((), (1,)) or name in ("sigmoid", "tanh"):
        return "regress"
    return "classify"


def purpose(network: Network, asked: TaskName, classes: int, targets: int) -> Purpose:
    """What ``network`` is for: what was asked for, else what its outputs and the data show.

    Args:
        network: Traced with an ``input_shape``.
        asked: ``--task``.
        classes: Classes of the data; 0 where it has none.
        targets: Numbers that the data has for each image; 0 where it has none.

    Raises:
        InputError: what was asked for does not go with the outputs or the data.
    """
    shapes = network.output_shapes
    shown = f"{network.name} gives {_shown(network.output_names, shapes)}"
    if asked == "classify" and shapes != ((classes,),):
        wanted = f"one score for each of {classes} classes" if classes else "classes, and the images have none"
        raise InputError(f"task classify needs {wanted}, but {shown}: leave --task out, or name another")
    if asked == "regress" and targets and shapes not in (((targets,),), ((),) if targets == 1 else None):
        raise InputError(f"data.targets has {targets} numbers for an image, but {shown}")
    if asked == "classify":
        return Purpose(asked, f"one score for each of {classes} classes")
    if asked != "auto":
        return Purpose(asked, "as asked for")
    if len(shapes) > 1:
        return Purpose("detect", f"{len(shapes)} outputs: {', '.join(network.output_names)}")
    (shape,) = shapes
    if classes and shape == (classes,) and network.task != "embed":
        return Purpose("classify", f"one score for each of {classes} classes")
    if targets and shape in ((targets,), () if targets == 1 else None):
        return Purpose("regress", f"as many numbers for an image as data.targets has: {targets}")
    if targets and len(shape) < 2:
        raise InputError(f"data.targets has {targets} numbers for an image, but {shown}: leave it out, or --task embed")
    if network.task == "classify":
        if classes and network.gives_probabilities:
            raise InputError(
                f"{shown} by a softmax, and the images have {classes} classes: not a classifier of this data set "
                "(--task embed compares its outputs with FP32's alone)"
            )
        has = f"{classes} classes" if classes else "no classes"
        return Purpose("embed", f"{shape[0]} numbers for an image, and the images have {has}")
    how = {"detect": "a value for each place", "embed": "a normalised vector", "regress": "no scores but numbers"}
    return Purpose(network.task, f"{how[network.task]}: {_shown(network.output_names, shapes)}")


def _shown(names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> str:
    """Outputs with the shapes of one image's values."""
    parts = []
    for name, shape in zip(names, shapes, strict=True):
        size = "one number" if shape in ((), (1,)) else "x".join(map(str, shape))
        parts.append(size if len(shapes) == 1 else f"{name} {size}")
    return ", ".join(parts)
