"""Which tensor of TensorRT's own calibration table is which of ours: the names differ.

Torch-TensorRT names the input ``input_0`` and the output ``output_0``. Every other tensor has the name of the layer
that makes it: a TorchScript node as text, ``%input.1 : Tensor = aten::_convolution(...), scope: __module.conv1 # ...``,
or what TensorRT calls a layer without a name, ``(Unnamed Layer* 9) [Shuffle]_output``. The ``%`` numbers and the path
of PyTorch's source in the text change from one machine to the next; the operation and the module in its ``scope:`` do
not. Some operations have no scope. So both tables are read as a sequence of operations and aligned: the longest common
subsequence, in order, in which a scope must be the same where both have one. What has no counterpart is listed with
the reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from calib.table import CalibrationTable

if TYPE_CHECKING:
    from calib.network import Network

_UNNAMED = re.compile(r"\(Unnamed Layer\* (\d+)\) \[([^\]]+)\](?:_output)?(?:_\d+)?")
_TORCHSCRIPT = re.compile(r"%\S+ : .*? = aten::(\w+)\(")
_SCOPE = re.compile(r", scope: (?:\S*/)?__module\.(\S+)")
_CONSTANT = re.compile(r"\[Freeze Tensor |\[Constant|%\S+ : .*? = (?:aten::t\(|trt::const\()")
_INPUT, _OUTPUT = re.compile(r"input_\d+"), re.compile(r"output_\d+")

_MADE_BY: Mapping[str, frozenset[str]] = {
    "input": frozenset({"input"}),
    "conv": frozenset({"Convolution", "Deconvolution", "_convolution", "convolution", "conv2d", "conv_transpose2d"}),
    "linear": frozenset(
        {"ElementWise", "Matrix Multiply", "Fully Connected", "Convolution", "linear", "matmul", "add"}
    ),
    "add": frozenset({"ElementWise", "add", "add_"}),
    "maxpool": frozenset({"Pooling", "max_pool2d", "adaptive_max_pool2d"}),
    "avgpool": frozenset({"Pooling", "avg_pool2d", "adaptive_avg_pool2d"}),
    "relu": frozenset({"Activation", "relu", "relu_", "relu6", "hardtanh", "clamp"}),
    "activation": frozenset({"ElementWise", "Activation", "silu", "hardswish", "mul"}),
    "softmax": frozenset({"SoftMax", "softmax"}),
    "concat": frozenset({"Concatenation", "cat"}),
    "batchnorm": frozenset({"Scale", "batch_norm"}),
}
"""Kind of operation (``calib.ops``) -> TensorRT layers and TorchScript operations whose output it can be.

A linear layer becomes a transposition, a matrix product and a sum with the bias: its value is the last.
"""

_BEFORE_RELU = _MADE_BY["conv"] | _MADE_BY["add"]
_RESHAPES = frozenset({"Shuffle", "flatten", "view", "reshape", "permute", "transpose", "squeeze", "unsqueeze"})


@dataclass(frozen=True)
class Operation:
    """What makes a tensor.

    Attributes:
        kind: Of operation, as in ``calib.ops`` for ours, as TensorRT or TorchScript has it for TensorRT's.
        scope: Path of the module; None for a function, or where it is not known.
    """

    kind: str
    scope: str | None = None


@dataclass(frozen=True)
class Pair:
    """A tensor in both tables, or in one of them.

    Attributes:
        reference: Our name; None if only TensorRT has it.
        tensorrt: TensorRT's name; None if only we have it.
        reference_scale: Our scale.
        tensorrt_scale: TensorRT's.
        note: Why it is in one of the tables alone, or why the scales differ; empty where no reason is known.
    """

    reference: str | None
    tensorrt: str | None
    reference_scale: float | None
    tensorrt_scale: float | None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """TensorRT's scale over ours; None without a counterpart."""
        if self.reference_scale is None or self.tensorrt_scale is None:
            return None
        if self.reference_scale == 0:
            return 1.0 if self.tensorrt_scale == 0 else None
        return self.tensorrt_scale / self.reference_scale


def compare(
    reference: CalibrationTable, tensorrt: CalibrationTable, made_by: Mapping[str, Operation]
) -> tuple[Pair, ...]:
    """Put two tables of one network side by side, in network order.

    Args:
        reference: Ours.
        tensorrt: TensorRT's, by its own names.
        made_by: Our tensors -> what makes them, in network order (:func:`made_by`).
    """
    ours = [(name, made_by.get(name, Operation(""))) for name in reference.scales]
    theirs = _in_order(tensorrt)
    pairs: list[Pair] = []
    i = j = 0
    for a, b in [*_align(ours, theirs), (len(ours), len(theirs))]:
        pairs += [Pair(name, None, reference.scales[name], None) for name, _ in ours[i:a]]
        pairs += [Pair(None, name, None, tensorrt.scales[name], _note(made)) for name, made in theirs[j:b]]
        if a < len(ours):
            mine, other = ours[a][0], theirs[b][0]
            pairs.append(Pair(mine, other, reference.scales[mine], tensorrt.scales[other]))
        i, j = a + 1, b + 1
    return tuple(pairs)


def made_by(network: Network) -> dict[str, Operation]:
    """The network's tensors -> what makes them, in network order."""
    targets = {node.name: str(node.target) for node in network.module.graph.nodes if node.op == "call_module"}
    return {tensor: Operation(network.kinds[node], targets.get(node)) for node, tensor in network.observed.items()}


def short_name(name: str) -> str:
    """A tensor's name for people: ``conv1 _convolution`` of the long text of a TorchScript node; others as they are."""
    operation = _TORCHSCRIPT.match(name)
    if not operation:
        return name
    scope = _SCOPE.search(name)
    return f"{scope[1]} {operation[1]}" if scope else operation[1]


def _note(made: Operation) -> str:
    """Why a tensor is in TensorRT's table alone."""
    if made.kind == "constant":
        return "weights or biases: TensorRT calibrates constants, too"
    if made.kind in _RESHAPES:
        return "a reshaped value: it has a histogram of its own in TensorRT, behind pooling another scale"
    if made.kind in ("matmul", "Matrix Multiply"):
        return "a matrix product before its bias"
    if made.kind in _BEFORE_RELU:
        return "a value before the ReLU that overwrites it"
    return ""


def _in_order(table: CalibrationTable) -> list[tuple[str, Operation]]:
    """TensorRT's tensors with what made them, in network order: the numbers in the names give it, else the file."""
    entries: list[tuple[int, int, str, Operation]] = []
    number = -1
    for line, name in enumerate(table.scales):
        if match := _UNNAMED.fullmatch(name):
            number = int(match[1])
            entries.append((number, line, name, Operation(match[2])))
        elif _CONSTANT.match(name):
            entries.append((number, line, name, Operation("constant")))
        elif _INPUT.fullmatch(name):
            entries.append((-1, line, name, Operation("input")))
        elif _OUTPUT.fullmatch(name):
            entries.append((1 << 30, line, name, Operation("output")))
        elif match := _TORCHSCRIPT.match(name):
            scope = _SCOPE.search(name)
            entries.append((number, line, name, Operation(match[1], scope[1] if scope else None)))
        else:
            entries.append((number, line, name, Operation(name)))
    made_by = {name: made for _, _, name, made in sorted(entries, key=lambda entry: entry[:2])}
    for before, name in pairwise(made_by):
        # A bias is reshaped before it is added.
        reshaped = made_by[name].kind == "Shuffle" and table.scales[name] == table.scales[before]
        if reshaped and made_by[before].kind == "constant":
            made_by[name] = Operation("constant")
    return list(made_by.items())


def _align(ours: Sequence[tuple[str, Operation]], theirs: Sequence[tuple[str, Operation]]) -> list[tuple[int, int]]:
    """Positions of the longest common subsequence: (in ours, in theirs)."""
    last = len(ours) - 1

    def same(i: int, j: int) -> bool:
        name, mine = ours[i]
        other, made = theirs[j]
        if made.kind == "output":
            return i == last
        if None not in (mine.scope, made.scope) and mine.scope != made.scope:
            return False
        return name == other or made.kind in _MADE_BY.get(mine.kind, frozenset())

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
