"""What is evaluated, and every way in which it can be missing, stale or broken."""

import json
from pathlib import Path

import pytest
import torch

from common.config import QuantizationConfig
from common.errors import InputError
from common.run import Run
from evaluation.subject import open_subject
from models import load_checkpoint, save_checkpoint
from tests.evaluation.conftest import make_config

TABLE = "CalibrationTableLeNet"


@pytest.mark.parametrize(("split", "images"), [("test", 355), ("validation", 200), ("train", 1442)])
def test_the_split(own_run: Run, split: str, images: int) -> None:
    assert len(open_subject(make_config(own_run.artifacts, split=split), own_run).images) == images


def test_a_table_that_is_gone(own_run: Run) -> None:
    (own_run.folder / TABLE).unlink()

    assert "is gone: run quantize.py" in open_subject(make_config(own_run.artifacts), own_run).int8.problem


def test_a_table_of_other_weights_is_not_used(own_run: Run) -> None:
    checkpoint = load_checkpoint(own_run.checkpoint)
    with torch.no_grad():
        next(checkpoint.network.parameters()).mul_(1.5)
    save_checkpoint(own_run.checkpoint, checkpoint.network, checkpoint.meta)
    config = make_config(own_run.artifacts)

    int8 = open_subject(config, own_run).int8

    assert int8.table is None
    assert "of other weights: run quantize.py" in int8.problem
    with pytest.raises(InputError, match="was made for other weights"):
        open_subject(config, own_run, own_run.folder / TABLE)


def test_a_table_that_was_changed_is_not_used_unless_it_is_named(own_run: Run) -> None:
    path, config = own_run.folder / TABLE, make_config(own_run.artifacts)
    path.write_text(path.read_text().replace("conv1: 3", "conv1: 4"))

    assert "was changed since" in open_subject(config, own_run).int8.problem
    assert open_subject(config, own_run, path).int8.table is not None


def test_a_broken_table_is_an_error_when_it_is_named(own_run: Run, tmp_path: Path) -> None:
    (tmp_path / "torn").write_text((own_run.folder / TABLE).read_text()[:-3])

    with pytest.raises(InputError, match="line 9"):
        open_subject(make_config(own_run.artifacts), own_run, tmp_path / "torn")


def test_a_table_without_side_file_is_taken_with_a_note(
    own_run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    foreign = tmp_path / "foreign"
    foreign.write_text((own_run.folder / TABLE).read_text())

    subject = open_subject(make_config(own_run.artifacts), own_run, foreign)

    assert subject.int8.table is not None
    assert any("has no side file" in note for note in subject.notes)
    with pytest.raises(InputError, match="cannot read"):
        open_subject(make_config(own_run.artifacts), own_run, tmp_path / "missing")


def test_int8_runs_as_quantize_decided(own_run: Run) -> None:
    record = json.loads((own_run.folder / "quantization.json").read_text())
    record["quantization"]["keep_fp"] = ["ip2"]
    (own_run.folder / "quantization.json").write_text(json.dumps(record))

    int8 = open_subject(make_config(own_run.artifacts), own_run).int8

    assert int8.quantization == QuantizationConfig(keep_fp=["ip2"])
