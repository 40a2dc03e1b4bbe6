"""The JSON Schema of ``report.json``, derived from the dataclasses of :mod:`evaluation.results`.

Those dataclasses are the one definition of the file: it is written from them, read back into them with every type
checked (:func:`common.decode.decode`), and described by this schema, so that the three cannot drift apart.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from typing import Any, Union

_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}


def json_schema(cls: type, identifier: str, title: str) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a dataclass; descriptions come from the ``Attributes:`` of its docstring.

    Args:
        cls: A dataclass whose fields :func:`common.decode.decode` reads.
        identifier: The schema's ``$id``.
        title: The schema's title.
    """
    definitions: dict[str, Any] = {}
    reference = _schema(cls, definitions)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": identifier,
        "title": title,
        **reference,
        "$defs": dict(sorted(definitions.items())),
    }


def _schema(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return {}
    if dataclasses.is_dataclass(kind):
        return _reference(typing.cast(type, kind), definitions)
    if origin in (Union, types.UnionType):
        options = [_schema(argument, definitions) for argument in arguments if argument is not type(None)]
        return {"anyOf": [*options, {"type": "null"}]}
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if origin in (list, tuple):
        return {"type": "array", "items": _schema(arguments[0], definitions)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(arguments[1], definitions)}
    return {"type": _TYPES[kind]}


def _reference(cls: type, definitions: dict[str, Any]) -> dict[str, Any]:
    """A reference to the definition of ``cls``, which is added where it is missing."""
    if cls.__name__ not in definitions:
        definitions[cls.__name__] = {}
        hints = typing.get_type_hints(cls)
        summary, notes = _docstring(cls)
        properties = {}
        for field in dataclasses.fields(cls):
            note = {"description": notes[field.name]} if field.name in notes else {}
            properties[field.name] = {**_schema(hints[field.name], definitions), **note}
        definitions[cls.__name__] = {
            "type": "object",
            "description": summary,
            "properties": properties,
            "required": [field.name for field in dataclasses.fields(cls) if _required(field)],
            "additionalProperties": False,
        }
    return {"$ref": f"#/$defs/{cls.__name__}"}


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _docstring(cls: type) -> tuple[str, dict[str, str]]:
    """First paragraph of a class's docstring, and what its ``Attributes:`` section says of each member."""
    head, _, tail = (inspect.getdoc(cls) or "").partition("Attributes:\n")
    notes: dict[str, str] = {}
    name = ""
    for line in tail.splitlines():
        if line.startswith("    ") and line[4:5].strip() and ": " in line:
            name, _, notes[name] = line.strip().partition(": ")
        elif name and line.strip():
            notes[name] += f" {line.strip()}"
    return " ".join(head.split("\n\n")[0].split()), notes
