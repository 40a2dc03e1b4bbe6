"""What a network is for, as far as its graph shows: what its outputs are compared by depends on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import fx

Task = Literal["classify", "regress", "embed", "detect"]
"""``classify``: one row of scores per image, compared by the class; ``regress``: numbers, compared by their error;
``embed``: vectors, compared by their direction; ``detect``: several tensors, or one per place (boxes, masks)."""

_NORMALISING = frozenset({"normalize", "linalg_vector_norm", "linalg_norm"})


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
