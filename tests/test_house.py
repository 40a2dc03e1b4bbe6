"""The house as CONTRIBUTING draws it: who may import whom, the one door to TensorRT, and where names are known."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from calib.algorithms import ALGORITHMS
from tests.conftest import ROOT

DOOR = "engines/tensorrt/support.py"
TENSORRT = {"torch_tensorrt", "tensorrt"}
PACKAGES = ("common", "data", "models", "calib", "engines", "evaluation")
"""In the order in which data flows."""
MAY_IMPORT = {
    "common": {"common", "calib.algorithms", "engines"},
    "data": {"common", "data"},
    "models": {"common", "data", "models"},
    "calib": {"common", "data.base", "data.splits", "calib"},
    "engines": {"common", "data.base", "calib", "engines"},
    "evaluation": {*PACKAGES},
}


@cache
def modules(package: str) -> list[tuple[str, ast.Module]]:
    """(path, what it holds) of a package's files."""
    paths = sorted((ROOT / package).rglob("*.py"))
    return [(path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))) for path in paths]


def everything() -> list[tuple[str, ast.Module]]:
    return [found for package in PACKAGES for found in modules(package)]


def imported(module: ast.Module) -> Iterator[str]:
    """Dotted names of what a file imports, wherever in it: ``calib.plan.plan_int8``, ``onnx``."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def lies_in(name: str, places: set[str]) -> bool:
    """Whether a dotted name is one of the places, or of something within one."""
    return any(f"{name}.".startswith(f"{place}.") for place in places)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_what_it_may_alone(package: str) -> None:
    ours = {*PACKAGES, "benchmarks", "tests", "train", "quantize", "evaluate"}
    allowed = MAY_IMPORT[package]
    wrong = [
        f"{path} imports {name}"
        for path, module in modules(package)
        for name in imported(module)
        if lies_in(name, ours) and not lies_in(name, allowed)
    ]
    assert not wrong


def test_common_knows_the_names_of_engines_alone() -> None:
    from_engines = {name for _, module in modules("common") for name in imported(module) if lies_in(name, {"engines"})}
    assert from_engines == {"engines.ENGINES"}


def test_one_file_imports_tensorrt() -> None:
    found = {path for path, module in everything() if any(lies_in(name, TENSORRT) for name in imported(module))}
    assert found == {DOOR}


def test_nobody_asks_what_kind_of_engine_it_is() -> None:
    classes = {
        node.name
        for _, module in modules("engines")
        for node in ast.walk(module)
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base) in ("Engine", "Compiled") for base in node.bases)
    }
    assert len(classes) > 3
    asked = [
        f"{path}:{node.lineno}"
        for path, module in everything()
        for node in ast.walk(module)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "isinstance"
        and classes & {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)}
    ]
    assert not asked


def test_an_algorithm_is_named_in_its_package_alone() -> None:
    """But for ``legacy``, which is also a member of the JSON table, and the names of options."""
    names = ALGORITHMS.keys() - {"legacy", "percentile"}
    found = [
        f"{path}:{node.lineno}"
        for path, module in everything()
        if not path.startswith("calib/algorithms/")
        for node in ast.walk(module)
        if isinstance(node, ast.Constant) and node.value in names
    ]
    assert not found


def test_the_distribution_has_every_package() -> None:
    folders = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for package in PACKAGES
        for path in (ROOT / package).rglob("__init__.py")
    }
    packages = re.search(r"^packages = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    assert packages is not None
    assert set(re.findall(r'"(.+?)"', packages[1])) == {*folders, "configs"}


def test_contributing_names_files_that_are_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(rf"\b(?:{'|'.join((*PACKAGES, 'tests'))})/[\w/.-]*\w(?:\.py|/)", text))
    gone = {name for name in named if not ((ROOT / name).exists() or (ROOT / "tests" / name).exists())}
    assert len(named) > 30
    assert not gone


def test_the_reference_names_modules_that_are_there() -> None:
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").glob("*.md")]
    named = [Path(ROOT, *name.split(".")) for page in pages for name in re.findall(r"^::: (\S+)$", page, re.M)]
    assert len(named) > 50
    assert not [path for path in named if not (path.with_suffix(".py").is_file() or (path / "__init__.py").is_file())]
