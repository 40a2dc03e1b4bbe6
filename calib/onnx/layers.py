"""Operators that TensorRT's ONNX parser makes of several layers, as nodes that compute the same.

What one of these layers hands to the next has an entry in TensorRT's tables, under the layer's name.

Imports onnx inside functions: it is slow to load.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from calib.onnx.model import attributes

if TYPE_CHECKING:
    import onnx

_FLOAT = 1  # onnx.TensorProto.FLOAT


def layers_of(node: onnx.NodeProto, names: Sequence[str], kind: int = _FLOAT) -> list[onnx.NodeProto]:
    """The layers of an operator as nodes, in order; the operator itself where it is one, or is not divided here.

    Args:
        node: Of the network; it stays as it is.
        names: Its layers' names in TensorRT, as :class:`calib.onnx.parser_names.ParserNames` gives them.
        kind: The values' element type, as ONNX numbers them.

    Returns:
        The last node gives what the operator gives. The values inside are :func:`inner_values`, and some that the
        parser does not name.
    """
    divide = _OPERATORS.get(node.op_type)
    if divide is None or node.domain not in ("", "ai.onnx"):
        return [node]
    layers = _Layers(node, names, kind)
    divide(layers, *node.input)
    if not layers.nodes:
        return [node]
    layers.nodes[-1].output[0] = node.output[0]
    return layers.nodes


def inner_values(nodes: Sequence[onnx.NodeProto]) -> list[str]:
    """The values between the layers that have an entry in the table."""
    return [name for node in nodes[:-1] for name in node.output if name.endswith("_output")]


class _Layers:
    """The layers of an operator, added one after the other.

    Attributes:
        nodes: What was added.
        attributes: The operator's.
    """

    def __init__(self, node: onnx.NodeProto, names: Sequence[str], kind: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.attributes: Mapping[str, Any] = attributes(node)
        self._node, self._names, self._kind = node, list(names), kind

    def layer(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Add a layer that the parser names; returns its value."""
        return self._add(operator, inputs, f"{self._names.pop(0)}_output", attributes)

    def unnamed(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Add a layer that it does not name."""
        return self._add(operator, inputs, self._private(), attributes)

    def reduction(self, operator: str, value: str) -> str:
        """Add a named layer that reduces along the operator's axes."""
        return self.layer(operator, value, *self._node.input[1:], **self.attributes)

    def constant(self, value: float) -> str:
        """Add a scalar."""
        from onnx import helper

        return self.unnamed("Constant", value=helper.make_tensor("", self._kind, [], [value]))

    def _add(self, operator: str, inputs: Sequence[str], output: str, attributes: Mapping[str, Any]) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(operator, inputs, [output], self._private(), **attributes))
        return output

    def _private(self) -> str:
        return f"{self._node.name or self._node.output[0]}/layer{len(self.nodes)}"


def _combined(operator: str) -> Callable[..., None]:
    """Operands that are combined two by two."""

    def divide(layers: _Layers, *operands: str) -> None:
        if len(operands) > 2:
            value = operands[0]
            for operand in operands[1:]:
                value = layers.layer(operator, value, operand)

    return divide


def _mean(layers: _Layers, *operands: str) -> None:
    if len(operands) > 1:
        value = operands[0]
        for operand in operands[1:]:
            value = layers.layer("Add", value, operand)
        layers.unnamed("Mul", value, layers.constant(1 / len(operands)))


def _gemm(layers: _Layers, a: str, b: str, bias: str = "") -> None:
    given = layers.attributes
    alpha, beta = given.get("alpha", 1.0), given.get("beta", 1.0)
    if alpha == 1 and not bias:
        return
    # Before operator set 11 a Gemm needs a bias.
    zero = layers.constant(0)
    value = layers.layer("Gemm", a, b, zero, transA=given.get("transA", 0), transB=given.get("transB", 0))
    if not bias:
        layers.unnamed("Mul", layers.constant(alpha), value)
        return
    if alpha != 1:
        value = layers.unnamed("Mul", layers.constant(alpha), value)
    if beta != 1:
        bias = layers.unnamed("Mul", layers.constant(beta), bias)
    layers.unnamed("Add", value, bias)


def _hard_swish(layers: _Layers, x: str) -> None:
    layers.unnamed("Mul", x, layers.layer("HardSigmoid", x, alpha=1 / 6, beta=0.5))


def _mish(layers: _Layers, x: str) -> None:
    layers.unnamed("Mul", x, layers.layer("Tanh", layers.layer("Softplus", x)))


def _celu(layers: _Layers, x: str) -> None:
    alpha, zero = layers.constant(layers.attributes.get("alpha", 1.0)), layers.constant(0)
    power = layers.layer("Exp", layers.layer("Div", x, alpha))
    positive = layers.layer("Max", x, zero)
    negative = layers.layer("Mul", alpha, layers.layer("Sub", power, layers.constant(1)))
    layers.unnamed("Add", positive, layers.layer("Min", zero, negative))


def _reduce_l1(layers: _Layers, x: str, axes: str = "") -> None:
    layers.reduction("ReduceL1", layers.layer("Abs", x))


def _reduce_l2(layers: _Layers, x: str, axes: str = "") -> None:
    layers.unnamed("Sqrt", layers.reduction("ReduceSumSquare", x))


def _reduce_log_sum_exp(layers: _Layers, x: str, axes: str = "") -> None:
    # The norm of what is positive is its sum; ReduceSum takes its axes in another way before opset 18.
    layers.unnamed("Log", layers.reduction("ReduceL1", layers.layer("Exp", x)))


_OPERATORS: Mapping[str, Callable[..., None]] = {
    "Celu": _celu,
    "Gemm": _gemm,
    "HardSwish": _hard_swish,
    "Max": _combined("Max"),
    "Mean": _mean,
    "Min": _combined("Min"),
    "Mish": _mish,
    "ReduceL1": _reduce_l1,
    "ReduceL2": _reduce_l2,
    "ReduceLogSumExp": _reduce_log_sum_exp,
    "Sum": _combined("Add"),
}
