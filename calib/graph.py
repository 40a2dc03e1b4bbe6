"""The network as calibration sees it: traced, normalised, every tensor named, every INT8 layer known.

One description serves the calibrator, the integer simulation, explicit quantization, the ONNX export and the engines,
so that none of them can disagree about a name or about where a value is quantized.
"""

from __future__ import annotations

import copy
import inspect
import logging
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.utils import _pytree

from calib.constants import fold_constants
from calib.table import CalibrationTable
from calib.task import Task, find_task
from calib.trace_check import ModelCheck, RefusedError, where
from calib.trace_export import export_graph, is_exported, plain_execution
from common.errors import InputError, first_line

logger = logging.getLogger(__name__)

INPUT: Final = "data"
OUTPUT: Final = "prob"

_MODULES: Final[Mapping[type[nn.Module], str]] = {
    nn.Conv2d: "conv",
    nn.Linear: "linear",
    nn.BatchNorm2d: "batchnorm",
    nn.BatchNorm1d: "batchnorm",
    nn.ReLU: "relu",
    nn.ReLU6: "relu",
    nn.SiLU: "activation",
    nn.Hardswish: "activation",
    nn.MaxPool2d: "maxpool",
    nn.AdaptiveMaxPool2d: "maxpool",
    nn.AvgPool2d: "avgpool",
    nn.AdaptiveAvgPool2d: "avgpool",
    nn.Softmax: "softmax",
    nn.Flatten: "view",
    nn.Unflatten: "view",
    nn.Identity: "nothing",
    nn.Dropout: "nothing",
    nn.Dropout1d: "nothing",
    nn.Dropout2d: "nothing",
    nn.AlphaDropout: "nothing",
}
_FUNCTIONS: Final[Mapping[Callable[..., Any], str]] = {
    F.relu: "relu",
    F.relu6: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.silu: "activation",
    F.hardswish: "activation",
    F.max_pool2d: "maxpool",
    torch.max_pool2d: "maxpool",
    F.adaptive_max_pool2d: "maxpool",
    F.avg_pool2d: "avgpool",
    F.adaptive_avg_pool2d: "avgpool",
    torch.add: "add",
    operator.add: "add",
    operator.iadd: "add",
    torch.matmul: "matmul",
    torch.bmm: "matmul",
    operator.matmul: "matmul",
    torch.cat: "concat",
    torch.concat: "concat",
    F.softmax: "softmax",
    torch.softmax: "softmax",
    torch.flatten: "view",
    torch.reshape: "view",
    torch.squeeze: "view",
    torch.unsqueeze: "view",
    torch.permute: "view",
    torch.transpose: "view",
    torch.chunk: "view",
    torch.split: "view",
    torch.unbind: "view",
    torch.select: "view",
    torch.unflatten: "view",
    F.dropout: "nothing",
    getattr: "shape",
}
_METHODS: Final[Mapping[str, str]] = {
    "relu": "relu",
    "relu_": "relu",
    "add": "add",
    "add_": "add",
    "matmul": "matmul",
    "bmm": "matmul",
    "softmax": "softmax",
    "flatten": "view",
    "reshape": "view",
    "view": "view",
    "squeeze": "view",
    "unsqueeze": "view",
    "permute": "view",
    "transpose": "view",
    "contiguous": "view",
    "chunk": "view",
    "split": "view",
    "unbind": "view",
    "select": "view",
    "unflatten": "view",
    "size": "shape",
    "dim": "shape",
}

MOVES_VALUES: Final = frozenset({"maxpool", "view", "concat"})
"""Operations that only move or choose values: quantizing what they read is quantizing what they give."""
QUANTIZABLE: Final = frozenset({"conv", "linear", "matmul", "add", "avgpool", "activation"})
"""Kinds of layer that run in INT8, quantizing their inputs."""


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
                return _Observed(self, observe).run(images)
            except RuntimeError as error:
                raise InputError(
                    f"network {self.name} does not take images of shape {tuple(images.shape)}: {first_line(error)}"
                ) from error


class _Observed(fx.Interpreter):
    def __init__(self, network: Network, observe: Callable[[str, Tensor], None]) -> None:
        super().__init__(network.module)
        self.extra_traceback = False
        self._names = network.observed
        self._observe = observe

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        name = self._names.get(n.name)
        if name is not None and is_activation(value):
            self._observe(name, value)
        return value


def is_activation(value: Any) -> bool:
    """Whether a value can be calibrated; masks and indices that a network computes with cannot."""
    return isinstance(value, Tensor) and value.is_floating_point()


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # What a user derives from a layer is one operation: those layers' own code does not trace.
        return isinstance(m, tuple(_MODULES)) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module, name: str | None = None, input_shape: tuple[int, int, int] | None = None) -> Network:
    """Describe ``model`` for calibration and quantization; ``model`` itself is left as it is.

    ``torch.fx`` traces it; where that fails, or leaves convolutions or matrix products inside what it does not look
    into, ``torch.export`` does (:mod:`calib.trace_export`). Nothing is appended: the outputs are the model's.

    Args:
        model: From float32 [B, C, H, W] to a tensor, or a tuple, list, dictionary or dataclass of tensors. A module
            that ``torch.export`` made, too, and an ``ExportedProgram``.
        name: Name of the network; the class name if None.
        input_shape: (C, H, W) of one image; ``torch.export``, the ONNX export and the ONNX Runtime engine need it.
            What was traced is then checked against ``model`` on random images.

    Raises:
        InputError: neither can trace it, it has more than one input, or it computes something else once traced.
    """
    name = name or type(model).__name__
    if isinstance(model, torch.export.ExportedProgram):
        model = model.module()
    with plain_execution():
        return _Tracing(model, name, input_shape).network()


class _Tracing:
    """The ways to trace one model, tried in turn."""

    def __init__(self, model: nn.Module, name: str, shape: tuple[int, int, int] | None) -> None:
        self._model = model
        self._name = name
        self._shape = shape
        self._check = ModelCheck(self._copy(), name, shape) if shape is not None else None

    def _copy(self) -> nn.Module:
        """A copy to work on; a module of ``torch.export``, which has no modes, is always as it was exported."""
        try:
            root = copy.deepcopy(self._model)
            if not is_exported(root):
                root.eval()
            root.requires_grad_(False)
            _bake_parametrizations(root)
        except Exception as error:
            raise InputError(f"network {self._name} cannot be copied: {first_line(error)}") from error
        return root

    def network(self) -> Network:
        """By the first way that succeeds; the last one's result or error where none is perfect."""
        if is_exported(self._model):
            return self._exported("")
        try:
            found = self._by_fx()
        except RefusedError:
            raise
        except InputError as error:
            if self._shape is None:
                raise
            return self._exported(f"cannot: {error}")
        hidden = _hidden_products(found.module, found.kinds) if self._shape is not None else []
        if not hidden:
            return found
        try:
            return self._exported(f"does not look into {_some(hidden)}")
        except InputError as error:
            logger.warning("%s: %s stays in float, since torch.export fails: %s", self._name, _some(hidden), error)
            return found

    def _by_fx(self) -> Network:
        root = self._copy()
        try:
            graph = _Tracer().trace(root)
        except Exception as error:  # what user code raises under tracing is open-ended
            raise InputError(f"network {self._name} cannot be traced: {first_line(error)}{where(error)}") from error
        module = fx.GraphModule(root, graph, class_name=self._name)
        _check_ends(module, self._name)
        fold_constants(module)
        return self._finished(module, "torch.fx")

    def _exported(self, reason: str) -> Network:
        """By ``torch.export``, a second time with PyTorch's own removal of in-place operations if need be.

        Args:
            reason: What ``torch.fx`` does or cannot; empty where it was not tried.
        """
        assert self._shape is not None or is_exported(self._model)
        failed: Exception
        for functional in (False, True):
            root = self._copy()
            try:
                module = export_graph(root, self._shape or (), functional)
                return self._finished(module, f"torch.export, since torch.fx {reason}" if reason else "torch.export")
            except Exception as error:  # noqa: BLE001 - what torch.export raises is open-ended
                failed = error
            if is_exported(self._model):
                break
        if isinstance(failed, InputError):
            raise failed
        fault = f"network {self._name} cannot be traced: torch.export fails: {first_line(failed)}{where(failed)}"
        raise InputError(f"{fault}; torch.fx {reason}" if reason else fault) from failed

    def _finished(self, module: fx.GraphModule, traced_by: str) -> Network:
        """Normalise what was traced, check it against the model, and describe it."""
        _remove_nothing(module)
        _fold_batchnorm(module)
        in_place = _make_out_of_place(module)
        _work_channels_last(module)
        module.graph.eliminate_dead_code()
        module.graph.lint()
        module.delete_all_unused_submodules()
        module.recompile()
        if self._check is not None:
            self._check.compare(module)
            self._check.tell_shapes(module)
        names = self._check.output_names if self._check is not None else None
        return _describe(self._name, module, in_place, self._shape, traced_by, names)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _bake_parametrizations(root: nn.Module) -> None:
    """Make plain parameters of those that are computed (weight normalisation, spectral normalisation, ...)."""
    for module in list(root.modules()):
        if parametrize.is_parametrized(module):
            # Removing them changes the class, which copies share with the original.
            kind = type(module)
            module.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
            module.requires_grad_(False)


def kind_of(node: fx.Node, module: fx.GraphModule) -> str:
    """What an fx node does: a kind of layer, ``input``, ``output``, ``shape`` or ``other``."""
    if node.op == "placeholder":
        return "input"
    if node.op in ("output", "get_attr"):
        return node.op
    if node.op == "call_module":
        return _kind_of_module(module.get_submodule(str(node.target)))
    if node.op == "call_method":
        kind = _METHODS.get(str(node.target), "other")
    elif node.target is operator.getitem:
        source = node.all_input_nodes[0]
        part = gives_tuple(source) and kind_of(source, module) == "other"
        kind = "shape" if _of_shapes(node, module) else "other" if part else "view"
    elif _is_idle_stochastic_depth(node):
        kind = "nothing"
    else:
        kind = _FUNCTIONS.get(node.target, "other")  # type: ignore[arg-type]
    if kind in ("add", "other") and _of_shapes(node, module):
        return "shape"
    if kind == "add" and (len(node.all_input_nodes) != 2 or "alpha" in node.kwargs):
        return "other"
    if kind == "matmul" and any(item.op == "get_attr" for item in node.all_input_nodes):
        return "other"
    if kind == "shape" and node.target is getattr and node.args[1] not in ("shape", "ndim"):
        return "other"
    return kind


def _kind_of_module(module: nn.Module) -> str:
    base = next((base for base in type(module).__mro__ if base in _MODULES), None)
    if base is None or module._forward_hooks or module._forward_pre_hooks:
        return "other"
    # A subclass is the layer that it derives from only if it computes the same.
    for method in ("forward", "_conv_forward"):
        if getattr(type(module), method, None) is not getattr(base, method, None) or method in vars(module):
            return "other"
    if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
        return "other"
    return _MODULES[base]


def gives_tuple(node: fx.Node) -> bool:
    """Whether an operation gives several values (``chunk``, ``max`` over a dimension), to judge by its readers."""
    return bool(node.users) and all(
        reader.target is operator.getitem and isinstance(reader.args[1], int) for reader in node.users
    )


def _is_idle_stochastic_depth(node: fx.Node) -> bool:
    """Stochastic depth of torchvision, which hides it from tracing, in eval mode."""
    if getattr(node.target, "__module__", None) != "torchvision.ops.stochastic_depth":
        return False
    return node.kwargs.get("training", node.args[3] if len(node.args) > 3 else True) is False


def _of_shapes(node: fx.Node, module: fx.GraphModule) -> bool:
    """Whether a node computes with sizes, not with tensors."""
    inputs = node.all_input_nodes
    return bool(inputs) and all(kind_of(item, module) == "shape" for item in inputs)


def _check_ends(module: fx.GraphModule, name: str) -> None:
    """Leave one input, and one output: a tensor, or a tuple of tensors.

    Raises:
        InputError: there is another number of inputs, or an optional one is used.
    """
    inputs = [node for node in module.graph.nodes if node.op == "placeholder" and not _is_optional(node)]
    if len(inputs) != 1:
        raise RefusedError(
            f"network {name} takes {len(inputs)} inputs: only networks with one image input are supported"
        )
    for node in [node for node in module.graph.nodes if node.op == "placeholder" and _is_optional(node)]:
        if node.users:
            raise InputError(f"network {name}: optional input {node.target!r} is not supported; give it a fixed value")
        module.graph.erase_node(node)
    output = next(node for node in module.graph.nodes if node.op == "output")
    results = tuple(item for item in _pytree.tree_leaves(output.args) if isinstance(item, fx.Node))
    if not results:
        raise InputError(f"network {name} gives no tensor that depends on its input")
    output.args = (results[0] if len(results) == 1 else results,)


def _is_optional(node: fx.Node) -> bool:
    """Whether an input has a default, or takes what is left over (``*args``, ``**kwargs``)."""
    return bool(node.args) or str(node.target).startswith("*")


_NO_PRODUCTS: Final = (nn.LayerNorm, nn.GroupNorm, nn.Embedding, nn.PReLU, nn.modules.batchnorm._BatchNorm)
_PRODUCTS: Final = frozenset(
    {
        *("conv1d", "conv2d", "linear", "matmul", "bmm", "mm", "addmm", "baddbmm", "einsum", "bilinear"),
        *("scaled_dot_product_attention", "multi_head_attention_forward", "batch_norm", "conv2d_same"),
    }
)


def _hidden_products(module: fx.GraphModule, kinds: Mapping[str, str]) -> list[str]:
    """What stays in float and holds convolutions or matrix products that ``torch.export`` may bring to light."""
    found = []
    for node in module.graph.nodes:
        if kinds.get(node.name) not in ("other", "batchnorm"):
            continue
        if node.op == "call_module":
            part = module.get_submodule(str(node.target))
            large = any(parameter.dim() > 1 for parameter in part.parameters())
            derived = isinstance(part, nn.modules.batchnorm._BatchNorm) and kinds[node.name] == "other"
            if derived or (large and type(part) not in _NO_PRODUCTS):
                found.append(f"{node.target} ({type(part).__name__})")
        elif (getattr(node.target, "__name__", None) or str(node.target)) in _PRODUCTS:
            found.append(getattr(node.target, "__name__", None) or str(node.target))
    return list(dict.fromkeys(found))


def _remove_nothing(module: fx.GraphModule) -> None:
    """Remove dropout and identities: in eval mode they do nothing."""
    for node in list(module.graph.nodes):
        if kind_of(node, module) == "nothing":
            node.replace_all_uses_with(node.all_input_nodes[0])
            module.graph.erase_node(node)


def _fold_batchnorm(module: fx.GraphModule) -> None:
    """Fold each batch normalisation into the convolution or linear layer before it, as TensorRT does."""
    uses: dict[str, int] = {}
    for node in module.graph.nodes:
        if node.op == "call_module":
            uses[str(node.target)] = uses.get(str(node.target), 0) + 1
    for node in list(module.graph.nodes):
        if kind_of(node, module) != "batchnorm":
            continue
        before = node.args[0]
        if not isinstance(before, fx.Node) or len(before.users) != 1:
            continue
        kind = kind_of(before, module)
        if kind not in ("conv", "linear") or uses[str(before.target)] != 1:
            continue
        layer, norm = module.get_submodule(str(before.target)), module.get_submodule(str(node.target))
        if not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d) or norm.running_mean is None:
            continue
        fused: nn.Module
        if isinstance(layer, nn.Conv2d):
            fused = fuse_conv_bn_eval(layer, norm)
        elif isinstance(layer, nn.Linear) and layer.out_features == norm.num_features:
            fused = fuse_linear_bn_eval(layer, norm)
        else:
            continue
        module.set_submodule(str(before.target), fused.requires_grad_(False))
        node.replace_all_uses_with(before)
        module.graph.erase_node(node)


def _make_out_of_place(module: fx.GraphModule) -> set[str]:
    """Replace in-place operations by pure ones; return the fx names of those that overwrote their input.

    Raises:
        InputError: there is no pure one.
    """
    in_place: set[str] = set()
    for node in list(module.graph.nodes):
        if not _purify(node, module):
            continue
        in_place.add(node.name)
        # Whoever reads the overwritten value later sees the new one.
        written, seen = node.args[0], False
        for other in module.graph.nodes:
            if other is node:
                seen = True
            elif seen and isinstance(written, fx.Node):
                other.replace_input_with(written, node)
    for submodule in module.modules():
        if getattr(submodule, "inplace", False):
            submodule.inplace = False  # type: ignore[assignment]
    return in_place


def _purify(node: fx.Node, module: fx.GraphModule) -> bool:
    """Make an operation pure; whether it overwrote its first argument until now."""
    if node.op == "call_module":
        return bool(getattr(module.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method":
        name = str(node.target)
        if not name.endswith("_") or name.endswith("__"):
            return False
        if not callable(getattr(Tensor, name[:-1], None)):
            raise InputError(f"the operation {name}, which works in place, is not supported")
        node.target = name[:-1]
        return True
    if node.op != "call_function" or not callable(node.target):
        return False
    if node.target is operator.iadd:
        node.target = operator.add
        return True
    name = getattr(node.target, "__name__", "")
    pure = getattr(torch, name[:-1], None)
    if name.endswith("_") and getattr(torch, name, None) is node.target and callable(pure):
        node.target = pure
        return True
    overwrites = _inplace_argument(node)
    if "inplace" in node.kwargs:
        node.kwargs = {**node.kwargs, "inplace": False}
    return overwrites


def _inplace_argument(node: fx.Node) -> bool:
    """The argument ``inplace`` of a function; given by position, it becomes a keyword."""
    try:
        parameters = list(inspect.signature(node.target).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    if "inplace" in parameters and len(node.args) > parameters.index("inplace"):
        position = parameters.index("inplace")
        node.kwargs = {**node.kwargs, **dict(zip(parameters[position:], node.args[position:], strict=False))}
        node.args = node.args[:position]
    return bool(node.kwargs.get("inplace", False))


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


def _describe(
    name: str,
    module: fx.GraphModule,
    in_place: set[str],
    input_shape: tuple[int, int, int] | None,
    traced_by: str,
    output_names: tuple[str, ...] | None,
) -> Network:
    nodes = [node for node in module.graph.nodes if node.op not in ("output", "get_attr")]
    kinds = {node.name: kind_of(node, module) for node in nodes}
    nodes = [node for node in nodes if kinds[node.name] != "shape"]
    outputs = next(node for node in module.graph.nodes if node.op == "output").all_input_nodes
    _keep_sums_in_float(nodes, kinds)

    # A ReLU that overwrites its input takes its name: "ip1" is the value after the in-place ReLU, as in Caffe.
    takes_name = {node.name for node in nodes if kinds[node.name] == "relu" and node.name in in_place}
    own: dict[str, str] = {}
    ends_in_softmax = len(outputs) == 1 and kinds[outputs[0].name] == "softmax"
    used = {INPUT, OUTPUT} if ends_in_softmax else {INPUT}
    for node in nodes:
        if node.op == "placeholder":
            own[node.name] = INPUT
        elif ends_in_softmax and node is outputs[0]:
            own[node.name] = OUTPUT
        elif kinds[node.name] == "view" or node.name in takes_name:
            own[node.name] = own[node.all_input_nodes[0].name]
        else:
            path = str(node.target) if node.op == "call_module" else node.meta.get("name", node.name)
            own[node.name] = _unique(path, used)

    # The value that carries a name is the last one written under it, among the first node and its in-place ReLUs.
    observed: dict[str, str] = {}
    holder: dict[str, str] = {}
    for node in nodes:
        tensor = own[node.name]
        if kinds[node.name] == "view" or gives_tuple(node):
            continue
        if node.name in takes_name:
            observed.pop(holder[tensor], None)
        holder[tensor] = node.name
        observed[node.name] = tensor
    tensors = tuple(observed.values())
    tensor_of = {
        node.name: own[node.name]
        for node in nodes
        if kinds[node.name] == "view" or gives_tuple(node) or node.name in observed
    }
    kind_by_tensor = {tensor: node for node, tensor in observed.items()}
    layers = tuple(
        Layer(
            name=own[node.name],
            kind=kinds[node.name],
            node=node.name,
            inputs=tuple(item.name for item in node.all_input_nodes if kinds.get(item.name) not in ("shape", None)),
            target=str(node.target) if node.op == "call_module" else None,
        )
        for node in nodes
        if kinds[node.name] in QUANTIZABLE or (ends_in_softmax and node is outputs[0])
    )
    unsupported = {
        own[node.name]: str(module.get_submodule(str(node.target)).__class__.__name__)
        if node.op == "call_module"
        else getattr(node.target, "__name__", str(node.target))
        for node in nodes
        if kinds[node.name] in ("other", "batchnorm") and node.target is not operator.getitem
    }
    return Network(
        name=name,
        module=module,
        tensors=tensors,
        tensor_of=tensor_of,
        observed=observed,
        scale_source=_scale_sources(nodes, kinds, own, kind_by_tensor, module),
        kinds=kinds,
        layers=layers,
        unsupported=unsupported,
        input_shape=input_shape,
        outputs=tuple(node.name for node in outputs),
        output_names=output_names or tuple(f"output_{i}" if i else "output" for i in range(len(outputs))),
        task=find_task(outputs, kinds),
        traced_by=traced_by,
    )


def _keep_sums_in_float(nodes: Sequence[fx.Node], kinds: dict[str, str]) -> None:
    """Let a sum that only operations in float read stay in float, as between the blocks of a transformer.

    Quantizing it would save nothing and cost accuracy.
    """
    carries = {"relu", "maxpool", "view", "concat"}
    in_int8: set[str] = set()
    in_float: set[str] = set()
    for node in reversed(nodes):
        for reader in node.users:
            kind = kinds.get(reader.name, "output")
            carried = kind in carries
            if kind in QUANTIZABLE or (carried and reader.name in in_int8):
                in_int8.add(node.name)
            elif kind in ("other", "batchnorm", "softmax") or (carried and reader.name in in_float):
                in_float.add(node.name)
        if kinds[node.name] == "add" and node.name in in_float - in_int8:
            kinds[node.name] = "other"


def _unique(name: str, used: set[str]) -> str:
    candidate, number = name, 0
    while candidate in used:
        number += 1
        candidate = f"{name}_{number}"
    used.add(candidate)
    return candidate


def _scale_sources(
    nodes: Iterable[fx.Node],
    kinds: Mapping[str, str],
    own: Mapping[str, str],
    tensors: Mapping[str, str],
    module: fx.GraphModule,
) -> dict[str, str]:
    """Tensor -> tensor whose histogram gives its scale, by the rule that TensorRT 10.6's tables show.

    The output of pooling over a window, maximum or average, takes its input's scale. All others have their own:
    global pooling, a concatenation and its inputs.
    """
    source = {tensor: tensor for tensor in tensors}
    for node in nodes:
        tensor = own[node.name]
        # What an in-place ReLU overwrites is another tensor: it keeps its own scale.
        if kinds[node.name] not in ("maxpool", "avgpool") or tensors.get(tensor) != node.name:
            continue
        if not _pools_everything(node, module):
            source[tensor] = source[own[node.all_input_nodes[0].name]]
    return source


def _pools_everything(node: fx.Node, module: fx.GraphModule) -> bool:
    """Whether a pooling operation makes one value of each channel, of whatever size (adaptive pooling to size 1)."""
    if node.op == "call_module":
        size = getattr(module.get_submodule(str(node.target)), "output_size", None)
    elif node.target in (F.adaptive_avg_pool2d, F.adaptive_max_pool2d):
        size = node.kwargs.get("output_size", node.args[1] if len(node.args) > 1 else None)
    else:
        return False
    return size == 1 or (isinstance(size, tuple | list) and list(size) == [1, 1])


@dataclass(frozen=True)
class Int8Plan:
    """Which layers run in INT8, and the scale of every value they quantize.

    Attributes:
        network: The float network.
        layers: Names of the layers that run in INT8.
        scales: fx node name -> scale, for every activation that an INT8 layer reads.
        weighted: The INT8 layers with weights, in network order.
        kept: Layer -> why it stays in float although it could run in INT8.
        output_scale: Scale of the network's output where that is quantized too.
        own_scales: fx node name -> scale of its tensor in the table, for every activation that has a usable one.
        float_inputs: INT8 layer -> the fx nodes among its inputs that it reads in float nevertheless.
    """

    network: Network
    layers: frozenset[str]
    scales: Mapping[str, float]
    weighted: tuple[Layer, ...]
    kept: Mapping[str, str]
    output_scale: float | None = None
    own_scales: Mapping[str, float] = field(default_factory=dict)
    float_inputs: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def reads_int8(self, layer: Layer, node: str) -> bool:
        """Whether ``layer`` runs in INT8 and takes the value of the fx node ``node`` quantized."""
        return layer.name in self.layers and node in layer.inputs and node not in self.float_inputs.get(layer.name, ())


def plan_int8(
    network: Network, table: CalibrationTable, keep_fp: Iterable[str] = (), quantize_output: bool = False
) -> Int8Plan:
    """Decide which layers run in INT8: all that can, but for those kept and those whose inputs have no scale.

    Args:
        network: The float network.
        table: Its calibration table; entries that the network does not know are named in a warning.
        keep_fp: Layers to keep in float.
        quantize_output: Whether the softmax and its output are quantized as well.

    Raises:
        InputError: ``keep_fp`` names no layer of the network, or the table has no scale for any of its layers.
    """
    known = {layer.name: layer for layer in network.layers}
    for name in keep_fp:
        if name not in known:
            raise InputError(f"no layer {name!r} in {network.name}: choose from {', '.join(known)}")
    usable = {name: scale for name, scale in table.scales.items() if name not in table.unusable}
    foreign = [name for name in table.scales if name not in network.tensors]
    if foreign:
        logger.warning("the table names tensors that %s does not have: %s", network.name, ", ".join(foreign))

    layers: list[Layer] = []
    scales: dict[str, float] = {}
    kept: dict[str, str] = {}
    for layer in network.layers:
        if layer.kind == "softmax" and not quantize_output:
            continue
        missing = [network.tensor_of.get(item, item) for item in layer.inputs]
        missing = [tensor for tensor in missing if tensor not in usable]
        if layer.name in keep_fp:
            kept[layer.name] = "kept in float as asked"
        elif missing:
            kept[layer.name] = f"no scale for {', '.join(missing)} in the table"
            logger.warning("%s stays in float: %s", layer.name, kept[layer.name])
        else:
            layers.append(layer)
            scales.update((item, usable[network.tensor_of[item]]) for item in layer.inputs)
    if not layers and not set(known) <= {*keep_fp, OUTPUT}:
        raise InputError(f"the table has no scale for any layer of {network.name}: it belongs to another network")
    return Int8Plan(
        network=network,
        layers=frozenset(layer.name for layer in layers),
        scales=scales,
        weighted=tuple(layer for layer in layers if layer.kind in ("conv", "linear")),
        kept=kept,
        output_scale=_output_scale(network, usable) if quantize_output else None,
        own_scales={node: usable[tensor] for node, tensor in network.tensor_of.items() if tensor in usable},
    )


def _output_scale(network: Network, usable: Mapping[str, float]) -> float | None:
    """The scale of a single output."""
    return usable.get(network.tensor_of.get(network.outputs[0], "")) if len(network.outputs) == 1 else None
