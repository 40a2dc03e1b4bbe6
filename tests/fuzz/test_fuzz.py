"""Files from elsewhere, mutated: each is taken or refused with an InputError, and none runs anything."""

import json
import os
from pathlib import Path

import pytest
import targets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES") or 150)
"""Inputs for each target; ``make soak`` tries more."""

INTERESTING = [
    *(b"", b"\0", b"\xff", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\n", b": ", b'"', b"{", b"[", b"NaN", b"-0"),
    *(b"1e999", b"9" * 30, b"null", b"true", b"PK\x03\x04", b"PK\x05\x06", b"\x1f\x8b", b"../../x", b"\0\0\x08\x03"),
    *(b"!!python/", b"*a", b"cos\nsystem\n(S'touch ran'\ntR.", b"ctorch\n_utils\n", b"K\xff", b"\x8a\x08\xff\xff"),
]


def positions(length: int) -> st.SearchStrategy[int]:
    # Formats decide in their first and last bytes.
    ends = st.integers(0, min(300, length)) | st.integers(max(0, length - 300), length)
    return st.integers(0, length) | ends


@st.composite
def mutated(draw, content):
    """One to four changes: bytes replaced, inserted, removed or repeated."""
    for _ in range(draw(st.integers(1, 4))):
        at, until = sorted((draw(positions(len(content))), draw(positions(len(content)))))
        piece = draw(st.sampled_from(INTERESTING) | st.binary(max_size=8))
        kind = draw(st.sampled_from(["overwrite", "insert", "remove", "repeat", "end"]))
        content = {
            "overwrite": content[:at] + piece + content[at + len(piece) :],
            "insert": content[:at] + piece + content[at:],
            "remove": content[:at] + content[min(until, at + 64) :],
            "repeat": content[:until] + content[at:until][:1024] + content[until:],
            "end": content[:at],
        }[kind]
    return content


@pytest.mark.parametrize("name", targets.TARGETS)
def test_the_seed_is_valid(name):
    assert targets.accepts(name, targets.seeds()[name])


@pytest.mark.parametrize("name", targets.TARGETS)
def test_mutated_files(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    counts = {True: 0, False: 0}

    @settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
    @given(mutated(targets.seeds()[name]) | st.binary(max_size=100))
    def attempt(content):
        counts[targets.accepts(name, content)] += 1

    attempt()
    assert not list(tmp_path.iterdir()), "an input made a file"
    if log := os.environ.get("SOAK_LOG"):
        entry = {"test": f"fuzz {name}", "tried": {"hypothesis inputs": sum(counts.values())}}
        with open(log, "a") as stream:
            stream.write(json.dumps(entry) + "\n")


@pytest.mark.parametrize("name", ["table", "side_file", "record", "idx_images", "idx_labels", "weights", "safetensors"])
def test_truncated_at_every_byte(name):
    whole = targets.seeds()[name]
    taken = [length for length in range(len(whole)) if targets.accepts(name, whole[:length])]
    if name == "table":
        # What ends after a line is a valid, shorter table, and "0" is a scale of its own: the side file's digest tells
        # (tests/calib/test_cache.py).
        lines = whole.decode().splitlines(keepends=True)
        ends = [sum(map(len, lines[:count])) for count in range(2, len(lines) + 1)]
        zeros = {end - 8 for end, line in zip(ends, lines[1:], strict=True) if ": 0" in line}
        assert set(taken) == ({*ends, *(end - 1 for end in ends)} | zeros) - {len(whole)}
    else:
        # The last line break of a JSON file is not missed.
        assert taken in ([], [len(whole) - 1])


def test_a_claim_larger_than_the_file(tmp_path):
    """A tensor that says it has a million elements where sixteen are: PyTorch would read what lies behind them."""
    import io
    import struct
    import zipfile

    import torch

    from common.errors import InputError
    from models.archive import load_archive

    torch.save({"a": torch.arange(16.0)}, tmp_path / "honest.pt")
    archive = io.BytesIO()
    with zipfile.ZipFile(tmp_path / "honest.pt") as source, zipfile.ZipFile(archive, "w") as target:
        for entry in source.infolist():
            content = source.read(entry)
            if entry.filename.endswith("data.pkl"):
                assert content.count(b"K\x10") == 2
                content = content.replace(b"K\x10", b"J" + struct.pack("<i", 10**6))
            target.writestr(entry.filename, content)
    path = Path(tmp_path / "liar.pt")
    path.write_bytes(archive.getvalue())
    with pytest.raises(InputError, match="damaged"):
        load_archive(path)
