import dataclasses
import json

import pytest

from benchmarks.command import BENCHMARKS, ELSEWHERE, add
from benchmarks.page import markdown, number
from benchmarks.results import (
    FORMAT,
    Benchmark,
    Entry,
    Findings,
    Results,
    Table,
    Target,
    read_results,
)
from benchmarks.timing import spread
from common.errors import InputError
from evaluation.results import Environment

HERE = Environment("A CPU", ["avx512_vnni"], 2, 2, 2**34, "Linux", {"python": "3.11", "torch": "2.8.0"})


def target(figure: float | None, kind="at most", note="") -> Target:
    return Target("something", kind, 0.5, "s", figure, note)


def benchmark(name="calibration", *targets: Target) -> Benchmark:
    entries = [
        Entry("ours", spread([0.1, 0.2, 0.3]), 1.0, {"top-1, %": 98.123, "kernels": "2 QGemm | more"}),
        Entry("theirs", spread([1.0, 2.0]), 0.1, {"top-1, %": 98}),
        Entry("nothing"),
    ]
    tables = [
        Table("side by side", "s", entries, "ours", ["A note."]),
        Table("thresholds", "", [Entry("data", figures={"ours": 1.25e-9})]),
    ]
    findings = Findings("By the clock.", tables, list(targets), {"a tool": "it is not installed"})
    return Benchmark(name, BENCHMARKS[name], "2026-01-02T03:04:05+00:00", 12.3, [0.5, 1.5], findings)


def results(*benchmarks: Benchmark) -> Results:
    return Results(FORMAT, False, "LeNet on MNIST", HERE, list(benchmarks))


@pytest.mark.parametrize(
    ("kind", "figure", "met"),
    [
        ("at most", 0.5, True),
        ("at most", 0.51, False),
        ("at least", 0.5, True),
        ("at least", 0.49, False),
        ("at most", None, None),
    ],
)
def test_targets_are_met_or_not(kind, figure, met):
    assert target(figure, kind).met is met


def test_the_file_reads_back(tmp_path):
    written = results(benchmark("calibration", target(0.2), target(None)), benchmark("training"))
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(dataclasses.asdict(written), allow_nan=False))

    assert read_results(path) == written


@pytest.mark.parametrize("content", ["[]", "{}", '{"format": 99}', "nothing"])
def test_another_file_is_refused(tmp_path, content):
    path = tmp_path / "bench.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"bench\.json"):
        read_results(path)


def test_a_new_result_takes_the_place_of_the_old_one_in_the_order_of_the_page():
    both = add(add(results(), benchmark("training", target(0.1))), benchmark("calibration"))
    assert [one.name for one in both.benchmarks] == ["calibration", "training"]
    assert add(both, benchmark("training")).targets == []


def test_the_page_has_every_target_with_its_figure_and_verdict():
    page = markdown(
        results(
            benchmark(
                "calibration", target(0.2), target(0.7, note="on a busy day"), target(None), target(0.7, "at least")
            )
        )
    )

    assert "| something | at most 0.5 s | 0.2 s | yes |" in page
    assert "| something | at most 0.5 s | 0.7 s | **no** |" in page
    assert "| something | at most 0.5 s | not measured | - |" in page
    assert "| something | at least 0.5 s | 0.7 s | yes |" in page
    assert "- something: on a busy day." in page


def test_the_page_says_what_the_figures_were_measured_on():
    page = markdown(results(benchmark()))

    for text in ("A CPU, 2 cores, 2 threads in PyTorch", "avx512_vnni", "python 3.11, torch 2.8.0", "16 GiB"):
        assert text in page
    assert "Measured 2026-01-02 03:04, in 12 s; load average before and after: 0.5 and 1.5." in page
    assert "Skipped: a tool: it is not installed." in page


def test_the_page_shows_other_machines_at_its_end():
    elsewhere = [read_results(path) for path in ELSEWHERE]
    page = markdown(results(benchmark()), elsewhere)

    own, gpu, processor = page.split("\n## On another machine: ")
    assert "H100" not in own
    assert "| GPU | NVIDIA H100" in gpu
    assert "## Calibration beside the forward pass on the NVIDIA H100" in gpu
    assert "## Calibration of an ONNX file on the AMD EPYC" in processor
    for part, one in zip((gpu, processor), elsewhere, strict=True):
        assert all(target.what in part for target in one.targets)
    # A machine is not shown beside itself.
    assert "On another machine" not in markdown(elsewhere[1], elsewhere[1:])


def test_tables_keep_their_columns():
    lines = markdown(results(benchmark())).splitlines()

    assert "| ours | 0.2 | 0.1 to 0.3 | 3 | 1 | 98.12 | 2 QGemm \\| more |" in lines
    assert "| theirs | 1.5 | 1 to 2 | 2 | 0.1 | 98 | - |" in lines
    assert "| nothing | - | - | - | - | - | - |" in lines
    for index, line in enumerate(lines):
        if line.startswith("|") and lines[index - 1].startswith("|"):
            assert line.replace("\\|", "").count("|") == lines[index - 1].replace("\\|", "").count("|")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        ("text", "text"),
        (12345, "12,345"),
        (12345.6, "12,346"),
        (98.123, "98.12"),
        (0.0123456, "0.01235"),
        (0.00001234, "0.000012"),
        (1e-9, "1e-09"),
        (0, "0"),
        (0.0, "0"),
    ],
)
def test_numbers_are_short(value, text):
    assert number(value) == text
