"""What a dotted path in the configuration names."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from common.errors import InputError


def locate(path: str, option: str) -> Callable[..., Any]:
    """Import ``package.module.Name``, ``package.module:Name`` or a name within that; the current folder comes last.

    Args:
        path: Such as ``torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms``.
        option: Of the configuration that holds it, for messages.

    Raises:
        InputError: there is no such module or name, its import fails, or it cannot be called.
    """
    module_name, _, names = path.partition(":")
    parts = names.split(".") if names else []
    if not names:
        *modules, name = path.split(".")
        module_name, parts = ".".join(modules), [name]
    if not module_name or not all(part.isidentifier() for part in (*module_name.split("."), *parts)):
        raise InputError(f"{option} {path!r} is not of the form package.module.Class")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    found, names_left = _module(module_name, parts, path, option, outer=not names)
    for name in names_left:
        try:
            found = getattr(found, name)
        except AttributeError as error:
            where = getattr(found, "__name__", str(found))
            kind = "module " if type(found).__name__ == "module" else ""
            raise InputError(f"{option} {path!r}: {kind}{where!r} has no {name!r}") from error
    if not callable(found):
        raise InputError(f"{option} {path!r} is neither a class nor a function")
    return found  # type: ignore[no-any-return]


def _module(name: str, parts: list[str], path: str, option: str, outer: bool) -> tuple[Any, list[str]]:
    """The module, and the names to look up in it; with ``outer``, the end of ``name`` may be classes."""
    try:
        return import_module(name), parts
    except ModuleNotFoundError as error:
        parent, _, last = name.rpartition(".")
        # Only where the name itself is no module: what a module of that name lacks is its own affair.
        if outer and parent and f"{name}.".startswith(f"{error.name}."):
            return _module(parent, [last, *parts], path, option, outer)
        raise InputError(f"cannot import {option} {path!r}: {error}") from error
    except (Exception, SystemExit) as error:
        raise InputError(f"importing {option} {path!r} failed: {type(error).__name__}: {error}") from error
