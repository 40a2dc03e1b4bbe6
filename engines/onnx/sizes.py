"""Height and width of an ONNX file's images left free, where the network takes other sizes than that of the data."""

from __future__ import annotations

import numpy as np
import onnx
import torch

from calib.network import INPUT, Network
from calib.onnx.external import loadable
from calib.onnx.model import without_weights
from common.errors import InputError, first_line
from engines.base import as_outputs

_LARGER = ((32, 64), (7, 13))
"""Rows and columns more than the data's: what networks that halve their images often take, and what some do not."""

_CLOSE = 1e-3
"""Largest difference to the network, over its largest value: kernels of other sizes sum in another order."""


def free_size(model: onnx.ModelProto) -> None:
    """Let a file's images have any height and width; the shapes inside are inferred again. In place."""
    graph = model.graph
    _, _, height, width = graph.input[0].type.tensor_type.shape.dim
    height.dim_param, width.dim_param = "height", "width"
    del graph.value_info[:]
    images = [output.type.tensor_type.shape.dim[:1] for output in graph.output]
    for output in graph.output:
        output.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(without_weights(model), data_prop=True).graph
    graph.value_info.extend(inferred.value_info)
    for output, known, first in zip(graph.output, inferred.output, images, strict=True):
        output.CopyFrom(known)
        for size, before in zip(output.type.tensor_type.shape.dim, first, strict=False):
            size.CopyFrom(before)


def check_size_is_free(network: Network, model: onnx.ModelProto) -> None:
    """Run the float file on images of two other sizes, and compare it with the network.

    Of the second size, the network may take none.

    Args:
        network: Traced with an ``input_shape``.
        model: Its float file, after :func:`free_size`.

    Raises:
        InputError: the network takes images of one size alone, or its file computes something else at another.
    """
    assert network.input_shape is not None  # the export has asked for it
    channels, height, width = network.input_shape
    alone = f"{network.name} takes images of {height}x{width} alone: leave --any-size out"
    if network.traced_by != "torch.fx":
        raise InputError(f"{alone} (it was traced by torch.export, which fixes all sizes in a network)")
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError(f"--any-size tries the file at other sizes, which needs onnxruntime: {error}") from error

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised as well
    try:
        with loadable(model) as source:
            session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # what ONNX Runtime raises has no base class of its own
        raise InputError(f"{alone} ({first_line(error):.150})") from error
    for number, (rows, columns) in enumerate(_LARGER):
        images = torch.rand(2, channels, height + rows, width + columns, generator=torch.Generator().manual_seed(0))
        try:
            given = network.run(images, lambda *_: None)  # unlike its module, this prints nothing where it fails
        except Exception as error:  # a network may raise anything
            if number:
                continue
            raise InputError(f"{alone} ({first_line(error):.150})") from error
        expected = [value.double().numpy() for value in as_outputs(given)]
        size = f"{height + rows}x{width + columns}"
        try:
            found = session.run(None, {INPUT: images.numpy()})
        except Exception as error:  # as above
            raise InputError(f"{alone} (its file does not run at {size}: {first_line(error):.150})") from error
        for one, other in zip(found, expected, strict=True):
            if one.shape != other.shape or not (np.abs(one - other) <= _CLOSE * np.abs(other).max()).all():
                raise InputError(f"{alone} (at {size}, its file gives something else than the network)")
