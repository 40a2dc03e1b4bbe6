"""Values of convolutions in the layout in which ONNX Runtime computes them, for what does not ask for their order."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from calib.onnx.model import attributes, replace_items, values_read
from calib.onnx.session import has_cuda, open_session, with_outputs

if TYPE_CHECKING:
    import onnx

_MOST = 2**30
"""Weights, in bytes of float32, that are worth a temporary file."""


def has_blocks(model: onnx.ModelProto) -> bool:
    """Whether values of a network may lie in blocks: those of convolutions do, on the CPU."""
    weights = sum(math.prod(item.dims) for item in model.graph.initializer)
    return any(node.op_type == "Conv" for node in model.graph.node) and 4 * weights <= _MOST and not has_cuda()


def in_blocks(
    path: Path, model: onnx.ModelProto, in_order: Collection[str], optimized: Path
) -> tuple[onnx.ModelProto, list[str]]:
    """The network as ONNX Runtime optimizes it for this CPU, with outputs as they are before they are put in order.

    The kernels of convolutions, and what follows them, compute on blocks of 8 or 16 channels (NCHWc). Each value that
    is asked for is copied to NCHW, which costs a tenth of ResNet-18's time where all of them are, though a histogram
    is the same without. Left as they are: outputs whose last block is filled up with channels that are none.

    Args:
        path: The file, whose folder holds external weights.
        model: Its network, with what is asked for as its outputs.
        in_order: Outputs whose values' order matters.
        optimized: Where the optimized network is written to, with its weights beside it: what is returned needs them.

    Returns:
        A network that is to be opened from ``optimized``, without optimization; what its outputs are called, in the
        order of the model's.

    Raises:
        InputError: ONNX Runtime does not take the network, or does not write it.
    """
    import onnx

    open_session(path, model, 1, optimized=optimized)
    found = onnx.load(optimized, load_external_data=False)
    copies = {node.output[0]: node for node in found.graph.node if node.op_type == "ReorderOutput"}
    outputs = [output.name for output in found.graph.output]
    channels = {
        copies[name].input[0]: attributes(copies[name])["channels"]
        for name in outputs
        if name in copies and name not in in_order
    }
    session = open_session(optimized, with_outputs(found, [*channels]), 1, optimize=False)
    # The shape is empty where nothing says how many dimensions there are.
    full = {item.name for item in session.get_outputs() if item.shape[1:2] == [channels[item.name]]}
    for index, name in enumerate(outputs):
        if name in copies and name not in in_order and copies[name].input[0] in full:
            outputs[index] = copies[name].input[0]
            full.remove(outputs[index])  # an output cannot be given twice
    found = with_outputs(found, outputs)
    needed = {*outputs, *(name for node in found.graph.node for name in values_read(node))}
    replace_items(found.graph.node, [node for node in found.graph.node if needed.intersection(node.output)])
    return found, outputs
