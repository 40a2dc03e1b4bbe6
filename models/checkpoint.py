"""The trained network with what later commands need to know of it, in one file that runs no code when loaded."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.config import DataConfig, TaskName
from common.decode import decode, encode
from common.errors import InputError
from common.files import atomic_path, parse_json
from data.base import DatasetInfo
from models.archive import load_archive
from models.network import check_state, construct, load_state, resolve, to_eval_mode

FORMAT = 1
_META_LIMIT = 16 * 1024 * 1024
_LONGEST_NAME = 100
_IMPLIED: Mapping[str, dict[str, Any]] = {
    "googlenet": {"transform_input": True, "aux_logits": False},
    "inception_v3": {"transform_input": True},
}
"""Arguments that torchvision sets where it is given pretrained weights."""


@dataclass(frozen=True)
class CheckpointMeta:
    """What a checkpoint says about its network.

    Attributes:
        network: Name that the network's files carry, such as ``LeNet``.
        class_path: Class or factory of the network.
        init_args: All its keyword arguments, those that came from the data set included.
        dataset: The data it was trained on.
        data: Configuration that opens the same data again; ``dataset`` is never ``auto`` here.
        seed: That training began with.
        epochs: Epochs of training that the weights have seen.
        task: What the outputs are, where training was told; ``auto`` otherwise.
        metrics: Final figures, such as ``test_top1`` (in [0, 1]).
        versions: Package -> the version that trained it.
    """

    network: str
    class_path: str
    init_args: dict[str, Any]
    dataset: DatasetInfo
    data: DataConfig
    seed: int
    epochs: int = 0
    task: TaskName = "auto"
    metrics: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Files are named after it.
        if not self.network.isidentifier() or len(self.network) > _LONGEST_NAME:
            raise InputError(f"{self.network!r:.60} is not the name of a network")


@dataclass(frozen=True)
class Checkpoint:
    """A trained network, in eval mode on the CPU, and what is known of it."""

    network: nn.Module
    meta: CheckpointMeta


def save_checkpoint(path: Path, network: nn.Module, meta: CheckpointMeta) -> None:
    """Write ``network`` and ``meta`` to ``path`` atomically.

    Raises:
        InputError: a weight is NaN or infinite, or the file cannot be written; an earlier one stays as it was.
    """
    # Cloned, because contiguous() keeps odd strides where a dimension is 1, and the file would show them.
    state = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in network.state_dict().items()
    }
    for name, value in state.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise InputError(f"training ended with NaN or infinity in {name}: lower --optimizer.lr, and train again")
    write_torch(path, {"format": FORMAT, "meta": encode(meta), "state_dict": state})


def write_torch(path: Path, content: Any) -> None:
    """``torch.save`` to ``path`` atomically; equal contents give equal files.

    Raises:
        InputError: the file cannot be written; an earlier one stays as it was.
    """
    # Through memory: PyTorch's own writer reports a full disk as a failed assertion, and puts the file's name inside.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_checkpoint(path: Path, trusted: str | None = None) -> Checkpoint:
    """Read a checkpoint of :func:`save_checkpoint`, treating the file as hostile.

    The network's class is named in the file. Classes of this project and of torchvision are built; any other is
    imported only if it is the one that the user's own configuration names. Whatever it is, the network is first made
    without memory where it can be.

    Args:
        path: The file.
        trusted: ``model.class_path`` of the user's configuration.

    Raises:
        InputError: the file is missing, damaged, not of this format, or does not fit its network.
    """
    content = _read(path)
    if not isinstance(content, dict) or not {"format", "meta", "state_dict"} <= content.keys():
        raise InputError(f"{path} is not a checkpoint of this project: make one with train.py")
    if content["format"] != FORMAT:
        raise InputError(f"{path} has checkpoint format {content['format']!r:.20}, not {FORMAT}: train again")
    if not isinstance(content["meta"], str) or len(content["meta"]) > _META_LIMIT:
        raise InputError(f"{path} is damaged: its metadata is not text")
    meta = decode(CheckpointMeta, parse_json(content["meta"], f"{path}: the metadata"), f"{path}: meta")
    state = content["state_dict"]
    if not isinstance(state, dict):
        raise InputError(f"{path} is damaged: it holds no state_dict")
    network = _construct(path, meta, state, trusted)
    load_state(network, state, str(path))
    return Checkpoint(to_eval_mode(network), meta)


def _read(path: Path) -> Any:
    if not path.is_file():
        raise InputError(f"there is no checkpoint {path}: run train.py first")
    return load_archive(path)


def _construct(path: Path, meta: CheckpointMeta, state: Mapping[str, Any], trusted: str | None) -> nn.Module:
    """Build the network that the file names, if that is safe."""
    module = meta.class_path.replace(":", ".").rpartition(".")[0]
    factory: Any = None
    arguments = meta.init_args
    if known := module.split(".")[0] == "models" or module.startswith("torchvision.models"):
        factory = _known_factory(meta.class_path)
        # Pretrained weights that the network started from (torchvision) are not fetched again: the file has its own.
        implied = _IMPLIED.get(meta.network, {}) if arguments.get("weights") else {}
        arguments = implied | {key: None if key.startswith("weights") else value for key, value in arguments.items()}
    if factory is None and meta.class_path == trusted:
        factory = resolve(meta.class_path)
    if factory is None and known:
        raise InputError(f"{path} is damaged: {meta.class_path!r:.100} is not a network")
    if factory is None:
        raise InputError(
            f"{path} names the class {meta.class_path!r:.100}, which this run's configuration does not: "
            "give --model.class_path with it if you trust it"
        )
    # First without memory: arguments that ask for more than the file holds do not get it.
    try:
        with torch.device("meta"):
            skeleton = construct(factory, meta.class_path, arguments)
    except InputError as error:
        # Some of torchvision's networks compute with values while they are made; others may do anything.
        if known and not isinstance(error.__cause__, NotImplementedError):
            raise
    else:
        check_state(skeleton, state, str(path))
    return construct(factory, meta.class_path, arguments)


def _known_factory(class_path: str) -> Callable[..., Any] | None:
    """The class of this project, or the builder of torchvision, that makes a classifier; None for anything else."""
    if class_path.startswith("models"):
        factory = resolve(class_path)
        own = isinstance(factory, type) and issubclass(factory, nn.Module) and factory.__module__.startswith("models.")
        return factory if own else None
    import torchvision
    from torchvision.models import get_model_builder, list_models

    # Classifiers alone: those that find objects would fetch weights for their inner network.
    name = class_path.replace(":", ".").rpartition(".")[2]
    builder: Callable[..., Any] | None = (
        get_model_builder(name) if name in list_models(module=torchvision.models) else None
    )
    return builder
