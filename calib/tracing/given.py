"""The model as it is given: taken out of wrappers, refused where it cannot be traced, copied with plain weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, remove_spectral_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from common.errors import InputError


def unwrapped(model: nn.Module | torch.export.ExportedProgram) -> nn.Module:
    """The network inside ``torch.compile``, ``DataParallel`` and an exported program; others as they are."""
    if isinstance(model, torch.export.ExportedProgram):
        return model.module()
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return unwrapped(model.module)
    compiled = getattr(model, "_orig_mod", None)
    return unwrapped(compiled) if isinstance(compiled, nn.Module) else model


def refuse_unusable(model: nn.Module, name: str) -> None:
    """Raise InputError where a model is TorchScript, or has weights that nothing has set yet."""
    for path, module in model.named_modules():
        part = f"its module {path}" if path else "it"
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(
                f"network {name} cannot be traced: {part} is TorchScript; pass the nn.Module that it was made from"
            )
        if any(isinstance(weight, nn.UninitializedParameter) for weight in module.parameters(recurse=False)):
            raise InputError(
                f"network {name} cannot be traced: {part} ({type(module).__name__}) has no weights yet; run the model "
                "once, or load its weights"
            )


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy whose weights are plain float32 parameters, also those that the model computes from others.

    Parts that ``torch.compile`` wraps are taken out of it, and frozen batch normalisation becomes PyTorch's own.
    """
    # A weight that a hook computes is no leaf of autograd, which deepcopy refuses.
    computed = [
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    root = copy.deepcopy(model, {id(value): value.detach().clone() for value in computed})
    for path, module in list(root.named_modules()):
        plain = _norm(module) if type(module).__name__ == "FrozenBatchNorm2d" else unwrapped(module)
        if path and plain is not module:
            root.set_submodule(path, plain)
    _bake(root)
    if any(value.is_floating_point() and value.dtype != torch.float32 for value in root.state_dict().values()):
        root.float()
    return root


def _norm(frozen: nn.Module) -> nn.BatchNorm2d:
    """The batch normalisation that torchvision's ``FrozenBatchNorm2d`` (or DETR's, without ``eps``) computes."""
    state = frozen.state_dict()
    norm = nn.BatchNorm2d(len(state["running_mean"]), eps=getattr(frozen, "eps", 1e-5))
    norm.load_state_dict(state, strict=False)  # it counts no batches
    return norm.to(state["running_mean"].device)


def _bake(root: nn.Module) -> None:
    """Make plain parameters of those that are computed (weight normalisation, spectral normalisation, ...)."""
    for module in list(root.modules()):
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, WeightNorm):
                nn.utils.remove_weight_norm(module, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(module, hook.name)
        if parametrize.is_parametrized(module):
            # Removing them changes the class, which copies share with the original.
            kind = type(module)
            module.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
