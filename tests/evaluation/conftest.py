"""A run on the digits, trained for a moment, calibrated and evaluated once for all tests of this folder."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import quantize
from common.config import (
    CalibrationConfig,
    Config,
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    QuantizationConfig,
)
from common.run import Run
from engines.select import select_engine
from evaluation.pipeline import Measured, evaluate, explain
from evaluation.results import Report
from evaluation.subject import Subject, open_subject
from tests.runs import digits_run

DATA = DataConfig(dataset="digits", validation=200, augment=False)


@dataclass(frozen=True)
class Evaluated:
    """An evaluation with all its parts."""

    config: Config
    run: Run
    subject: Subject
    report: Report
    measured: Measured


def make_config(artifacts: Path, **evaluation: object) -> Config:
    """A configuration whose latency takes no time."""
    options = EvaluationConfig(latency_batch_sizes=[1, 8], latency_seconds=0.001, latency_runs=5)
    return Config(
        run="digits",
        seed=1,
        artifacts=artifacts,
        data=DataConfig(),
        model=ModelConfig(),
        optimizer=OptimizerConfig(),
        calibration=CalibrationConfig(),
        quantization=QuantizationConfig(),
        engine=EngineConfig(name="torch"),
        evaluation=replace(options, **evaluation),  # type: ignore[arg-type]
        trainer={},
    )


def calibrate(artifacts: Path, *arguments: str) -> None:
    """Run quantize.py on the run."""
    flags = ["--run", "digits", "--artifacts", str(artifacts), "--engine", "torch", "--batches", "4", *arguments]
    assert quantize.main(flags) == 0


@pytest.fixture(scope="session")
def shared_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A trained and calibrated run; not to be changed."""
    artifacts = tmp_path_factory.mktemp("artifacts")
    run = digits_run(artifacts, "digits", steps=150, validation=DATA.validation)
    calibrate(artifacts)
    return run


@pytest.fixture
def own_run(shared_run: Run, tmp_path: Path) -> Run:
    """A copy of it to change."""
    shutil.copytree(shared_run.folder, tmp_path / "artifacts" / "digits")
    return Run("digits", tmp_path / "artifacts")


@pytest.fixture(scope="session")
def evaluated(shared_run: Run) -> Evaluated:
    """The evaluation of the shared run."""
    config = make_config(shared_run.artifacts)
    subject = open_subject(config, shared_run)
    selection = select_engine(config.engine, subject.int8.quantization, shared_run.folder)
    report, measured = evaluate(config, subject, selection)
    return Evaluated(config, shared_run, subject, explain(report, measured, config, subject), measured)


@pytest.fixture(scope="session")
def report(evaluated: Evaluated) -> Report:
    """Its report."""
    return evaluated.report
