"""From a class path in the configuration to a network, with the weights it starts from."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, fx, nn

from common.config import ModelConfig
from common.dotted import locate
from common.errors import InputError, first_line, some
from models.archive import is_plain, load_archive

_HOLDERS: Final = ("state_dict", "model_state_dict", "model")
"""Under which of its keys a checkpoint holds the state_dict; the first that is there."""


def build_network(config: ModelConfig, num_classes: int, channels: int) -> nn.Module:
    """Make the network that ``config`` names.

    ``num_classes``, and the number of input channels as ``in_channels`` or ``channels``, are passed where the class
    or factory takes such an argument and ``config.init_args`` does not set it.

    Args:
        config: Class path, arguments and, optionally, the file of weights to start from.
        num_classes: Classes of the data set; 0, which is not passed, where it has none.
        channels: Channels of its images.

    Raises:
        InputError: the class cannot be imported or called so, makes no ``nn.Module``, or the weights do not fit.
    """
    arguments = network_arguments(config, num_classes, channels)
    network = construct(resolve(config.class_path), config.class_path, arguments)
    if config.weights is not None:
        load_state(network, without_wrapper(read_weights(config.weights), network), str(config.weights))
    return network


def network_arguments(config: ModelConfig, num_classes: int, channels: int) -> dict[str, Any]:
    """All keyword arguments that :func:`build_network` calls the class with. Raises InputError as it does."""
    return {**_data_arguments(resolve(config.class_path), num_classes, channels), **config.init_args}


def network_name(class_path: str) -> str:
    """The name that the network's files carry: the last part of the class path, such as ``LeNet``."""
    return class_path.replace(":", ".").rpartition(".")[2]


def resolve(class_path: str) -> Callable[..., Any]:
    """The class or factory that ``model.class_path`` names; see :func:`common.dotted.locate`."""
    return locate(class_path, "model.class_path")


def construct(factory: Callable[..., Any], class_path: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Call ``factory`` with ``arguments``. Raises InputError when that fails or gives no ``nn.Module``."""
    try:
        network = factory(**arguments)
    except Exception as error:
        shown = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise InputError(f"{class_path}({shown}) failed: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(network, nn.Module):
        raise InputError(f"{class_path} made a {type(network).__name__}, not a torch.nn.Module")
    return network


def is_exported(network: nn.Module) -> bool:
    """Whether a network is a module of ``torch.export``: it does not train, and may take one number of images alone."""
    return isinstance(network, fx.GraphModule) and "train" in vars(network)  # which raises NotImplementedError


def to_eval_mode(network: nn.Module) -> nn.Module:
    """``network`` in eval mode; a module of ``torch.export`` is in the mode of its export, and stays so."""
    return network if is_exported(network) else network.eval()


def logits_of(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """What the loss is taken of: the network's ``logits`` method where it has one, else its output."""
    logits: Callable[[Tensor], Tensor] = getattr(network, "logits", network)
    return logits


def check_network(network: nn.Module, name: str, shape: tuple[int, int, int], num_classes: int) -> None:
    """Run the network on two images of ``shape`` (C, H, W), so that a misfit is found before training starts.

    Raises:
        InputError: it does not take such images, does not give ``num_classes`` scores, or gives probabilities where
            scores are needed.
    """
    training = network.training
    network.eval()
    example = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    size = "x".join(map(str, shape))
    try:
        with torch.no_grad():
            scores: Any = logits_of(network)(example)
    except Exception as error:
        raise InputError(f"{name} does not take images of {size} (channels x height x width): {error}") from error
    finally:
        network.train(training)
    if not isinstance(scores, Tensor) or scores.shape != (2, num_classes):
        given = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise InputError(f"{name} gives {given} for 2 images: expected (2, {num_classes}), one score per class")
    if bool((scores >= 0).all()) and torch.allclose(scores.sum(1), torch.ones(2), atol=1e-4):
        raise InputError(
            f"{name} gives probabilities: let it have a method logits(x) that gives the scores before softmax"
        )


def read_weights(path: Path) -> Mapping[str, Any]:
    """Read a state_dict without running code from the file: ``.safetensors``, else PyTorch's format.

    A checkpoint that holds it under ``state_dict`` (as Lightning's and this project's do), ``model_state_dict`` or
    ``model`` (as torchvision's) is taken as well, and so is one that holds no other tensors by name.

    Raises:
        InputError: the file is missing, damaged, or holds anything but tensors by name.
    """
    if not path.is_file():
        raise InputError(f"model.weights: there is no file {path}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            content: Any = load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"cannot read the weights in {path}: {error}") from error
    else:
        content = load_archive(path, legacy=True)
    if isinstance(content, Mapping) and not _is_state(content):
        held = {key: value for key, value in content.items() if _is_state(value)}
        if len(held) > 1 and not held.keys() & set(_HOLDERS):
            raise InputError(
                f"{path} holds several state_dicts, {some(list(map(str, held)))}: save the one to use alone"
            )
        content = next((held[key] for key in (*_HOLDERS, *held) if key in held), content)
    if not _is_state(content):
        keys = f" but {some(list(map(str, content)))}" if isinstance(content, Mapping) and content else ""
        raise InputError(f"{path} holds no state_dict (tensors by name){keys}")
    state: Mapping[str, Any] = content
    return state


def _is_state(content: Any) -> bool:
    """Whether something is a state_dict: tensors by name, one at least."""
    return (
        isinstance(content, Mapping)
        and len(content) > 0
        and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items())
    )


def without_wrapper(state: Mapping[str, Any], network: nn.Module) -> Mapping[str, Any]:
    """``state`` without the names of the modules that held ``network`` when it was saved.

    Such as ``module.`` of ``DistributedDataParallel``, ``model.`` of most LightningModules, ``model._orig_mod.`` with
    ``torch.compile`` in it. A state of which this does not make the network's own names is given as it is. Counts of
    batches that it lacks, as weights from elsewhere do, are the network's, as when PyTorch loads it.
    """
    own, inner = network.state_dict(), state
    counts = {name: value for name, value in own.items() if name.endswith("num_batches_tracked")}
    while inner.keys() | counts.keys() != own.keys():
        if len({name.partition(".")[0] for name in inner}) != 1 or not all("." in name for name in inner):
            return state
        inner = {name.partition(".")[2]: value for name, value in inner.items()}
    return counts | dict(inner)


def load_state(network: nn.Module, state: Mapping[str, Any], source: str) -> None:
    """Load ``state`` into ``network``, every name and shape matching.

    Raises:
        InputError: ``state`` belongs to another architecture, or holds NaN or infinity.
    """
    check_state(network, state, source)
    for name, value in state.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise InputError(f"{source} holds NaN or infinity in {name}: train again")
    network.load_state_dict(dict(state))


def check_state(network: nn.Module, state: Mapping[str, Any], source: str) -> None:
    """Compare names, shapes and kinds of ``state`` with ``network``, which may be without data (on ``meta``).

    Raises:
        InputError: they differ, or something in ``state`` is no plain tensor.
    """
    own = network.state_dict()
    if missing := [name for name in own if name not in state]:
        raise InputError(f"{source} is of another architecture: it lacks {some(missing)}")
    if unexpected := [str(name) for name in state if name not in own]:
        raise InputError(f"{source} is of another architecture: the network has no {some(unexpected)}")
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.shape != own[name].shape:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"{source} is of another architecture: {name} is {shape}, not {tuple(own[name].shape)}")
        if not is_plain(value) or value.is_floating_point() != own[name].is_floating_point():
            raise InputError(f"{source} is damaged: {name} is no plain tensor of {own[name].dtype}")


def _data_arguments(factory: Callable[..., Any], num_classes: int, channels: int) -> dict[str, int]:
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return {}
    arguments = {}
    # torchvision's factories hand **kwargs on to the class, which takes num_classes.
    if num_classes and ("num_classes" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())):
        arguments["num_classes"] = num_classes
    for name in ("in_channels", "channels"):
        if name in parameters:
            arguments[name] = channels
            break
    return arguments
