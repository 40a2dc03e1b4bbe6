"""What reads files from elsewhere, each as a function of bytes that may raise InputError and nothing else.

A target that returns took the input for valid. Inputs are made from the valid ones in :func:`seeds`; the tests mutate
those with hypothesis, ``fuzz.py`` with atheris (libFuzzer), which is guided by the code that an input reaches.
"""

import contextlib
import gzip
import io
import json
import struct
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch

from calib.cache import read_provenance, write
from calib.record import QuantizationRecord, read_record, write_record
from calib.table import CalibrationTable, formats, parse
from common.cli import check_config_file, config_parser
from common.cli import parse as parse_command_line
from common.config import DataConfig, QuantizationConfig
from common.errors import InputError
from data.base import DatasetInfo, Preprocessing
from data.idx import read_idx
from evaluation.results import read_report
from models import LeNet, load_checkpoint, save_checkpoint
from models.checkpoint import CheckpointMeta
from models.network import load_state, read_weights
from tests.records import REPORT, provenance

TABLE = CalibrationTable({"data": 0.0078, "conv 1: [a]": 0.5, "prob": 1e-38, "dead": 0.0}, "entropy2", "10.12.0")


@cache
def folder() -> Path:
    """Where the inputs are put as files; in memory where that is possible."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="fuzz", dir=memory if memory.is_dir() else None))


def file(name: str, content: bytes) -> Path:
    path = folder() / name
    path.write_bytes(content)
    return path


def table(content: bytes) -> None:
    text = content.decode("utf-8", errors="surrogateescape")
    found, problems = parse(text)
    assert (found is None) == bool(problems)
    if found is not None:
        assert CalibrationTable.loads(found.dumps()) == found
    formats.read(file("table", content), algorithm="minmax")


def side_file(content: bytes) -> None:
    file("CalibrationTable.json", content)
    read_provenance(folder() / "CalibrationTable")


def record(content: bytes) -> None:
    file("quantization.json", content)
    read_record(folder())


def report(content: bytes) -> None:
    read_report(file("report.json", content))


def idx_images(content: bytes) -> None:
    values = read_idx(file("images", content), 3).values
    assert values.ndim == 3


def idx_labels(content: bytes) -> None:
    values = read_idx(file("labels", content), 1).values
    assert values.ndim == 1


def checkpoint(content: bytes) -> None:
    loaded = load_checkpoint(file("model.ckpt", content))
    assert all(bool(torch.isfinite(value).all()) for value in loaded.network.state_dict().values())


def checkpoint_records(content: bytes) -> None:
    """The input is the pickle of a checkpoint's archive; the tensors' bytes are as they should be."""
    archive = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(seeds()["checkpoint"])) as source, zipfile.ZipFile(archive, "w") as target:
        for entry in source.infolist():
            target.writestr(entry.filename, content if entry.filename.endswith("data.pkl") else source.read(entry))
    checkpoint(archive.getvalue())


def weights(content: bytes) -> None:
    load_state(torch.nn.Linear(3, 2), read_weights(file("weights.pt", content)), "weights")


def safetensors(content: bytes) -> None:
    load_state(torch.nn.Linear(3, 2), read_weights(file("weights.safetensors", content)), "weights")


def configuration(content: bytes) -> None:
    path = file("config.yaml", content)
    check_config_file(str(path))
    with contextlib.redirect_stderr(io.StringIO()) as words:
        try:
            parse_command_line(_parser(), ["--config", str(path)])
        except SystemExit as stop:
            assert stop.code == 2
            assert words.getvalue().count("\n") == 1


@cache
def _parser():
    return config_parser("train.py", "Train.", {})


TARGETS: Mapping[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (
        table,
        side_file,
        record,
        report,
        idx_images,
        idx_labels,
        checkpoint,
        checkpoint_records,
        weights,
        safetensors,
        configuration,
    )
}


def accepts(name: str, content: bytes) -> bool:
    """Give ``content`` to a target: True if it was taken, False if it was refused in words."""
    try:
        TARGETS[name](content)
    except InputError as error:
        assert len(str(error).strip().splitlines()) == 1
        return False
    return True


@cache
def seeds() -> Mapping[str, bytes]:
    """A valid input for each target."""
    place = folder() / "seeds"
    place.mkdir(exist_ok=True)
    write(place / "table", TABLE, provenance(options={"percentile": 99.9}))
    write_record(place, QuantizationRecord(Path("table"), "1" * 64, QuantizationConfig()))
    torch.manual_seed(0)
    info = DatasetInfo("digits", "digits", tuple("0123456789"), Preprocessing(1, 28, 28), "0" * 64)
    meta = CheckpointMeta("LeNet", "models.LeNet", {"num_classes": 10}, info, DataConfig(dataset="digits"), 1)
    save_checkpoint(place / "model.ckpt", LeNet(), meta)
    state = torch.nn.Linear(3, 2).state_dict()
    torch.save(state, place / "weights.pt")
    from safetensors.torch import save_file

    save_file(state, place / "weights.safetensors")
    with zipfile.ZipFile(place / "model.ckpt") as archive:
        pickled = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    return {
        "table": (place / "table").read_bytes(),
        "side_file": (place / "table.json").read_bytes(),
        "record": (place / "quantization.json").read_bytes(),
        "report": json.dumps(asdict(REPORT)).encode(),
        "idx_images": bytes([0, 0, 8, 3]) + struct.pack(">3I", 2, 3, 4) + bytes(range(24)),
        "idx_labels": gzip.compress(bytes([0, 0, 8, 1]) + struct.pack(">I", 5) + bytes(range(5))),
        "checkpoint": (place / "model.ckpt").read_bytes(),
        "checkpoint_records": pickled,
        "weights": (place / "weights.pt").read_bytes(),
        "safetensors": (place / "weights.safetensors").read_bytes(),
        "configuration": b"run: x\nseed: 3\ndata: {batch_size: &a 7}\nevaluation: {batch_size: *a}\ntrainer: {x: 2}\n",
    }
