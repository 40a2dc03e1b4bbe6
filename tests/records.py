"""What the commands write, made up: the provenance of a calibration table, and a report."""

from typing import Any

from calib.cache import Provenance, SubsetRecord
from evaluation import measures, results
from evaluation.verdict import Limits, Verdict


def provenance(**changes: Any) -> Provenance:
    """What a calibration of LeNet records."""
    values: dict[str, Any] = {
        "maker": "reference",
        "network": "LeNet",
        "algorithm": "entropy2",
        "options": {},
        "tensorrt_version": "10.12.0",
        "subset": SubsetRecord("stratified", 10, 50, 0, 1),
        "dataset": "mnist",
        "data": "abc",
        "preprocessing": {"height": 28, "mean": (0.5,)},
        "weights": "def",
    }
    return Provenance(**{**values, **changes})


REPORT = results.Report(
    version=results.VERSION,
    run="x",
    created="2026-01-02T03:04:05+00:00",
    seconds={"accuracy": 1.0},
    verdict=Verdict(False, Limits(0.5, 99.0), "INT8 did not run", []),
    model=results.Model("LeNet", "models.LeNet", 431080, 1, 1, ["conv1"], {"mul": "mul"}),
    data=results.Data("digits", "digits", "test", 5, 2, 0, None, ["0", "1"], [1, 28, 28], "0" * 64),
    engine="torch",
    engine_reason="asked for",
    rows=[
        measures.Row(
            "fp32", "torch", "reference", latency=[measures.Latency(1, measures.Timing(5, 2.0, 3, 4, 2, 500))]
        ),
        measures.Row("int8", "torch", "compared", skipped="no table"),
    ],
    calibration=results.Calibration("entropy2", "10.12.0", {"made by": "reference"}, {"data": 0.0078}),
    tensors=[results.TensorFigures("data", results.Histogram(1.0, [3, 2], 0.99), True, 0.0078, 0.99)],
    macs=None,
    analysis=None,
    changed=[results.ChangedImage(3, 1, "int8", "lost", 1, 0.75, 0, 0.5, "data:image/png;base64,AA==")],
    changed_total={"int8": 1},
    environment=results.Environment("CPU", ["avx2"], 2, 2, None, "Linux", {"torch": "2.8.0"}),
    seed=1,
    config={"run": "x"},
)
