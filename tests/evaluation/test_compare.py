"""Gates: which changes from one report to another fail, and how the tool says so."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from common.errors import ExitCode, InputError
from common.files import write_json
from evaluation.__main__ import main
from evaluation.compare import Gates, compare
from evaluation.measures import Row
from evaluation.results import Report


def changed(report: Report, precision: str, change: Callable[[Row], Row]) -> Report:
    rows = [change(row) if row.precision == precision else row for row in report.rows]
    return replace(report, rows=rows)


def less_accurate(points: float) -> Callable[[Row], Row]:
    def change(row: Row) -> Row:
        assert row.accuracy is not None
        return replace(row, accuracy=replace(row.accuracy, top1=row.accuracy.top1 - points))

    return change


def slower(factor: float) -> Callable[[Row], Row]:
    def change(row: Row) -> Row:
        entries = [
            replace(entry, compute=replace(entry.compute, median=entry.compute.median * factor))
            for entry in row.latency
        ]
        return replace(row, latency=entries)

    return change


def test_a_report_against_itself_passes(report: Report) -> None:
    comparison = compare(report, report, Gates(0, 0, 0))

    assert comparison.passed
    assert not comparison.notes
    assert {change.change for change in comparison.changes} == {0}


@pytest.mark.parametrize(("points", "passed"), [(0.05, True), (0.1, True), (0.11, False), (-3, True)])
def test_accuracy_is_gated(report: Report, points: float, passed: bool) -> None:
    comparison = compare(report, changed(report, "int8", less_accurate(points)), Gates(accuracy=0.1))

    assert comparison.passed is passed
    worse = [change.figure for change in comparison.changes if change.regressed]
    assert worse == ([] if passed else ["INT8 top-1, %"])


@pytest.mark.parametrize(("factor", "passed"), [(1.05, True), (1.2, False), (0.1, True)])
def test_latency_is_gated_where_it_means_something(report: Report, factor: float, passed: bool) -> None:
    limits = Gates(latency=10)

    assert compare(report, changed(report, "fp32", slower(factor)), limits).passed is passed
    # FP16 and INT8 are not representative on the eager engine.
    assert compare(report, changed(report, "int8", slower(factor)), limits).passed


def test_limits_can_be_left_out(report: Report) -> None:
    worse = changed(changed(report, "fp32", slower(9)), "int8", less_accurate(50))

    assert not compare(report, worse, Gates()).passed
    assert compare(report, worse, Gates(None, None, None)).passed


def test_size_is_gated_when_asked(report: Report) -> None:
    larger = changed(report, "int8", lambda row: replace(row, size=2 * (row.size or 1)))

    assert compare(report, larger, Gates()).passed
    assert not compare(report, larger, Gates(size=5)).passed


def test_what_no_longer_runs_fails(report: Report) -> None:
    without = changed(report, "int8", lambda row: Row("int8", row.engine, "compared", skipped="no table"))
    fewer = changed(report, "fp32", lambda row: replace(row, latency=row.latency[:1]))

    assert compare(report, without, Gates()).problems == ["INT8 ran before and did not now: no table"]
    assert compare(report, fewer, Gates()).problems == ["FP32 was timed at batch 8 before and is not now"]
    assert compare(without, report, Gates()).passed


def test_other_images_do_not_compare(report: Report) -> None:
    other = replace(report, data=replace(report.data, fingerprint="0" * 64))
    part = replace(report, data=replace(report.data, start=1))

    with pytest.raises(InputError, match="different images"):
        compare(report, other, Gates())
    with pytest.raises(InputError, match="different parts"):
        compare(report, part, Gates())


def test_a_change_of_the_machine_is_noted(report: Report) -> None:
    machine = replace(report.environment, processor="Other", versions={**report.environment.versions, "torch": "9.9"})

    notes = compare(report, replace(report, environment=machine), Gates()).notes

    assert f"processor changed from {report.environment.processor} to Other" in notes
    assert any(note.startswith("torch changed from") for note in notes)


@pytest.fixture
def runs(report: Report, tmp_path: Path) -> Path:
    """Two runs, of which the second lost accuracy."""
    write_json(tmp_path / "before" / "report.json", asdict(report))
    write_json(tmp_path / "after" / "report.json", asdict(changed(report, "int8", less_accurate(2))))
    return tmp_path


def test_the_tool_takes_names_folders_and_files(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("before", str(runs / "before"), str(runs / "before" / "report.json")):
        assert main(["compare", name, name, "--artifacts", str(runs)]) == ExitCode.PASSED
    assert capsys.readouterr().out.count("PASSED") == 3


def test_the_tool_fails_with_exit_code_1(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compare", str(runs / "before"), str(runs / "after")]

    assert main(arguments) == ExitCode.FAILED
    assert "FAILED: INT8 top-1, %" in capsys.readouterr().out
    assert main([*arguments, "--max-accuracy-loss", "2.5"]) == ExitCode.PASSED
    assert main([*arguments, "--max-accuracy-loss", "none"]) == ExitCode.PASSED


def test_the_tool_prints_json(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(runs / "before"), str(runs / "after"), "--json"]) == ExitCode.FAILED

    value = json.loads(capsys.readouterr().out)
    assert value["passed"] is False
    assert [change["figure"] for change in value["changes"] if change["regressed"]] == ["INT8 top-1, %"]


@pytest.mark.parametrize("name", ["missing", "../escape", "a b"])
def test_a_report_that_is_not_there(runs: Path, name: str) -> None:
    with pytest.raises(InputError, match="there is no report"):
        main(["compare", name, str(runs / "after"), "--artifacts", str(runs)])


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "much"])
def test_a_limit_that_is_none(runs: Path, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["compare", "a", "b", "--max-latency-increase", value])

    assert stop.value.code == ExitCode.BAD_INPUT
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_pages_are_rendered_again(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["render", str(runs / "before")]) == ExitCode.PASSED

    assert (runs / "before" / "report.html").read_text().startswith("<!doctype html>")
    assert (runs / "before" / "figures" / "latency.svg").exists()
    assert capsys.readouterr().out.splitlines() == [
        str(runs / "before" / name) for name in ("report.html", "report.md")
    ]
