"""The event file that TensorBoard reads."""

from pathlib import Path

import pytest

from common.errors import InputError
from evaluation.results import Report
from evaluation.tensorboard import log_report, scalars


def test_scalars_and_histograms_read_back(report: Report, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
        EventAccumulator,
    )

    log_report(report, tmp_path / "logs")

    events = EventAccumulator(str(tmp_path / "logs"), size_guidance={"histograms": 0})
    events.Reload()
    expected = scalars(report)
    assert set(events.Tags()["scalars"]) == set(expected)
    for tag, value in expected.items():
        (event,) = events.Scalars(tag)
        assert (event.step, event.value) == (report.model.epochs, pytest.approx(value, rel=1e-6))
    assert set(events.Tags()["histograms"]) == {f"calibration/{tensor.name}" for tensor in report.tensors}
    histogram = events.Histograms("calibration/conv1")[0].histogram_value
    assert histogram.num == sum(next(t for t in report.tensors if t.name == "conv1").histogram.counts)


def test_an_unwritable_folder(report: Report, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(InputError, match="cannot write"):
        log_report(report, tmp_path / "file")
