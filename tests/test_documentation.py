"""What the documentation tells users to type is accepted, and what it links to exists."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")


def documented_commands() -> list[str]:
    """Every line of a code block that runs one of the three commands, once, without its comment."""
    found: dict[str, None] = {}
    for page in PAGES:
        for _, block in BLOCK.findall(page.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                match = re.search(r"\b(?:python|torchrun .*) ((?:train|quantize|evaluate)\.py.*)", line.strip())
                if match:
                    words = shlex.split(match[1], comments=True)
                    if "..." not in words:
                        found[shlex.join(words)] = None
    return list(found)


@pytest.mark.parametrize("line", documented_commands())
def test_command_lines_of_the_documentation_parse(
    line: str, command: Callable[..., CompletedProcess[str]], tmp_path: Path
) -> None:
    page = (ROOT / "docs/howto/own-network.md").read_text(encoding="utf-8")
    (tmp_path / "parts.yaml").write_text(next(text for kind, text in BLOCK.findall(page) if kind == "yaml"))
    (tmp_path / "configs").symlink_to(ROOT / "configs")

    command(*shlex.split(line), "--print_config", cwd=tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        file = page.parent / target if target else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in slugs, f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_are_whole_and_nothing_is_left_to_fill_in(page: Path) -> None:
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    columns = 0
    for line in text.splitlines():
        if not line.startswith("|"):
            columns = 0
            assert not re.fullmatch(r"[A-Z]{3,}", line), line
            continue
        assert line.endswith("|"), line
        cells = len(re.findall(r"(?<!\\)\|", line)) - 1
        columns = columns or cells
        assert cells == columns, line


def test_the_newer_torch_tensorrt_is_the_one_that_int8_builds_on() -> None:
    from engines.tensorrt.support import FIRST_STRONGLY_TYPED

    first = ".".join(map(str, FIRST_STRONGLY_TYPED))
    assert f'tensorrt-latest = ["torch-tensorrt>={first}"]' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_pins_lie_within_the_declared_bounds() -> None:
    """constraints.txt is the tested set of what pyproject.toml declares."""
    from importlib.metadata import requires

    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    try:
        declared = [Requirement(line) for line in requires("int8-workflow") or []]
    except ModuleNotFoundError:
        pytest.skip("the project is not installed: run make test")

    for requirement in declared:
        if requirement.marker and requirement.marker.evaluate({"extra": "tensorrt-latest"}):
            continue
        versions = [next(iter(pin.specifier)).version for pin in pins if pin.name.lower() == requirement.name.lower()]
        assert versions, f"{requirement.name} has no pin"
        assert all(requirement.specifier.contains(version) for version in versions), str(requirement)
