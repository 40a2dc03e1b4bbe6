"""Tracing: from a PyTorch model to a :class:`calib.network.Network`.

``given`` copies the model; ``by_fx`` or ``by_export`` gives a graph; ``fold`` and ``inplace`` normalise it; ``check``
compares it with the model; ``describe`` names its tensors and layers.
"""

from __future__ import annotations

import logging

import torch
from torch import fx, nn

from calib.network import Network
from calib.tracing.by_export import export_graph, is_exported, plain_execution
from calib.tracing.by_fx import fx_graph, hidden_products
from calib.tracing.check import ModelCheck, RefusedError, told
from calib.tracing.describe import describe
from calib.tracing.fold import ask_for_shapes, fold_batchnorm, remove_nothing, take_out_divisors
from calib.tracing.given import plain_copy, refuse_unusable, unwrapped
from calib.tracing.inplace import purify
from common.errors import InputError, first_line, some

logger = logging.getLogger(__name__)


def trace(model: nn.Module, name: str | None = None, input_shape: tuple[int, int, int] | None = None) -> Network:
    """Describe ``model`` for calibration and quantization; ``model`` itself is left as it is.

    ``torch.fx`` traces it; where that fails, or leaves convolutions or matrix products inside what it does not look
    into, ``torch.export`` does (:mod:`calib.tracing.by_export`). Nothing is appended: the outputs are the model's.

    Args:
        model: From float32 [B, C, H, W] to a tensor, or a tuple, list, dictionary or dataclass of tensors. A module
            that ``torch.export`` made, too, and an ``ExportedProgram``. Weights in half precision become float32.
        name: Name of the network; the class name if None.
        input_shape: (C, H, W) of one image; ``torch.export``, the ONNX export and the ONNX Runtime engine need it.
            What was traced is then checked against ``model`` on random images.

    Raises:
        InputError: neither can trace it, it is TorchScript or not initialised, it has more than one input, or it
            computes something else once traced.
    """
    model = unwrapped(model)
    name = name or type(model).__name__
    refuse_unusable(model, name)
    with plain_execution():
        return _Tracing(model, name, input_shape).network()


class _Tracing:
    """The ways to trace one model, tried in turn."""

    def __init__(self, model: nn.Module, name: str, shape: tuple[int, int, int] | None) -> None:
        self._model = model
        self._name = name
        self._fault = f"network {name} cannot be traced: "
        self._shape = shape
        self._check = ModelCheck(self._copy(), name, shape) if shape is not None else None

    def _copy(self) -> nn.Module:
        """A copy to work on; a module of ``torch.export``, which has no modes, is always as it was exported."""
        try:
            root = plain_copy(self._model)
            if not is_exported(root):
                root.eval()
            root.requires_grad_(False)
        except Exception as error:
            raise InputError(f"network {self._name} cannot be copied: {first_line(error)}") from error
        return root

    def network(self) -> Network:
        """By the first way that succeeds; the last one's result or error where none is perfect."""
        if is_exported(self._model):
            return self._exported("")
        try:
            found = self._finished(fx_graph(self._copy(), self._name), "torch.fx")
        except RefusedError:
            raise
        except InputError as error:
            if self._shape is None:
                raise
            return self._exported(f"cannot: {str(error).removeprefix(self._fault)}")
        hidden = hidden_products(found.module, found.kinds, self._check.images[:1]) if self._check is not None else []
        if not hidden:
            return found
        try:
            return self._exported(f"does not look into {some(hidden)}")
        except InputError as error:
            logger.warning("%s: %s stays in float, since torch.export fails: %s", self._name, some(hidden), error)
            return found

    def _exported(self, reason: str) -> Network:
        """By ``torch.export``, a second time with PyTorch's own removal of in-place operations if need be.

        Args:
            reason: What ``torch.fx`` does or cannot; empty where it was not tried.
        """
        assert self._shape is not None or is_exported(self._model)
        failed: InputError
        for functional in (False, True):
            root = self._copy()
            try:
                module = export_graph(root, self._shape or (), functional)
                return self._finished(module, f"torch.export, since torch.fx {reason}" if reason else "torch.export")
            except InputError as error:
                failed = error
            except Exception as error:  # noqa: BLE001 - what torch.export raises is open-ended
                failed = InputError(f"{self._fault}{told(error, root)}; quantize a part of it without this")
                failed.__cause__ = error
            if is_exported(self._model):
                break
        raise failed

    def _finished(self, module: fx.GraphModule, traced_by: str) -> Network:
        """Normalise what was traced, check it against the model, and describe it."""
        remove_nothing(module)
        take_out_divisors(module)
        self._distinguish_outputs(module)
        ask_for_shapes(module)
        fold_batchnorm(module, self._check.shapes(module) if self._check is not None else {})
        in_place = purify(module)
        _work_channels_last(module)
        module.graph.eliminate_dead_code()
        module.graph.lint()
        module.delete_all_unused_submodules()
        module.recompile()
        if self._check is not None:
            self._check.compare(module)
            self._check.tell_shapes(module)
        names = self._check.output_names if self._check is not None else None
        return describe(self._name, module, in_place, self._shape, traced_by, names)

    def _distinguish_outputs(self, module: fx.GraphModule) -> None:
        """Make each output a value of its own where the model gives one twice, or the images.

        Raises:
            RefusedError: an output is the same whatever the images are.
        """
        output = next(node for node in module.graph.nodes if node.op == "output")
        given = output.args[0] if isinstance(output.args[0], tuple) else (output.args[0],)
        distinct: list[fx.Node] = []
        for number, node in enumerate(given, 1):
            assert isinstance(node, fx.Node)
            if node.op == "get_attr":
                raise RefusedError(
                    f"{self._fault}output {number} of {len(given)} does not depend on the images: leave it out"
                )
            if node.op == "placeholder" or node in distinct:
                with module.graph.inserting_before(output):
                    distinct.append(module.graph.call_function(torch.clone, (node,)))
            else:
                distinct.append(node)
        output.args = (tuple(distinct) if isinstance(output.args[0], tuple) else distinct[0],)


def _work_channels_last(module: fx.GraphModule) -> None:
    """Store convolutions' weights channels last, and so all that follows them: on a CPU, LeNet takes half the time.

    The values are the same but for rounding. ``view`` refuses such memory where ``reshape`` copies.
    """
    for submodule in module.modules():
        if isinstance(submodule, nn.Conv2d):
            submodule.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for node in module.graph.nodes:
        if node.op == "call_method" and node.target == "view":
            node.target = "reshape"
