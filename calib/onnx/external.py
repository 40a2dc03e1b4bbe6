"""Weights in a file of their own: protocol buffers end at 2 GiB, and with them an ONNX file that holds its weights.

Imports onnx inside functions: it is slow to load.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from common.files import atomic_path, write_bytes

if TYPE_CHECKING:
    import onnx

LARGEST_FILE: Final = 2**31
"""Bytes at which protocol buffers end."""

LARGEST_HELD: Final = LARGEST_FILE - 2**24
"""Bytes of weights up to which a network's file holds them itself; the rest is for the graph around them."""

_SMALL: Final = 256
"""Bytes of a weight that stays in the network's file all the same: it may be the sizes that an operator takes."""


def weight_bytes(model: onnx.ModelProto) -> int:
    """What the weights that a network holds take, without making the file that would say so."""
    import onnx

    return sum(
        math.prod(weight.dims) * onnx.helper.tensor_dtype_to_np_dtype(weight.data_type).itemsize
        for weight in model.graph.initializer
        if weight.data_location != onnx.TensorProto.EXTERNAL
    )


def network_bytes(model: onnx.ModelProto) -> int:
    """The size of a network's file or, where :func:`write_network` writes two, of its weights."""
    weights = weight_bytes(model)
    return weights if weights > LARGEST_HELD else int(model.ByteSize())


def weights_beside(path: Path) -> Path:
    """Where the weights of the network in ``path`` lie, if not there."""
    return path.with_name(f"{path.name}.data")


def write_network(path: Path, model: onnx.ModelProto, largest: int = LARGEST_HELD) -> None:
    """Write a network atomically, its weights into :func:`weights_beside` where they take more than ``largest`` bytes.

    Raises:
        InputError: a file cannot be written.
    """
    beside = weights_beside(path)
    if weight_bytes(model) <= largest:
        write_bytes(path, model.SerializeToString())
        beside.unlink(missing_ok=True)  # of a larger network that was there before
        return
    with atomic_path(path) as network, atomic_path(beside) as weights:
        network.write_bytes(_store_beside(model, weights, beside.name).SerializeToString())
        path.unlink(missing_ok=True)  # rather no network than one that reads another's weights


@contextmanager
def loadable(model: onnx.ModelProto, largest: int = LARGEST_HELD) -> Iterator[bytes | str]:
    """What ONNX Runtime takes a network as: its bytes or, above ``largest``, a temporary file with the weights beside.

    A session that was opened keeps what it has mapped of them.
    """
    if weight_bytes(model) <= largest:
        yield model.SerializeToString()
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "network.onnx")
        beside = weights_beside(path)
        path.write_bytes(_store_beside(model, beside, beside.name).SerializeToString())
        yield str(path)


def _store_beside(model: onnx.ModelProto, path: Path, location: str) -> onnx.ModelProto:
    """Write a network's weights into ``path``, and return the network that finds them at ``location``."""
    import onnx

    graph = model.graph
    stored = []
    with path.open("wb") as stream:
        for weight in graph.initializer:
            content = onnx.numpy_helper.to_array(weight).tobytes()
            if len(content) <= _SMALL:
                stored.append(weight)
                continue
            place = onnx.TensorProto(name=weight.name, data_type=weight.data_type, dims=weight.dims)
            place.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (("location", location), ("offset", stream.tell()), ("length", len(content))):
                place.external_data.add(key=key, value=str(value))
            stream.write(content)
            stored.append(place)
    light = onnx.helper.make_model(
        onnx.helper.make_graph(graph.node, graph.name, graph.input, graph.output, stored, value_info=graph.value_info),
        opset_imports=model.opset_import,
        ir_version=model.ir_version,
        producer_name=model.producer_name,
        producer_version=model.producer_version,
        functions=model.functions,
    )
    light.metadata_props.extend(model.metadata_props)
    return light
