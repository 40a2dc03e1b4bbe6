"""Networks that give no class: what their outputs are compared by, the verdict on them, and their report."""

import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from common.config import Config, Task
from common.decode import decode
from common.errors import InputError
from common.run import Run
from data import open_data
from engines.base import Compiled
from engines.select import select_engine
from evaluation.accuracy import Classes
from evaluation.compare import Gates, compare
from evaluation.measures import OutputFigures, Row
from evaluation.outputs import OutputsFound, Values, output_figures, relative_error, target_error
from evaluation.pipeline import evaluate, explain
from evaluation.report import render_html, render_markdown
from evaluation.results import Report
from evaluation.running import run
from evaluation.studies import keep_in_float
from evaluation.subject import open_subject, open_trained
from evaluation.tasks import distance, measure_of, passes
from evaluation.terminal import print_report
from evaluation.verdict import Limits, judge
from models import CheckpointMeta, save_checkpoint
from tests.evaluation.conftest import DATA, calibrate, make_config

IMAGES = torch.arange(8, dtype=torch.float32).reshape(8, 1, 1, 1)


def network(*tables: Tensor, precision: str = "fp32") -> Compiled:
    """Gives the rows of ``tables`` that the "images" number."""

    def look_up(images: Tensor) -> tuple[Tensor, ...]:
        return tuple(table[images.flatten().long()] for table in tables)

    return Compiled("fake", precision, "CPU", look_up, 1)  # type: ignore[arg-type]


def measured(task: Task, reference: list[Tensor], other: list[Tensor]) -> tuple[OutputsFound, OutputsFound]:
    stream = [(part, torch.zeros(len(part), dtype=torch.int64)) for part in IMAGES.split(3)]
    names = tuple(f"out{index}" for index in range(len(reference)))
    _, (first, second) = run([network(*reference), network(*other, precision="int8")], stream, Values(task, names))
    assert isinstance(first, OutputsFound)
    assert isinstance(second, OutputsFound)
    return first, second


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(8, *shape, generator=torch.Generator().manual_seed(seed))


def test_figures_are_those_of_torch() -> None:
    reference, other = values(5), values(5) + 0.1 * values(5, seed=1)

    first, second = measured("embed", [reference], [other])

    (found,) = output_figures(second, first)
    cosines = nn.functional.cosine_similarity(reference, other)
    assert found.cosine == pytest.approx(float(cosines.mean()), abs=1e-6)
    assert found.least_cosine == pytest.approx(float(cosines.min()), abs=1e-6)
    assert found.mse == pytest.approx(float(nn.functional.mse_loss(other, reference)), rel=1e-5)
    assert found.mae == pytest.approx(float(nn.functional.l1_loss(other, reference)), rel=1e-5)
    noise = float((other - reference).square().sum())
    assert found.sqnr_db == pytest.approx(10 * math.log10(float(reference.square().sum()) / noise), abs=1e-4)
    assert (found.shape, found.relative_error, found.non_finite) == ([5], None, 0)


def test_each_output_is_told_apart_and_what_is_no_images_is_one_row() -> None:
    anchors = torch.rand(4, 2)
    heads = [values(3, 2, 2), values(4)]
    broken = values(4)
    broken[2] = math.nan

    def with_anchors(*tables: Tensor) -> Compiled:
        inner = network(*tables)
        return replace(inner, run=lambda images: (*inner.outputs(images), anchors))

    stream = [(IMAGES, torch.zeros(8, dtype=torch.int64))]
    names = ("mask", "boxes", "anchors")
    _, (first, second) = run([with_anchors(*heads), with_anchors(heads[0], broken)], stream, Values("detect", names))
    assert isinstance(first, OutputsFound)
    assert isinstance(second, OutputsFound)
    mask, boxes, last = output_figures(second, first)

    assert [mask.name, boxes.name, last.name] == list(names)
    assert [mask.shape, boxes.shape, last.shape] == [[3, 2, 2], [4], [4, 2]]
    assert mask.sqnr_db is last.sqnr_db is None
    assert (mask.cosine, boxes.non_finite, last.cosine) == (pytest.approx(1), 1, pytest.approx(1))
    assert second.non_finite == 1


def test_the_error_of_regression_is_relative_to_how_much_its_numbers_vary() -> None:
    truth = values(2) * torch.tensor([1.0, 100.0]) + 1000
    spread = truth.double().std(dim=0, unbiased=False)

    assert relative_error(truth + 0.05 * spread, truth) == pytest.approx(5, rel=1e-3)
    assert relative_error(truth, truth) == 0
    constant = torch.full((8, 1), 4.0)
    assert relative_error(constant + 1, constant) == pytest.approx(25)
    assert relative_error(constant, torch.zeros(8, 1)) is None


def test_errors_against_targets_leave_out_what_is_not_finite() -> None:
    outputs, targets = values(1), values(1, seed=1)
    outputs[3] = math.inf
    first, second = measured("regress", [values(1)], [outputs])

    found = target_error(second, targets)

    kept = torch.arange(8) != 3
    assert found is not None
    assert found.mae == pytest.approx(float((outputs - targets)[kept].abs().mean()), rel=1e-5)
    assert target_error(first, targets) is not None
    assert output_figures(second, first)[0].non_finite == 1


def test_other_outputs_than_the_references_are_refused() -> None:
    with pytest.raises(InputError, match=r"fake int8 gives outputs of shape \[\(3, 4\)\] where FP32 gives \[\(3, 5\)"):
        measured("embed", [values(5)], [values(4)])


def judged(task: Task, **figures: object) -> tuple[bool, str]:
    good = OutputFigures("out", [4], 1.0, 1.0, 40.0, 0.0, 0.0, 1.0, 0)
    row = Row("int8", "torch", "compared", outputs=[replace(good, **figures)])  # type: ignore[arg-type]
    verdict = judge([Row("fp32", "torch", "reference"), row], Limits(), task)
    return verdict.passed, verdict.summary


@pytest.mark.parametrize(
    ("task", "figures", "passed", "summary"),
    [
        ("regress", {}, True, "INT8 is within 10 % of FP32"),
        ("regress", {"relative_error": 10.0}, True, "INT8 is within 10 % of FP32"),
        ("regress", {"relative_error": 12.5}, False, "INT8 errs by 12.50 % against FP32: outside 10 %"),
        (
            "regress",
            {"relative_error": None},
            False,
            "INT8 cannot be compared with FP32, which gives nothing but zeros",
        ),
        ("regress", {"non_finite": 2}, False, "INT8 gave NaN or infinity for 2 images"),
        ("embed", {"sqnr_db": 1.0}, True, "INT8 is close to FP32: cosine similarity of at least 0.99"),
        ("embed", {"cosine": 0.9}, False, "INT8 has a cosine similarity to FP32 of 0.9000: less than 0.99"),
        ("embed", {"cosine": None}, False, "since one of them gives nothing but zeros"),
        ("detect", {"sqnr_db": None}, True, "close to FP32"),
        ("detect", {"sqnr_db": 14.9}, False, "INT8 has an SQNR of 14.9 dB: less than 15 dB"),
    ],
)
def test_the_verdict_is_by_the_measure_of_the_task(
    task: Task, figures: dict[str, object], passed: bool, summary: str
) -> None:
    found = judged(task, **figures)

    assert found[0] is passed
    assert summary in found[1]


def test_another_network_does_not_pass_whatever_the_task() -> None:
    """As for classes: closer to the targets than FP32 is no merit where the outputs are others."""
    truth, other = values(3), values(3, seed=5)
    for task in ("regress", "embed", "detect"):
        first, second = measured(task, [truth], [other])
        measure = Values(task, ("out0",))
        assert not passes(second, first, other, measure, Limits())
        assert passes(replace(first), first, truth, measure, Limits())
        assert "dB (SQNR) from FP32" in distance(second, first, other)


class Two(nn.Module):
    """Two outputs by name: a vector and a map."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 5, 4), nn.ReLU())
        self.boxes = nn.Linear(4 * 36, 4)
        self.mask = nn.Conv2d(4, 2, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.body(images)
        return {"boxes": self.boxes(features.flatten(1)), "mask": self.mask(features)}


class One(nn.Module):
    """One number for an image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 5, 4)
        self.out = nn.Linear(4 * 36, 1)

    def forward(self, images: Tensor) -> Tensor:
        number: Tensor = self.out(torch.relu(self.conv(images)).flatten(1))
        return number


def run_of(model: type[nn.Module], folder: Path) -> Run:
    """A run with random weights of ``model`` and a calibration table."""
    data = open_data(DATA, seed=1)
    torch.manual_seed(3)
    path = f"{model.__module__}.{model.__name__}"
    meta = CheckpointMeta(model.__name__, path, {}, data.info, DATA, seed=1)
    found = Run("digits", folder)
    save_checkpoint(found.checkpoint, model(), meta)
    calibrate(folder, "--model.class_path", path)
    return found


def reported(model: type[nn.Module], folder: Path) -> tuple[Report, Config, Run]:
    config = make_config(folder, batch_size=64, batches=2)
    config.model.class_path = f"{model.__module__}.{model.__name__}"
    found = run_of(model, folder)
    subject = open_subject(config, found)
    selection = select_engine(config.engine, subject.int8.quantization, found.folder)
    evaluated = evaluate(config, subject, selection)
    assert evaluated is not None
    return explain(*evaluated, config, subject), config, found


def test_several_outputs_from_checkpoint_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, _, _ = reported(Two, tmp_path)

    int8 = report.row("int8")
    assert int8 is not None
    assert [output.name for output in int8.outputs] == ["boxes", "mask"]
    assert all(output.cosine is not None and output.cosine > 0.99 for output in int8.outputs)
    assert (report.model.task, report.verdict.passed, report.changed) == ("detect", True, [])
    assert report.analysis is not None
    assert {layer.only_points for layer in report.analysis.layers} == {None}
    assert sum(layer.noise_share for layer in report.analysis.layers) == pytest.approx(100)
    assert decode(Report, asdict(report), "report") == report
    page, text = render_html(report), render_markdown(report)
    for name in ("boxes", "mask"):
        assert f'<td class="left">{name}</td>' in page
        assert f"| INT8 | {name} |" in text
    assert "Confusion of" not in page
    assert "top-1" not in text.lower()
    print_report(report)
    shown = capsys.readouterr().out
    assert "task: detect (2 outputs: boxes, mask)" in shown
    assert "PASSED: FP16 and INT8 are each close to FP32" in shown
    changes = compare(report, report, Gates()).changes
    assert "INT8 mask, mean absolute error against FP32" in [change.figure for change in changes]


def test_one_number_is_regression_and_mixed_precision_knows_it(tmp_path: Path) -> None:
    report, config, found = reported(One, tmp_path)

    int8 = report.row("int8")
    assert int8 is not None
    assert int8.outputs[0].relative_error is not None
    assert (report.model.task, int8.targets) == ("regress", None)
    trained = open_trained(config, found)
    subject = open_subject(config, found)
    assert subject.int8.table is not None
    config.evaluation.relative_error = 100.0
    keep_in_float(
        trained.network,
        trained.data(config),
        subject.int8.table,
        config.quantization,
        config.evaluation,
        trained.measure,
    )
    assert config.quantization.keep_fp == []


def test_the_measure_follows_the_task(shared_run: Run) -> None:
    trained = open_trained(make_config(shared_run.artifacts), shared_run)

    assert trained.measure == Classes(10, scores=False)
    assert measure_of(trained.network, "embed", 10) == Values("embed", ("output",))
