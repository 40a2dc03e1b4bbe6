"""When a calibration table is reused, and what its side file records."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from calib.cache import RULES, SubsetRecord, decide, read_provenance, weights_fingerprint, write
from calib.record import QuantizationRecord, read_record, write_record
from calib.table import CalibrationTable, Legacy
from common.config import QuantizationConfig
from common.errors import InputError
from common.side_file import side_file
from models import LeNet
from tests.records import provenance

TABLE = CalibrationTable({"data": 0.0078125, "conv1": 0.25})
WANTED = provenance()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "CalibrationTableLeNet"


def test_an_unchanged_table_is_reused(path: Path) -> None:
    write(path, TABLE, WANTED)
    decision = decide(path, WANTED, named=False)
    assert decision.table == TABLE
    assert not decision.foreign
    recorded = read_provenance(path)
    assert recorded is not None
    assert recorded.subset == WANTED.subset


@pytest.mark.parametrize("recorded", [{}, {"rules": 1}])
def test_a_table_made_by_older_rules_is_made_again(path: Path, recorded: dict[str, int]) -> None:
    write(path, TABLE, WANTED)
    content = json.loads(side_file(path).read_text())
    assert content.pop("rules") == RULES
    side_file(path).write_text(json.dumps({**content, **recorded}))
    decision = decide(path, WANTED, named=False)
    assert decision.table is None
    assert decision.reason == f"it was made by revision 1 of the calibration rules, now {RULES}"


def test_the_rules_of_the_reference_say_nothing_of_a_table_that_tensorrt_made(path: Path) -> None:
    made = dataclasses.replace(WANTED, maker="tensorrt", rules=1)
    write(path, TABLE, made)
    assert decide(path, dataclasses.replace(made, rules=RULES), named=False).table is not None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"weights": "other"}, "the weights changed"),
        ({"data": "other"}, "the images changed"),
        ({"algorithm": "minmax"}, "algorithm changed from entropy2 to minmax"),
        ({"options": {"percentile": 99.0}}, "options changed"),
        ({"subset": SubsetRecord("stratified", 10, 50, 0, 2)}, "subset seed changed from 1 to 2"),
        ({"subset": SubsetRecord("first", 10, 50, 0, 1)}, "subset strategy changed from stratified to first"),
        ({"preprocessing": {"height": 32, "mean": (0.5,)}}, "preprocessing changed"),
        ({"dataset": "digits"}, "dataset changed from mnist to digits"),
        ({"tensorrt_version": "8.6.1"}, "tensorrt_version changed"),
        ({"maker": "tensorrt"}, "maker changed"),
    ],
)
def test_every_change_calibrates_again_and_is_named(path: Path, change: dict[str, Any], reason: str) -> None:
    write(path, TABLE, WANTED)
    decision = decide(path, dataclasses.replace(WANTED, **change), named=False)
    assert decision.table is None
    assert reason in decision.reason


def test_a_missing_table_and_the_users_wish_calibrate(path: Path) -> None:
    assert decide(path, WANTED, named=False).table is None
    write(path, TABLE, WANTED)
    assert decide(path, WANTED, named=False, recalibrate=True).table is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": "other"}, "was made for other weights: name another file, or replace it with --recalibrate"),
        ({"network": "Other", "weights": "other"}, "was made for another network, LeNet: name another file"),
    ],
)
def test_a_named_table_of_another_network_is_replaced_only_if_asked(
    path: Path, change: dict[str, Any], message: str
) -> None:
    write(path, TABLE, WANTED)
    wanted = dataclasses.replace(WANTED, **change)
    with pytest.raises(InputError, match=message):
        decide(path, wanted, named=True)
    assert decide(path, wanted, named=True, recalibrate=True).table is None


def test_a_named_table_is_made_again_where_only_its_making_changed(path: Path) -> None:
    write(path, TABLE, WANTED)
    decision = decide(path, dataclasses.replace(WANTED, algorithm="minmax"), named=True)
    assert decision.table is None


@pytest.mark.parametrize("content", [b"", b"notes\n", b"{}", b"PK\x03\x04\xff\x00"])
def test_a_named_file_that_is_no_table_is_never_replaced(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    for recalibrate in (False, True):
        with pytest.raises(InputError, match=path.name):
            decide(path, WANTED, named=True, recalibrate=recalibrate)
    assert decide(path, WANTED, named=False, recalibrate=True).table is None
    path.unlink()
    assert decide(path, WANTED, named=True, recalibrate=True).table is None


def test_a_table_that_was_edited_is_not_taken_for_ours(path: Path) -> None:
    write(path, TABLE, WANTED)
    CalibrationTable({"data": 1.0, "conv1": 0.25}).write(path)
    assert "the table was changed since" in decide(path, WANTED, named=False).reason


def test_a_foreign_table_needs_to_be_named(path: Path) -> None:
    TABLE.write(path)
    assert decide(path, WANTED, named=False).table is None
    decision = decide(path, WANTED, named=True)
    assert decision.table == TABLE
    assert decision.foreign


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 2}', '{"format": 1}', "\0" * 100])
def test_a_damaged_side_file_calibrates_again_or_is_reported(path: Path, content: str) -> None:
    write(path, TABLE, WANTED)
    side_file(path).write_text(content)
    assert decide(path, WANTED, named=False).table is None
    with pytest.raises(InputError, match="json"):
        decide(path, WANTED, named=True)


def test_a_table_truncated_at_any_byte_is_never_reused(path: Path) -> None:
    write(path, TABLE, WANTED)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert decide(path, WANTED, named=False).table is None


def test_percentile_reads_back_under_its_true_name(path: Path) -> None:
    wanted = dataclasses.replace(WANTED, algorithm="percentile", options={"percentile": 99.9})
    write(path, CalibrationTable(TABLE.scales, "percentile"), wanted)
    assert path.read_text().startswith("TRT-101200-MinMaxCalibration\n")
    decision = decide(path, wanted, named=False)
    assert decision.table is not None
    assert decision.table.algorithm == "percentile"


def test_a_legacy_table_keeps_its_parameters(path: Path) -> None:
    table = CalibrationTable(TABLE.scales, "legacy", legacy=Legacy(quantile=0.99))
    wanted = dataclasses.replace(WANTED, algorithm="legacy", options={"quantile": 0.99})
    write(path, table, wanted)
    assert decide(path, wanted, named=False).table == table


def test_the_fingerprint_sees_every_weight() -> None:
    torch.manual_seed(0)
    model = LeNet()
    before = weights_fingerprint(model)
    assert weights_fingerprint(model) == before
    with torch.no_grad():
        model.ip2.bias[9] += 1e-6
    assert weights_fingerprint(model) != before


def test_the_record_reads_back(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None
    record = QuantizationRecord(Path("CalibrationTableLeNet"), "def", QuantizationConfig(keep_fp=["ip2"]))
    write_record(tmp_path, record)
    assert read_record(tmp_path) == record
