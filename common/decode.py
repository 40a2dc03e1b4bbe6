"""Strict reading of dataclasses from JSON values that came from elsewhere."""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
import types
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from common.errors import InputError

T = TypeVar("T")


def encode(value: Any) -> str:
    """A dataclass as JSON text that :func:`decode` reads back; paths become strings, tuples lists."""
    return json.dumps(value, default=_encoded, allow_nan=False)


def _encoded(value: Any) -> Any:
    is_record = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return dataclasses.asdict(value) if is_record else str(value)


def plain(value: Any) -> Any:
    """What :func:`encode` writes, as ``json.loads`` gives it back."""
    return json.loads(encode(value))


def decode(cls: type[T], value: Any, where: str) -> T:
    """Build the dataclass ``cls`` from a JSON value, checking every field against its annotation.

    Args:
        cls: A dataclass whose fields are JSON scalars, ``Path``, ``Literal``, optionals, unions of plain types, tuples,
            lists, dictionaries with string keys, ``Any`` or further dataclasses.
        value: What ``json.loads`` gave.
        where: Names the source in messages, such as a file.

    Raises:
        InputError: a field is missing, unknown or of another type; the message names it.
    """
    result: T = _decode(cls, value, where)
    return result


def _decode(kind: Any, value: Any, where: str) -> Any:
    if kind is Any:
        return value
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        kinds = [argument for argument in arguments if argument is not type(None)]
        for kind in kinds[:-1]:
            if isinstance(value, kind):
                return value
        return _decode(kinds[-1], value, where)
    if origin is Literal:
        if value not in arguments:
            raise InputError(f"{where} is {_shown(value)}, not one of {', '.join(map(repr, arguments))}")
        return value
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, where)
    if origin in (tuple, list):
        _expect(isinstance(value, list), where, "a list", value)
        return origin(_decode(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is dict:
        _expect(isinstance(value, dict), where, "an object", value)
        return {key: _decode(arguments[1], item, f"{where}.{key:.60}") for key, item in value.items()}
    if kind is Path:
        _expect(isinstance(value, str), where, "a path", value)
        return Path(value)
    if kind is float:
        _expect(isinstance(value, (int, float)) and not isinstance(value, bool), where, "a number", value)
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        _expect(math.isfinite(number), where, "a finite number", value)
        return number
    _expect(isinstance(value, kind) and (kind is bool or not isinstance(value, bool)), where, kind.__name__, value)
    return value


def _decode_dataclass(cls: Any, value: Any, where: str) -> Any:
    _expect(isinstance(value, dict), where, "an object", value)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = get_type_hints(cls)
    if unknown := sorted(value.keys() - fields.keys()):
        raise InputError(f"{where} has an unknown field {_shown(unknown[0])}")
    for name, field in fields.items():
        if name not in value and field.default is field.default_factory is dataclasses.MISSING:
            raise InputError(f"{where} lacks the field {name!r}")
    return cls(**{name: _decode(hints[name], item, f"{where}.{name}") for name, item in value.items()})


def _expect(condition: bool, where: str, kind: str, value: Any) -> None:
    if not condition:
        raise InputError(f"{where} is {_shown(value)}, not {kind}")


def _shown(value: Any) -> str:
    """The start of a value, however large or deep it is."""
    return reprlib.repr(value)[:60]
