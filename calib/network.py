"""The network as calibration sees it: traced, normalised, every tensor named, every INT8 layer known.

One description serves the calibrator, the integer simulation, explicit quantization, the ONNX export and the engines,
so that none of them can disagree about a name or about where a value is quantized.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from calib.ops import clamps_at_6
from common.config import Task
from common.errors import InputError, first_line

INPUT: Final = "data"
OUTPUT: Final = "prob"


@dataclass(frozen=True)
class Layer:
    """An operation that can run in INT8.

    Attributes:
        name: As in the calibration table (the name of its own output tensor, before an in-place ReLU too).
        kind: ``conv``, ``linear``, ``matmul`` (of two activations), ``add``, ``avgpool``, ``activation`` or
            ``softmax``.
        node: Name of its fx node.
        inputs: Names of the fx nodes of its activations.
        target: Path of its module in ``Network.module``; None for a function.
    """

    name: str
    kind: str
    node: str
    inputs: tuple[str, ...]
    target: str | None


@dataclass(frozen=True)
class Network:
    """A float network, ready to be calibrated, quantized, exported and compiled.

    Attributes:
        name: Names the table's file: ``CalibrationTable<name>``.
        module: Eval mode, batch normalisation folded, dropout removed, no in-place operation; one input ``data``
            float32 [B, C, H, W]; its output is the model's: a tensor, or a tuple of tensors where there are several.
        tensors: Names of the calibration table, in network order.
        tensor_of: fx node name -> tensor name. A reshape or dropout is its input's tensor, as in Caffe; the value
            before an in-place ReLU has no name of its own, the value after it has the layer's.
        observed: fx node name -> tensor name, for the one node whose value is calibrated under that name.
        scale_source: Tensor -> tensor whose histogram gives its scale; itself but for pooling windows.
        kinds: fx node name -> kind of operation.
        layers: What can run in INT8, in network order.
        unsupported: Tensor name -> operation that stays in float.
        input_shape: (C, H, W) of one image, where ``trace`` was told; exporting needs it.
        outputs: fx node names of the output tensors, in order.
        output_names: What the model calls its outputs (``logits``, ``out``); ``output`` where it gives one tensor.
        task: ``classify``, ``regress``, ``embed`` or ``detect``, as :func:`calib.task.find_task` found it.
        traced_by: ``torch.fx``, or ``torch.export`` and why not ``torch.fx``.
    """

    name: str
    module: fx.GraphModule
    tensors: tuple[str, ...]
    tensor_of: Mapping[str, str]
    observed: Mapping[str, str]
    scale_source: Mapping[str, str]
    kinds: Mapping[str, str]
    layers: tuple[Layer, ...]
    unsupported: Mapping[str, str]
    input_shape: tuple[int, int, int] | None = None
    outputs: tuple[str, ...] = ()
    output_names: tuple[str, ...] = ("output",)
    task: Task = "classify"
    traced_by: str = "torch.fx"

    @property
    def gives_probabilities(self) -> bool:
        """Whether the network ends in a softmax of its own."""
        return self.kinds.get(self.outputs[0]) == "softmax" if len(self.outputs) == 1 else False

    @property
    def output_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of one image's value of each output; empty ones where the network was traced without an image."""
        nodes = {node.name: node for node in self.module.graph.nodes}
        return tuple(nodes[name].meta.get("shape", ()) for name in self.outputs)

    def value_shapes(self, images: int) -> dict[str, torch.Size]:
        """Fx node name -> shape of its value for so many images, where that is a tensor.

        The network was traced with an ``input_shape``.
        """
        assert self.input_shape is not None
        shapes = Shapes(self.module)
        with torch.inference_mode():
            shapes.run(torch.zeros(images, *self.input_shape))
        return shapes.found

    def run(self, images: Tensor, observe: Callable[[str, Tensor], None]) -> Any:
        """Run in float and call ``observe(tensor name, value)`` for every named tensor, in network order.

        Args:
            images: float32 [B, C, H, W] on the network's device.
            observe: Must not modify the value.

        Returns:
            What the model gives: a tensor, or a tuple of tensors.

        Raises:
            InputError: the images do not fit the network.
        """
        with torch.inference_mode():
            try:
                return self._observed_forward(self.module, images, observe)
            except RuntimeError as error:
                raise InputError(
                    f"network {self.name} does not take images of shape {tuple(images.shape)}: {first_line(error)}"
                ) from error

    @cached_property
    def _observed_forward(self) -> Callable[[nn.Module, Tensor, Callable[[str, Tensor], None]], Any]:
        """The module's forward pass as Python code that observes: an interpreter takes longer than LeNet's layers."""
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        output = graph.graph_copy(self.module.graph, copies)
        (image,) = (node for node in graph.nodes if node.op == "placeholder")
        with graph.inserting_after(image):
            observe = graph.placeholder("observe")
        for node, copied in copies.items():
            if self.kinds.get(node.name) == "relu" and self._is_free(node.all_input_nodes[0]):
                overwrite = F.relu6 if clamps_at_6(node, self.module) else F.relu
                copied.op, copied.target, copied.args = "call_function", overwrite, (copied.all_input_nodes[0],)
                copied.kwargs = {"inplace": True}
        for node, copied in copies.items():
            if node.name in self.observed:
                with graph.inserting_after(observe if copied is image else copied):
                    graph.call_function(_observe, (observe, self.observed[node.name], copied))
        graph.output(output)
        code = graph.python_code("self")
        names = dict(code.globals)
        exec(code.src, names)  # noqa: S102 - as fx.GraphModule makes its forward
        return names["forward"]  # type: ignore[no-any-return]

    def _is_free(self, node: fx.Node) -> bool:
        """Whether a value that nobody observes has memory of its own, which its one reader may overwrite."""
        return (
            self.kinds.get(node.name) in ("conv", "linear", "add")
            and len(node.users) == 1
            and node.name not in self.observed
        )


class Shapes(fx.Interpreter):
    """Runs a graph, and notes the shapes of its values.

    Attributes:
        found: fx node name -> shape of its value, where that is a tensor.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self.found: dict[str, torch.Size] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.found[n.name] = value.shape
        return value


def copy_sharing_weights(module: fx.GraphModule) -> fx.GraphModule:
    """A copy whose layers and graph can be replaced, and whose parameters and buffers are those of ``module``."""
    shared = {id(value): value for value in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, shared)


def _observe(observe: Callable[[str, Tensor], None], name: str, value: Any) -> None:
    """What the generated code calls after a node."""
    if is_activation(value):
        observe(name, value)


def is_activation(value: Any) -> bool:
    """Whether a value can be calibrated; masks and indices that a network computes with cannot."""
    return isinstance(value, Tensor) and value.is_floating_point()
