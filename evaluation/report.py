"""``report.json`` and what is made of it: ``report.html`` (one file, offline), ``report.md`` and the figures."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import re
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from common.files import write_json, write_text
from evaluation import charts, text
from evaluation.findings import farthest, findings
from evaluation.measures import TITLES, Latency, Row
from evaluation.results import Report
from evaluation.tensorboard import log_report

logger = logging.getLogger(__name__)

TEMPLATES = Path(__file__).parent / "templates"
MOST_HISTOGRAMS = 64
"""Drawn in the page; a large network has hundreds of tensors."""
MOST_CLASSES = 40
MATRIX_CLASSES = 20
"""With more classes the most frequent mistakes are listed instead of the confusion matrix."""


def write_all(report: Report, folder: Path) -> None:
    """Write the report's files and its figures for TensorBoard into ``folder``.

    Raises:
        InputError: the folder cannot be written.
    """
    for path in write_report(report, folder):
        logger.info("wrote %s", path)
    log_report(report, folder / "logs" / "evaluation")


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write ``report.html``, ``report.md``, ``figures/*.svg`` and ``report.json`` into ``folder``, each atomically.

    Returns:
        The three report files.

    Raises:
        InputError: the folder cannot be written.
    """
    pages = write_pages(report, folder)
    # Last, so that whoever finds new figures in the JSON finds them in the other files too.
    write_json(folder / "report.json", asdict(report))
    return [*pages, folder / "report.json"]


def write_pages(report: Report, folder: Path) -> list[Path]:
    """What is made of ``report.json``: write ``report.html``, ``report.md`` and ``figures/*.svg``.

    Returns:
        The two pages.

    Raises:
        InputError: the folder cannot be written.
    """
    for chart in charts.all_charts(report):
        write_text(folder / "figures" / f"{chart.name}.svg", chart.document)
    pages = [folder / "report.html", folder / "report.md"]
    write_text(pages[0], render_html(report))
    write_text(pages[1], render_markdown(report))
    return pages


def render_html(report: Report) -> str:
    """The report as one page that loads nothing; every text is escaped."""
    css = Markup(_asset("report.css") + charts.CHART_STYLE)  # noqa: S704 - shipped with the package
    script = Markup(_asset("report.js"))  # noqa: S704 - shipped with the package
    # The policy lets exactly this style and this script run: nothing that a name could smuggle in, and no network.
    policy = f"default-src 'none'; img-src data:; style-src {_digest(css)}; script-src {_digest(script)}"
    return (
        _environment(html=True)
        .get_template("report.html.j2")
        .render(
            **_context(report),
            css=css,
            script=script,
            policy=Markup(policy),  # noqa: S704 - two digests
        )
    )


def render_markdown(report: Report) -> str:
    """The report as Markdown with tables, for a code host."""
    rendered = _environment(html=False).get_template("report.md.j2").render(**_context(report))
    return re.sub(r"\n{3,}", "\n\n", rendered)


def _digest(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


@cache
def _asset(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


@cache
def _environment(html: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=html,  # noqa: S701 - Markdown has its own escaping, the filter md
        undefined=jinja2.StrictUndefined,
        trim_blocks=not html,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        decibel=text.decibel,
        figure=_figure,
        latency_at=_latency_at,
        md=_markdown,
        milliseconds=text.milliseconds,
        p_value=text.p_value,
        percent=text.percent,
        points=text.points,
        rate=text.rate,
        farthest=lambda row: row.outputs.index(farthest(row.outputs)),
        short=text.short,
        similarity=text.similarity,
        size=text.size,
    )
    return environment


def _context(report: Report) -> dict[str, Any]:
    """What both templates need besides the report."""
    judged = [row for row in report.rows if row.accuracy is not None]
    compared = [row for row in report.rows if row.outputs]
    sizes = sorted({entry.batch_size for row in report.rows for entry in row.latency})
    named = {
        "accuracy_latency": charts.accuracy_against_latency(report),
        "latency": charts.latency_bars(report),
        "layer_noise": charts.layer_noise(report),
        "tensor_noise": charts.tensor_noise(report.tensors),
        "histograms": [
            charts.tensor_histogram(tensor, number) for number, tensor in enumerate(report.tensors[:MOST_HISTOGRAMS])
        ],
    }
    return {
        "report": report,
        "titles": TITLES,
        "charts": named,
        "findings": findings(report),
        "batches": sizes if len(sizes) <= 2 else [sizes[0], sizes[-1]],
        "faster": any(entry.speedup is not None for row in report.rows for entry in row.latency),
        "graphs": any(entry.without_graph is not None for row in report.rows for entry in row.latency),
        "tf32": next((row.details["TF32"] for row in report.rows if "TF32" in row.details), None),
        "copies": any(entry.end_to_end is not None for row in report.rows for entry in row.latency),
        "device": next((row.device for row in report.rows if row.device), ""),
        "classifies": report.model.task == "classify",
        "compared": compared,
        "regression": report.model.task == "regress",
        "several": any(len(row.outputs) > 1 for row in compared),
        "targets": any(row.targets is not None for row in report.rows),
        "judged": judged,
        "class_rows": _class_rows(report, judged),
        "matrices": {row.precision: _matrix(row) for row in judged},
        "config": "\n".join(_flat(report.config)),
    }


def _flat(value: Any, path: str = "") -> list[str]:
    """A configuration as lines, ``section.option: value``."""
    if isinstance(value, dict) and value:
        return [line for key, item in value.items() for line in _flat(item, f"{path}.{key}" if path else str(key))]
    return [f"{path}: {json.dumps(value)}"]


def _class_rows(report: Report, judged: list[Row]) -> list[dict[str, Any]]:
    """Accuracy of each class in each precision; with many classes, those that differ most."""
    rows: list[dict[str, Any]] = []
    for label, name in enumerate(report.data.classes if judged else ()):
        entries = [row.accuracy.per_class[label] for row in judged if row.accuracy is not None]
        shares = [100 * entry.correct / entry.images if entry.images else None for entry in entries]
        points = [share - shares[0] if share is not None and shares[0] is not None else 0.0 for share in shares[1:]]
        rows.append({"name": name, "images": entries[0].images, "shares": shares, "points": points})
    if len(rows) > MOST_CLASSES:
        rows.sort(key=lambda row: -max((abs(value) for value in row["points"]), default=0.0))
    return rows[:MOST_CLASSES]


def _matrix(row: Row) -> list[list[tuple[int, str]]]:
    """The confusion matrix with a class of colour for each cell; empty for many classes."""
    assert row.accuracy is not None  # the caller chose those that have it
    size = len(row.accuracy.per_class)
    if size > MATRIX_CLASSES:
        return []
    worst = max((mistake.count for mistake in row.accuracy.mistakes), default=1)
    cells: list[list[tuple[int, str]]] = [[(0, "")] * size for _ in range(size)]
    for label, entry in enumerate(row.accuracy.per_class):
        cells[label][label] = (entry.correct, "diagonal")
    for mistake in row.accuracy.mistakes:
        cells[mistake.label][mistake.predicted] = (mistake.count, f"h{1 + 3 * mistake.count // worst}")
    return cells


def _latency_at(row: Row, batch_size: int) -> tuple[int, Latency] | None:
    """The entry for a batch size, with its position."""
    return next(((i, entry) for i, entry in enumerate(row.latency) if entry.batch_size == batch_size), None)


def _figure(value: float | None) -> str:
    """A figure in full, as in the JSON."""
    return "" if value is None else json.dumps(value)


def _markdown(value: object) -> str:
    """Text in Markdown, in a table cell too: what has a meaning there is escaped."""
    line = " ".join(str(value).split())
    line = re.sub(r"([\\`*_\[\]|#~])", r"\\\1", line)
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
