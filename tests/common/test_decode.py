import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from common.decode import decode, encode
from common.errors import InputError


@dataclass(frozen=True)
class Inner:
    size: int
    scale: float = 1.0


@dataclass(frozen=True)
class Outer:
    name: str
    kind: Literal["a", "b"]
    inner: Inner
    flag: bool = False
    path: Path | None = None
    pair: tuple[int, ...] = ()
    names: list[str] = field(default_factory=list)
    table: dict[str, float] = field(default_factory=dict)
    anything: Any = None


VALUE = {"name": "x", "kind": "a", "inner": {"size": 3}}


def test_round_trip():
    outer = Outer("x", "b", Inner(1, 0.5), True, Path("a/b"), (1, 2), ["y"], {"z": 1.5}, [1, None])
    assert decode(Outer, json.loads(encode(outer)), "here") == outer
    assert decode(Outer, VALUE, "here") == Outer("x", "a", Inner(3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 1}, "here.name is 1, not str"),
        ({"kind": "c"}, "here.kind is 'c', not one of 'a', 'b'"),
        ({"inner": []}, r"here.inner is \[\], not an object"),
        ({"inner": {}}, "here.inner lacks the field 'size'"),
        ({"inner": {"size": True}}, "here.inner.size is True, not int"),
        ({"inner": {"size": 1.0}}, "here.inner.size is 1.0, not int"),
        ({"inner": {"size": 1, "scale": True}}, "here.inner.scale is True, not a number"),
        ({"inner": {"size": 1, "more": 2}}, "here.inner has an unknown field 'more'"),
        ({"flag": 1}, "here.flag is 1, not bool"),
        ({"path": 1}, "here.path is 1, not a path"),
        ({"pair": [1, "x"]}, r"here.pair\[1\] is 'x', not int"),
        ({"names": "x"}, "here.names is 'x', not a list"),
        ({"table": {"z": None}}, "here.table.z is None, not a number"),
        ({"table": 3}, "here.table is 3, not an object"),
    ],
)
def test_wrong_values_are_named(change, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        decode(Outer, {**VALUE, **change}, "here")
