"""The network as calibration sees it: traced, normalised, every tensor named, every INT8 layer known.

One description serves the calibrator, the integer simulation, explicit quantization, the ONNX export and the engines,
so that none of them can disagree about a name or about where a value is quantized.
"""

from __future__ import annotations

import copy
import inspect
import linecache
import logging
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from calib.constants import fold_constants
from calib.table import CalibrationTable
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
    F.dropout: "nothing",
    getattr: "shape",
}
_METHODS: Final[Mapping[str, str]] = {
    "relu": "relu",
    "relu_": "relu",
    "add": "add",
    "add_": "add",
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
    "size": "shape",
    "dim": "shape",
}

MOVES_VALUES: Final = frozenset({"maxpool", "view", "concat"})
"""Operations that only move or choose values: quantizing what they read is quantizing what they give."""
QUANTIZABLE: Final = frozenset({"conv", "linear", "add", "avgpool", "activation"})
"""Kinds of layer that run in INT8, quantizing their inputs."""


@dataclass(frozen=True)
class Layer:
    """An operation that can run in INT8.

    Attributes:
        name: As in the calibration table (the name of its own output tensor, before an in-place ReLU too).
        kind: ``conv``, ``linear``, ``add``, ``avgpool``, ``activation`` or ``softmax``.
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
            float32 [B, C, H, W], one output ``prob`` float32 [B, classes].
        tensors: Names of the calibration table, in network order.
        tensor_of: fx node name -> tensor name. A reshape or dropout is its input's tensor, as in Caffe; the value
            before an in-place ReLU has no name of its own, the value after it has the layer's.
        observed: fx node name -> tensor name, for the one node whose value is calibrated under that name.
        scale_source: Tensor -> tensor whose histogram gives its scale; itself but for pooling windows.
        kinds: fx node name -> kind of operation.
        layers: What can run in INT8, in network order.
        unsupported: Tensor name -> operation that stays in float.
        input_shape: (C, H, W) of one image, where ``trace`` was told; exporting needs it.
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

    def run(self, images: Tensor, observe: Callable[[str, Tensor], None]) -> Tensor:
        """Run in float and call ``observe(tensor name, value)`` for every named tensor, in network order.

        Args:
            images: float32 [B, C, H, W] on the network's device.
            observe: Must not modify the value.

        Returns:
            Probabilities, float32 [B, classes].

        Raises:
            InputError: the images do not fit the network.
        """
        with torch.inference_mode():
            try:
                return _Observed(self, observe).run(images)  # type: ignore[no-any-return]
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

    Args:
        model: A classifier from float32 [B, C, H, W] to [B, classes]; a softmax is appended if it does not end in one.
        name: Name of the network; the class name if None.
        input_shape: (C, H, W) of one image; the ONNX export and the ONNX Runtime engine need it. What was traced is
            then checked against ``model`` on two random images.

    Raises:
        InputError: ``torch.fx`` cannot trace it, it has more than one input or output, or it computes something else
            once traced.
    """
    name = name or type(model).__name__
    try:
        root = copy.deepcopy(model).eval().requires_grad_(False)
        _bake_parametrizations(root)
    except Exception as error:
        raise InputError(f"network {name} cannot be copied: {first_line(error)}") from error
    try:
        graph = _Tracer().trace(root)
    except Exception as error:  # what user code raises under tracing is open-ended
        raise InputError(f"network {name} cannot be traced: {first_line(error)}{_where(error)}") from error
    module = fx.GraphModule(root, graph, class_name=name)
    _check_ends(module, name)
    try:
        fold_constants(module)
    except Exception as error:  # what user code raises is open-ended
        raise InputError(f"network {name} cannot be traced: {first_line(error)}{_where(error)}") from error
    check = _Check(root, name, input_shape) if input_shape is not None else None
    _remove_nothing(module)
    _fold_batchnorm(module)
    in_place = _make_out_of_place(module)
    _append_softmax(module)
    _work_channels_last(module)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.delete_all_unused_submodules()
    module.recompile()
    if check is not None:
        check.compare(module)
    return _describe(name, module, in_place, input_shape)


def _bake_parametrizations(root: nn.Module) -> None:
    """Make plain parameters of those that are computed (weight normalisation, spectral normalisation, ...)."""
    for module in list(root.modules()):
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
            module.requires_grad_(False)


class _Check:
    """What a model says of two images, to compare with what was traced of it."""

    def __init__(self, model: nn.Module, name: str, shape: tuple[int, int, int]) -> None:
        self._name = name
        parameter = next(model.parameters(), torch.empty(0))
        images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
        self._images = images.to(parameter.device)
        self._expected = self._run(model)

    def _run(self, model: nn.Module) -> Any:
        try:
            with torch.no_grad():
                return model(self._images.clone())
        except Exception as error:  # what user code raises is open-ended
            shape = tuple(self._images.shape)
            raise InputError(
                f"network {self._name} does not take images of shape {shape}: {first_line(error)}{_where(error)}"
            ) from error

    def compare(self, module: nn.Module) -> None:
        """Raise InputError if ``module`` computes other probabilities than the model, or than its scores' softmax.

        Also if the model gives one value for an image: it is no classifier.
        """
        found, expected = self._run(module), self._expected
        if expected.dim() == 2 and expected.shape[1] == 1:
            raise InputError(
                f"network {self._name} gives one value for an image, of which the softmax makes 1 whatever it is: "
                "only classifiers of two classes or more are supported"
            )
        # Folded batch normalisation rounds otherwise; the softmax passes on at most the scores' own difference.
        tolerance = 1e-3 * max(1.0, float(expected.abs().max())) if expected.numel() else 0.0
        for reference in (expected, torch.softmax(expected, 1)):
            if found.shape == reference.shape and torch.allclose(
                found, reference, rtol=0, atol=tolerance, equal_nan=True
            ):
                return
        raise InputError(
            f"network {self._name} computes something else once traced: random, or changing a value in place that "
            "other operations see through a view, or branching on something that tracing fixes"
        )


def _where(error: BaseException) -> str:
    """The last place outside PyTorch and this package that the error passed through."""
    place, step = "", error.__traceback__
    while step is not None:
        # Not by traceback.extract_tb, which fails on frames that torch.fx has patched.
        code = step.tb_frame.f_code
        if "/torch/" not in code.co_filename and Path(code.co_filename).parent != Path(__file__).parent:
            line = step.tb_lineno or code.co_firstlineno  # a patched frame may have none
            place = f" ({code.co_filename}:{line}: {linecache.getline(code.co_filename, line).strip()})"
        step = step.tb_next
    return place


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
    inputs = [node for node in module.graph.nodes if node.op == "placeholder" and not _is_optional(node)]
    if len(inputs) != 1:
        raise InputError(f"network {name} takes {len(inputs)} inputs: only networks with one image input are supported")
    for node in [node for node in module.graph.nodes if node.op == "placeholder" and _is_optional(node)]:
        if node.users:
            raise InputError(f"network {name}: optional input {node.target!r} is not supported; give it a fixed value")
        module.graph.erase_node(node)
    result = next(node for node in module.graph.nodes if node.op == "output").args[0]
    if not isinstance(result, fx.Node):
        raise InputError(f"network {name} returns {type(result).__name__}: only one output tensor is supported")


def _is_optional(node: fx.Node) -> bool:
    """Whether an input has a default, or takes what is left over (``*args``, ``**kwargs``)."""
    return bool(node.args) or str(node.target).startswith("*")


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


def _append_softmax(module: fx.GraphModule) -> None:
    output = next(node for node in module.graph.nodes if node.op == "output")
    last = output.args[0]
    assert isinstance(last, fx.Node)  # _check_ends
    if kind_of(last, module) == "softmax":
        return
    target = OUTPUT
    while hasattr(module, target):
        target += "_"
    module.add_submodule(target, nn.Softmax(dim=1))
    with module.graph.inserting_before(output):
        softmax = module.graph.call_module(target, (last,))
    output.args = (softmax,)


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
    name: str, module: fx.GraphModule, in_place: set[str], input_shape: tuple[int, int, int] | None
) -> Network:
    nodes = [node for node in module.graph.nodes if node.op not in ("output", "get_attr")]
    kinds = {node.name: kind_of(node, module) for node in nodes}
    nodes = [node for node in nodes if kinds[node.name] != "shape"]
    output = next(node for node in module.graph.nodes if node.op == "output").args[0]

    # A ReLU that overwrites its input takes its name: "ip1" is the value after the in-place ReLU, as in Caffe.
    takes_name = {
        node.name for node in nodes if kinds[node.name] == "relu" and node.name in in_place and node is not output
    }
    own: dict[str, str] = {}
    used = {INPUT, OUTPUT}
    for node in nodes:
        if node.op == "placeholder":
            own[node.name] = INPUT
        elif node is output:
            own[node.name] = OUTPUT
        elif kinds[node.name] == "view" or node.name in takes_name:
            own[node.name] = own[node.all_input_nodes[0].name]
        else:
            own[node.name] = _unique(str(node.target) if node.op == "call_module" else node.name, used)

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
        if kinds[node.name] in QUANTIZABLE | {"softmax"}
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
    )


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
        output_scale=usable.get(OUTPUT) if quantize_output else None,
        own_scales={node: usable[tensor] for node, tensor in network.tensor_of.items() if tensor in usable},
    )
