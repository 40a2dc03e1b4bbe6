"""What TensorRT's layer fusion leaves of an ONNX network: which values, and in whose memory.

``entropy`` and ``legacy`` calibrate after it. The rules are read from the tables that TensorRT 10.6 wrote for some 40
networks (tests/calib/tensorrt).
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from calib.onnx.graph import ELEMENTWISE, RESHAPES, WEIGHTED, Graph, stored
from calib.onnx.model import attributes

if TYPE_CHECKING:
    import onnx

_CONVOLUTIONS: Final = frozenset({"Conv", "ConvTranspose"})
_INTO_CONVOLUTIONS: Final = frozenset({"Clip", "Relu"})
"""Activations that the convolution or product before them takes into itself."""
_POINTWISE: Final = ELEMENTWISE | {
    *("Abs", "BatchNormalization", "Ceil", "Clip", "Elu", "Erf", "Exp", "Floor", "HardSigmoid", "HardSwish"),
    *("LeakyRelu", "Log", "Neg", "Reciprocal", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Tanh"),
}
"""Operators that become one kernel with those of their kind around them."""


class Fusion:
    """A network after layer fusion.

    Args:
        graph: The network.
        folder: Where its external weights lie.
    """

    def __init__(self, graph: Graph, folder: Path) -> None:
        self._graph = graph
        self._folder = folder
        self._adders = frozenset(self._find_adders())
        self._absorbed = self._find_absorbed()
        self._siblings = list(self._find_siblings())
        self._sliced = {name for group in self._siblings for name in group}

    def values(self, concatenations: bool) -> Iterator[str]:
        """The values that are left.

        Args:
            concatenations: Whether those are, too, that are copied into a concatenation, and the concatenation itself.
        """
        graph = self._graph
        yield from graph.inputs
        whole = {tuple(node.input): node.output[0] for node in graph.nodes if node.op_type == "Concat"}
        written = [group for group in self._siblings if group in whole]  # as a concatenation by one convolution
        gone = {name for group in written for name in group} | graph.constant | self._adders
        kept = graph.outputs | {whole[group] for group in written}
        for node in graph.nodes:
            for name in filter(None, node.output):
                if name in gone or not graph.used(name) or self._joins(node, graph.sole_reader(name)):
                    continue
                if node.op_type in RESHAPES and not self._copies(node, name, concatenations):
                    continue
                if node.op_type == "Concat" and not concatenations and name not in kept:
                    continue
                yield name

    def wholes(self) -> dict[str, tuple[str, ...]]:
        """Value -> those in whose memory, channels behind each other, TensorRT keeps it; there it counts wrong values.

        So it is with the first of the convolutions that become one, the first operand of a concatenation of channels,
        and the first channels that a slice or a split takes. Their histogram is of as many values, but of those that
        follow one another from the beginning of the larger memory, so of all its channels and the first images alone.
        What lies further behind has its own values.
        """
        graph = self._graph
        found: dict[str, tuple[str, ...]] = {}
        for node in reversed(graph.nodes):
            name = node.output[0]
            if _is(node, {"Concat"}) and self._in_place(node):
                found[_unreshaped(graph, node.input[0])] = found.get(name, (name,))
            elif (node.op_type == "Split" and attributes(node).get("axis", 0) == 1) or (
                node.op_type == "Slice" and self._first_channels(node)
            ):
                found[name] = found.get(node.input[0], (node.input[0],))
        found.update((group[0], group) for group in self._siblings)
        return {name: whole for name, whole in found.items() if not graph.constant.intersection((name, *whole))}

    def _find_adders(self) -> Iterator[str]:
        """Convolutions that take the sum behind them into themselves: of two, one of 1 x 1, else the first operand."""
        graph = self._graph
        for node in graph.nodes:
            if node.op_type == "Add" and not graph.constant.intersection(node.input):
                own = [
                    name
                    for name in node.input
                    if _is(graph.producer.get(name), _CONVOLUTIONS) and graph.sole_reader(name) is not None
                ]
                yield from sorted(own, key=lambda name: not _is_pointwise_convolution(graph.producer[name]))[:1]

    def _find_absorbed(self) -> dict[str, str]:
        """Values of operators that the convolution or product before them takes into itself -> that one's value."""
        graph = self._graph
        found: dict[str, str] = {}
        for node in graph.nodes:
            for name in node.input:
                before = graph.producer.get(name)
                if before is None or graph.sole_reader(name) is None or not node.output:
                    continue
                scaled = before.op_type in _CONVOLUTIONS and node.op_type in ELEMENTWISE
                taken = name in self._adders or (scaled and bool(graph.constant.intersection(node.input)))
                # Nothing but an activation ends what follows a convolution.
                if before.op_type in WEIGHTED or (name in found and before.op_type not in _INTO_CONVOLUTIONS):
                    taken = taken or node.op_type in _INTO_CONVOLUTIONS | {"BatchNormalization"}
                taken = taken or (node.op_type == "HardSwish" and _is_pointwise_convolution(before))
                if taken:
                    found[node.output[0]] = name
        return found

    def _find_siblings(self) -> Iterator[tuple[str, ...]]:
        """Convolutions of one value, of the same geometry and activation, which become one.

        In its memory those come first whose number of channels has the largest power of two as a factor.
        """
        graph = self._graph
        groups: dict[Any, list[tuple[str, int]]] = {}
        for node in graph.nodes:
            given = attributes(node)
            if node.op_type != "Conv" or given.get("group", 1) != 1 or node.input[1] not in graph.weights:
                continue
            name, activation = node.output[0], ""
            while (reader := graph.sole_reader(name)) is not None and self._absorbed.get(reader.output[0]) == name:
                activation, name = reader.op_type, reader.output[0]
            if activation in ("", "BatchNormalization", "Relu") and node.output[0] not in self._adders:
                geometry = sorted((key, str(value)) for key, value in given.items())
                key = (node.input[0], *geometry, activation == "Relu")
                groups.setdefault(key, []).append((name, graph.weights[node.input[1]].dims[0]))
        for group in groups.values():
            if len(group) > 1:
                yield tuple(name for name, channels in sorted(group, key=lambda item: -(item[1] & -item[1])))

    def _joins(self, node: onnx.NodeProto, reader: onnx.NodeProto | None) -> bool:
        """Whether one kernel computes a node and the only one that reads its value."""
        if reader is None:
            return False
        if reader.op_type == "Slice" and node.op_type in {"Concat", "Slice"}:
            return True
        product = node if node.op_type == "Gemm" else self._graph.producer.get(node.input[0]) if node.input else None
        if reader.op_type == "Gemm" and node.op_type in {"Gemm", *_INTO_CONVOLUTIONS} and _is(product, {"Gemm"}):
            return True
        if reader.output[0] in self._absorbed:
            return self._absorbed[reader.output[0]] in node.output
        pointwise = node.op_type in _POINTWISE and node.output[0] not in self._absorbed
        return pointwise and reader.op_type in _POINTWISE

    def _copies(self, node: onnx.NodeProto, name: str, concatenations: bool) -> bool:
        """Whether a reshape copies values: into a concatenation where the batch is open, and out of another layout."""
        graph = self._graph
        into = concatenations and not graph.fixed and _is(graph.sole_reader(name), {"Concat"})
        return into or name in graph.outputs or _is(graph.producer.get(node.input[0]), {"Transpose"})

    def _in_place(self, node: onnx.NodeProto) -> bool:
        """Whether the operands of a concatenation of channels are computed where they belong, none copied there."""
        graph = self._graph
        if attributes(node).get("axis", 0) != 1 or len(node.input) < 2:
            return False
        if _is(graph.sole_reader(node.output[0]), {"Slice", "Split"}):
            return False
        for operand in node.input:
            name = _unreshaped(graph, operand)
            placed = [one for one in graph.readers[name] if one.op_type in {"Concat", *RESHAPES}]
            producer = graph.producer.get(name)
            if len(placed) > 1 or name in self._sliced or _is(producer, {"Resize", "Slice", "Split"}):
                return False
            if producer is not None and producer.op_type == "Concat" and not self._in_place(producer):
                return False
        return True

    def _first_channels(self, node: onnx.NodeProto) -> bool:
        """Whether a Slice takes neighbouring channels from the first one on."""
        given = dict(zip(("data", "starts", "ends", "axes", "steps"), node.input, strict=False))
        starts, axes, steps = (self._integers(given.get(key, "")) for key in ("starts", "axes", "steps"))
        return starts == [0] and axes == [1] and steps in ([1], None)

    def _integers(self, name: str) -> list[int] | None:
        """A constant vector of integers, or None where it is none."""
        array = stored(self._graph, name, self._folder)
        return None if array is None or array.dtype.kind != "i" else [int(number) for number in array.reshape(-1)]


def _unreshaped(graph: Graph, value: str) -> str:
    """The value that ``value`` is a reshape of, where the batch is fixed and a reshape copies nothing; else itself."""
    while graph.fixed and _is(graph.producer.get(value), RESHAPES) and graph.sole_reader(value) is not None:
        value = graph.producer[value].input[0]
    return value


def _is_pointwise_convolution(node: onnx.NodeProto) -> bool:
    """Whether it is of 1 x 1, in steps of 1."""
    given = attributes(node)
    sizes = [*given.get("kernel_shape", [0]), *given.get("strides", [])]
    return node.op_type == "Conv" and given.get("group", 1) == 1 and all(size == 1 for size in sizes)


def _is(node: onnx.NodeProto | None, kinds: AbstractSet[str]) -> bool:
    return node is not None and node.op_type in kinds
