"""The pages made of a report: complete, escaped, self-contained, equal to the figures."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.charts import all_charts, log_ticks, ticks
from evaluation.findings import findings
from evaluation.measures import ClassAccuracy
from evaluation.report import _markdown, render_html, render_markdown, write_report
from evaluation.results import VERSION, ChangedImage, Report
from evaluation.verdict import Limits, judge

SECTIONS = (
    "verdict",
    "results",
    "accuracy-latency",
    "layers",
    "tensors",
    "changed",
    "classes",
    "latency",
    "statistics",
    "calibration",
    "environment",
)
HOSTILE = "<script>alert('x')</script>\"'&`|*[a](javascript:x)"
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that elements nest, and collects what a test asks for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def attributes(self, name: str) -> Iterator[tuple[str, str]]:
        for tag, attributes in self.elements:
            if attributes.get(name) is not None:
                yield tag, str(attributes[name])


def at(value: Any, path: str) -> Any:
    """The value at a path such as ``rows[2].accuracy.top1``."""
    for name, index in re.findall(r"(\w+)|\[(\d+)\]", path):
        value = value[name] if name else value[int(index)]
    return value


@pytest.fixture(scope="module")
def page(report: Report) -> str:
    return render_html(report)


def test_all_sections_are_there(page: str) -> None:
    identifiers = {value for _, value in Page(page).attributes("id")}

    assert set(SECTIONS) <= identifiers


def test_figures_are_those_of_the_json(page: str, report: Report) -> None:
    value = json.loads(json.dumps(asdict(report)))
    figures = [
        (str(attributes["data-figure"]), str(attributes["data-value"]))
        for _, attributes in Page(page).elements
        if "data-figure" in attributes
    ]

    assert len(figures) > 100
    for path, shown in figures:
        expected = at(value, path)
        assert (None if shown == "" else json.loads(shown)) == expected, path


def test_nothing_is_loaded(page: str) -> None:
    parsed = Page(page)

    for name in ("src", "href", "action", "data", "poster", "srcset"):
        for tag, value in parsed.attributes(name):
            assert value.startswith(("#", "data:image/png;base64,")), (tag, value)
    assert "@import" not in page
    assert not re.search(r"url\(", page)
    assert not [attributes for _, attributes in parsed.elements if any(name.startswith("on") for name in attributes)]
    assert not list(parsed.attributes("style"))


def test_the_policy_allows_exactly_what_is_in_the_page(page: str) -> None:
    policy = next(value for _, value in Page(page).attributes("content") if "default-src" in value)
    assert "default-src 'none'" in policy
    for element in ("style", "script"):
        (content,) = re.findall(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{element}-src 'sha256-{digest}'" in policy


def test_tables_and_charts_are_readable_by_a_screen_reader(page: str) -> None:
    parsed = Page(page)

    assert all(attributes.get("scope") for tag, attributes in parsed.elements if tag == "th")
    charts = [attributes for tag, attributes in parsed.elements if tag == "svg"]
    assert charts
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in charts)
    assert all(attributes["alt"] for tag, attributes in parsed.elements if tag == "img")
    assert next(attributes["lang"] for tag, attributes in parsed.elements if tag == "html") == "en"


def hostile(report: Report) -> Report:
    """The report with every free text replaced by one that tries to be more than text."""
    rows = [
        replace(row, details={HOSTILE: HOSTILE}, latency_note=row.latency_note and HOSTILE, device=HOSTILE)
        for row in report.rows
    ]
    tensors = [replace(tensor, name=f"{HOSTILE}{index}") for index, tensor in enumerate(report.tensors)]
    assert report.analysis is not None
    assert report.calibration is not None
    layers = [replace(layer, layer=HOSTILE) for layer in report.analysis.layers]
    image = ChangedImage(1, 0, "int8", "lost", 0, 0.5, -1, 0.0, "data:image/png;base64,")
    return replace(
        report,
        run=HOSTILE,
        notes=[HOSTILE],
        engine=HOSTILE,
        engine_reason=HOSTILE,
        rows=rows,
        tensors=tensors,
        changed=[image],
        changed_total={"int8": 1},
        model=replace(report.model, name=HOSTILE, class_path=HOSTILE, unsupported={HOSTILE: HOSTILE}),
        data=replace(report.data, title=HOSTILE, name=HOSTILE, classes=[HOSTILE] * len(report.data.classes)),
        analysis=replace(report.analysis, layers=layers, advice=HOSTILE),
        calibration=replace(report.calibration, source={"maker": HOSTILE}, scales={HOSTILE: 1.0}),
        environment=replace(report.environment, processor=HOSTILE, gpu=HOSTILE, versions={HOSTILE: HOSTILE}),
        config={HOSTILE: HOSTILE, "evaluation": {"analysis": True}},
    )


def test_names_cannot_become_markup(report: Report) -> None:
    page = render_html(hostile(report))

    parsed = Page(page)
    assert [tag for tag, _ in parsed.elements].count("script") == 1
    assert "alert(" in page
    assert "<script>alert" not in page
    assert not [name for _, attributes in parsed.elements for name in attributes if name.startswith("on")]


def test_names_cannot_become_markdown(report: Report) -> None:
    text = render_markdown(hostile(report))

    assert "<script" not in text
    assert not re.search(r"(?<!\\)\]\(javascript", text)
    widths = {
        line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("| <") or "| &lt;" in line
    }
    assert widths <= {9, 10}


@given(st.text())
def test_markdown_escaping_leaves_one_line_without_tags(text: str) -> None:
    escaped = _markdown(text)

    assert "\n" not in escaped
    assert "<" not in escaped
    assert not re.search(r"(?<!\\)(\\\\)*[|*`\[]", escaped)


def test_figures_are_files_of_their_own(report: Report, tmp_path: Path) -> None:
    paths = write_report(report, tmp_path)

    assert [path.name for path in paths] == ["report.html", "report.md", "report.json"]
    figures = sorted((tmp_path / "figures").iterdir())
    assert len(figures) == len(all_charts(report)) == 4 + len(report.tensors)
    for figure in figures:
        root = ET.parse(figure).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert root.find("{http://www.w3.org/2000/svg}title") is not None
    markdown = (tmp_path / "report.md").read_text()
    for target in re.findall(r"\]\(([^)]+)\)", markdown):
        assert (tmp_path / target).exists()
    assert json.loads((tmp_path / "report.json").read_text())["version"] == VERSION


def test_markdown_tables_have_a_blank_line_before_and_equal_widths(report: Report) -> None:
    lines = render_markdown(report).splitlines()

    heads = [index for index, line in enumerate(lines) if re.match(r"\|[:\-|]+$", line)]
    assert len(heads) == 5
    for index in heads:
        assert lines[index - 2] == ""
        width = lines[index].count("|")
        body = lines[index - 1 : index]
        while lines[index + 1].startswith("|"):
            index += 1
            body.append(lines[index])
        assert {line.replace("\\|", "").count("|") for line in body} == {width}


def test_a_report_with_little_in_it(report: Report) -> None:
    rows = [
        report.rows[0],
        *(replace(row, skipped="x", accuracy=None, paired=None, latency=[]) for row in report.rows[1:]),
    ]
    rows = [replace(row, latency=[]) for row in rows]
    bare = replace(
        report,
        rows=rows,
        verdict=judge(rows, Limits(1.0, 90.0)),
        analysis=None,
        calibration=None,
        macs=None,
        tensors=[],
        changed=[],
        changed_total={},
        notes=[],
    )

    page = render_html(bare)

    Page(page)
    assert "FAILED" in page
    assert "skipped: x" in page
    assert "Latency was not measured" in page
    assert "# LeNet: FAILED" in render_markdown(bare)
    assert findings(bare) == ["INT8 was skipped: x.", "FP16 was skipped: x."]


def test_many_classes_are_shortened(report: Report) -> None:
    count = 200
    rows = []
    for row in report.rows:
        assert row.accuracy is not None
        per_class = [ClassAccuracy(10, 10 - (index == 150 and row.precision == "int8")) for index in range(count)]
        rows.append(replace(row, accuracy=replace(row.accuracy, per_class=per_class, mistakes=[])))
    large = replace(report, rows=rows, data=replace(report.data, classes=[f"class {index}" for index in range(count)]))

    page = render_html(large)

    assert "the 40 classes that differ most" in page
    assert "class 150" in page
    assert 'class="matrix"' not in page


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(98.83, 99.21, 4) == [98.9, 99.0, 99.1, 99.2]
    assert ticks(3, 3) == [3]
    assert log_ticks(0.3, 30) == [0.5, 1, 2, 5, 10, 20]
    assert log_ticks(1e-6, 1e3)[0] == pytest.approx(1e-6)


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_of_any_range(low: float, span: float) -> None:
    found = ticks(low, low + span)

    assert len(found) <= 12
    margin = 1e-6 * (abs(low) + span)
    assert all(low - margin <= tick <= low + span + margin for tick in found)
