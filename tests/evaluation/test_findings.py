"""The sentences that a reader should take away, and figures as text."""

from dataclasses import replace

import pytest

from evaluation.findings import findings
from evaluation.measures import Interval, Paired
from evaluation.results import Report
from evaluation.text import decibel, milliseconds, p_value, percent, points, rate, short, size


def with_int8(report: Report, paired: Paired, *, representative: bool = False) -> Report:
    rows = list(report.rows)
    assert rows[2].precision == "int8"
    note = None if representative else rows[2].latency_note
    latency = [replace(entry, speedup=2.5) for entry in rows[2].latency] if representative else rows[2].latency
    rows[2] = replace(rows[2], paired=paired, latency_note=note, latency=latency)
    return replace(report, rows=rows, analysis=None)


def test_a_small_loss_within_the_tolerance(report: Report) -> None:
    paired = Paired(3, 1, -0.02, Interval(-0.06, 0.02), 0, 0.6, 0.37)

    sentence = findings(with_int8(report, paired, representative=True))[0]

    assert sentence.startswith("INT8 is -0.02 points from FP32 in top-1 (95 % interval -0.06 to +0.02): ")
    assert "3 images lost, 1 gained, no more than chance would do (McNemar p = 0.37)" in sentence
    assert "the whole interval is within the tolerance" in sentence
    assert "At batch 8 it is 2.50 times as fast as FP32." in sentence


def test_a_loss_that_is_real_and_may_be_too_large(report: Report) -> None:
    paired = Paired(90, 1, -0.9, Interval(-1.2, -0.6), 0, 0, 0)

    sentence = findings(with_int8(report, paired))[0]

    assert "90 images lost, 1 gained, more than chance (McNemar p <0.001)" in sentence
    assert "more images are needed to be sure" in sentence
    assert "times as fast" not in sentence


def test_nothing_changed(report: Report) -> None:
    sentence = findings(with_int8(report, Paired(0, 0, 0, Interval(-0.1, 0.1), 0, 1, 1)))[0]

    assert sentence.startswith(
        "INT8 gets exactly the same images right as FP32. It takes 435.14 kB instead of 1.72 MB."
    )


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (points(-0.004), "0.00"),
        (points(0.126), "+0.13"),
        (percent(None), "-"),
        (percent(99.5, 1), "99.5"),
        (decibel(None), "∞"),
        (short(0.0078451801), "0.0078452"),
        (milliseconds(0.00043), "0.000430"),
        (milliseconds(0.0903), "0.0903"),
        (milliseconds(28), "28.0"),
        (milliseconds(1234.5), "1234"),
        (rate(123456), "123,000"),
        (rate(8.44), "8.44"),
        (size(None), "-"),
        (size(12), "12 B"),
        (size(435140), "435.14 kB"),
        (size(44_890_000), "44.89 MB"),
        (p_value(0.0001), "<0.001"),
        (p_value(0.0391), "0.039"),
        (p_value(0.63), "0.63"),
    ],
)
def test_figures_as_text(shown: str, expected: str) -> None:
    assert shown == expected
