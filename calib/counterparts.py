"""Which tensor of TensorRT's own calibration table is which of ours: by position in the graph, since names differ.

Torch-TensorRT names the input ``input_0`` and the output ``output_0`` and leaves the rest to TensorRT, which says only
what made a tensor: ``(Unnamed Layer* 3) [Pooling]_output``. So both tables are read as a sequence of operations and
aligned: the longest common subsequence, in order. What has no counterpart is listed as such.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calib.table import CalibrationTable

if TYPE_CHECKING:
    from calib.graph import Network

_UNNAMED = re.compile(r"\(Unnamed Layer\* (\d+)\) \[([^\]]+)\](?:_output)?(?:_\d+)?")
_INPUT, _OUTPUT = re.compile(r"input_\d+"), re.compile(r"output_\d+")

_MADE_BY: Mapping[str, frozenset[str]] = {
    "input": frozenset({"input"}),
    "conv": frozenset({"Convolution"}),
    "linear": frozenset({"ElementWise", "Matrix Multiply", "Fully Connected", "Convolution"}),
    "add": frozenset({"ElementWise"}),
    "maxpool": frozenset({"Pooling"}),
    "avgpool": frozenset({"Pooling"}),
    "relu": frozenset({"Activation"}),
    "activation": frozenset({"ElementWise", "Activation"}),
    "softmax": frozenset({"SoftMax"}),
    "concat": frozenset({"Concatenation"}),
    "batchnorm": frozenset({"Scale"}),
}
"""Kind of operation (``calib.graph``) -> TensorRT layers whose output it can be; a linear layer ends in its bias."""


@dataclass(frozen=True)
class Pair:
    """A tensor in both tables, or in one of them.

    Attributes:
        reference: Our name; None if only TensorRT has it.
        tensorrt: TensorRT's name; None if only we have it.
        reference_scale: Our scale.
        tensorrt_scale: TensorRT's.
    """

    reference: str | None
    tensorrt: str | None
    reference_scale: float | None
    tensorrt_scale: float | None

    @property
    def ratio(self) -> float | None:
        """TensorRT's scale over ours; None without a counterpart."""
        if self.reference_scale is None or self.tensorrt_scale is None:
            return None
        if self.reference_scale == 0:
            return 1.0 if self.tensorrt_scale == 0 else None
        return self.tensorrt_scale / self.reference_scale


def compare(reference: CalibrationTable, tensorrt: CalibrationTable, made_by: Mapping[str, str]) -> tuple[Pair, ...]:
    """Put two tables of one network side by side, in network order.

    Args:
        reference: Ours.
        tensorrt: TensorRT's, by its own names.
        made_by: Our tensors -> kind of operation that makes them, in network order (:func:`made_by`).
    """
    ours = [(name, made_by.get(name, "")) for name in reference.scales]
    theirs = _in_order(tensorrt)
    pairs: list[Pair] = []
    i = j = 0
    for a, b in [*_align(ours, theirs), (len(ours), len(theirs))]:
        pairs += [Pair(name, None, reference.scales[name], None) for name, _ in ours[i:a]]
        pairs += [Pair(None, name, None, tensorrt.scales[name]) for name, _ in theirs[j:b]]
        if a < len(ours):
            mine, other = ours[a][0], theirs[b][0]
            pairs.append(Pair(mine, other, reference.scales[mine], tensorrt.scales[other]))
        i, j = a + 1, b + 1
    return tuple(pairs)


def made_by(network: Network) -> dict[str, str]:
    """The network's tensors -> kind of operation that makes them, in network order."""
    return {tensor: network.kinds[node] for node, tensor in network.observed.items()}


def _in_order(table: CalibrationTable) -> list[tuple[str, str]]:
    """TensorRT's tensors with what made them, in network order: the numbers in the names give it, else the file."""
    entries: list[tuple[int, int, str, str]] = []
    number = -1
    for line, name in enumerate(table.scales):
        match = _UNNAMED.fullmatch(name)
        if match:
            number = int(match[1])
            entries.append((number, line, name, match[2]))
        elif _INPUT.fullmatch(name):
            entries.append((-1, line, name, "input"))
        elif _OUTPUT.fullmatch(name):
            entries.append((1 << 30, line, name, "output"))
        else:
            entries.append((number, line, name, name))
    return [(name, kind) for _, _, name, kind in sorted(entries, key=lambda entry: entry[:2])]


def _align(ours: Sequence[tuple[str, str]], theirs: Sequence[tuple[str, str]]) -> list[tuple[int, int]]:
    """Positions of the longest common subsequence: (in ours, in theirs)."""
    last = len(ours) - 1

    def same(i: int, j: int) -> bool:
        name, kind = ours[i]
        other, layer = theirs[j]
        if layer == "output":
            return i == last
        return name == other or layer in _MADE_BY.get(kind, frozenset())

    # length[i][j]: of the longest common subsequence of ours[i:] and theirs[j:]
    length = [[0] * (len(theirs) + 1) for _ in range(len(ours) + 1)]
    for i in reversed(range(len(ours))):
        for j in reversed(range(len(theirs))):
            length[i][j] = max(length[i + 1][j], length[i][j + 1])
            if same(i, j):
                length[i][j] = max(length[i][j], 1 + length[i + 1][j + 1])
    pairs = []
    i = j = 0
    while i < len(ours) and j < len(theirs):
        # Of several tensors that one of ours could be, take the last: a matrix product before its bias is not it.
        if same(i, j) and length[i][j] == 1 + length[i + 1][j + 1] and length[i][j + 1] < length[i][j]:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif length[i][j + 1] == length[i][j]:
            j += 1
        else:
            i += 1
    return pairs
