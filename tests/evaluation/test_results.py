"""The verdict, the format of report.json and its schema."""

import copy
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import InputError
from common.files import write_json
from evaluation.measures import Accuracy, Interval, Paired, Row
from evaluation.results import Report, read_report
from evaluation.schema import json_schema
from evaluation.verdict import Limits, judge


def row(
    precision: str, lost: int = 0, lost5: int = 0, images: int = 1000, non_finite: int = 0, agreement: float = 100
) -> Row:
    """A row that got ``lost`` images wrong that FP32 got right."""
    accuracy = Accuracy(
        images=images,
        correct_top1=images - lost,
        correct_top5=images - lost5,
        top1=100 * (images - lost) / images,
        top5=100 * (images - lost5) / images,
        top1_interval=Interval(0, 100),
        agreement=agreement,
        sqnr_db=None,
        non_finite=non_finite,
        calibration_error=0,
        per_class=[],
        mistakes=[],
    )
    paired = Paired(lost, 0, -100 * lost / images, Interval(-1, 1), -100 * lost5 / images, 1, 1)
    reference = precision == "fp32"
    return Row(
        precision,  # type: ignore[arg-type]
        "torch",
        "reference" if reference else "compared",
        accuracy=accuracy,
        paired=None if reference else paired,
    )


def skipped(precision: str, reason: str = "no such hardware") -> Row:
    return Row(precision, "torch", "compared", skipped=reason)  # type: ignore[arg-type]


BOTH = "FP16 and INT8 each lose at most 1 point and agree with FP32 on at least 90 % of the images"
INT8 = "INT8 loses at most 1 point and agrees with FP32 on at least 90 % of the images"
LOST = "FP16 top-1 is -1.10 points from FP32: outside 1"
LOST5 = "INT8 top-5 is -1.10 points from FP32: outside 1"
ANOTHER = "INT8 predicts the same class as FP32 for 67.00 % of the images: less than 90 %"


@pytest.mark.parametrize(
    ("rows", "passed", "summary", "reason"),
    [
        ([row("fp32"), row("fp16"), row("int8", lost=3)], True, BOTH, "INT8 top-1 is -0.30 points from FP32: within 1"),
        ([row("fp32"), skipped("fp16"), row("int8")], True, INT8, "FP16 did not run: no such hardware"),
        ([row("fp32"), row("fp16", lost=11), row("int8")], False, LOST, LOST),
        ([row("fp32"), row("fp16"), row("int8", lost5=11)], False, LOST5, LOST5),
        ([row("fp32"), row("fp16"), skipped("int8", "no table")], False, "INT8 did not run: no table", ""),
        ([row("fp32"), row("fp16")], False, "INT8 did not run", ""),
        (
            # Hardly trained: right more often than FP32, because it is another network.
            [row("fp32", lost=700), row("int8", lost=-330, agreement=67)],
            *(False, ANOTHER, "INT8 top-1 is +33.00 points from FP32: no loss"),
        ),
    ],
)
def test_the_verdict_and_its_reasons(rows: list[Row], passed: bool, summary: str, reason: str) -> None:
    verdict = judge(rows, Limits(1.0, 90))

    assert (verdict.passed, verdict.word, verdict.summary) == (passed, "PASSED" if passed else "FAILED", summary)
    assert reason in ["", *verdict.reasons]


@given(st.integers(1, 200), st.integers(1, 100_000))
def test_a_loss_of_exactly_the_tolerance_passes_and_one_image_more_fails(lost: int, images: int) -> None:
    images = max(images, lost + 1)
    tolerance = 100 * lost / images

    assert judge([row("fp32"), row("int8", lost=lost, images=images)], Limits(tolerance, 90)).passed
    assert not judge([row("fp32"), row("int8", lost=lost + 1, images=images)], Limits(tolerance, 90)).passed


def test_a_gain_passes_a_tolerance_of_zero_and_a_baseline_is_not_judged() -> None:
    baseline = replace(row("fp16", lost=500), role="baseline")

    assert judge([row("fp32", lost=5), row("int8", lost=-5), baseline], Limits(0.0, 90)).passed


@pytest.mark.parametrize(("agreement", "passed"), [(90, True), (89.99, False), (100, True)])
def test_the_least_agreement_itself_passes(agreement: float, passed: bool) -> None:
    assert judge([row("fp32"), row("int8", agreement=agreement)], Limits(1.0, 90)).passed is passed
    assert judge([row("fp32"), row("fp16", agreement=agreement), row("int8")], Limits(1.0, 90)).passed is passed


def test_outputs_that_are_not_finite_are_named() -> None:
    rows = [row("fp32"), row("int8")]
    broken = row("int8", lost=2, non_finite=2)

    assert len(judge(rows, Limits(1, 90)).reasons) == 3
    assert "INT8 gave NaN or infinity for 2 images, counted as wrong" in judge([*rows, broken], Limits(1, 90)).reasons


def test_a_report_reads_back_as_it_was_written(report: Report, tmp_path: Path) -> None:
    write_json(tmp_path / "report.json", asdict(report))

    assert read_report(tmp_path / "report.json") == report


def mutations(value: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Reports that are not reports, each for one reason."""
    made = {
        name: copy.deepcopy(value) for name in ("version", "missing", "type", "unknown", "nested", "literal", "bool")
    }
    made["version"]["version"] = 999
    del made["missing"]["verdict"]
    made["type"]["rows"] = "none"
    made["unknown"]["surprise"] = 1
    made["nested"]["rows"][0]["accuracy"]["top1"] = "99"
    made["literal"]["rows"][0]["precision"] = "int4"
    made["bool"]["seed"] = True
    return made


@pytest.mark.parametrize("name", ["version", "missing", "type", "unknown", "nested", "literal", "bool"])
def test_what_is_not_a_report_is_refused_in_one_line(report: Report, tmp_path: Path, name: str) -> None:
    path = tmp_path / "report.json"
    write_json(path, mutations(asdict(report))[name])

    with pytest.raises(InputError) as error:
        read_report(path)

    assert "\n" not in str(error.value)
    assert "report.json" in str(error.value)


def test_the_schema_describes_the_report(report: Report) -> None:
    schema = json_schema(Report, "urn:test", "Report")
    validator = jsonschema.Draft202012Validator
    validator.check_schema(schema)

    value = json.loads(json.dumps(asdict(report)))
    assert list(validator(schema).iter_errors(value)) == []
    for name, broken in mutations(value).items():
        if name != "version":
            assert list(validator(schema).iter_errors(broken)), name


def test_every_member_is_documented() -> None:
    # A dataclass whose summary says it all needs no list.
    complete = {"Interval", "ClassAccuracy", "Mistake"}
    for name, definition in json_schema(Report, "urn:test", "Report")["$defs"].items():
        assert definition["description"], name
        for member, value in definition["properties"].items():
            assert name in complete or "description" in value, f"{name}.{member}"


def test_reading_reports_imports_no_torch(root: Path) -> None:
    program = "import sys, evaluation.__main__; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", program], cwd=root, check=False).returncode == 0


def test_the_published_schema_is_current(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from evaluation.__main__ import main

    assert main(["schema"]) == 0

    published = (root / "docs" / "report.schema.json").read_text(encoding="utf-8")
    assert capsys.readouterr().out == published, "python -m evaluation schema > docs/report.schema.json"
