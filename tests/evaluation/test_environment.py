"""What is said of the machine, with and without an NVIDIA driver."""

from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from evaluation.environment import GPU_QUERY, environment, gpu_state


def test_this_machine() -> None:
    found = environment()

    assert found.processor
    assert found.cores >= 1
    assert found.threads == torch.get_num_threads()
    assert found.versions["torch"] == version("torch")
    assert (found.gpu is None) == (not torch.cuda.is_available())


def fake_driver(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_the_gpus_state_is_asked_of_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [f"value{index}" for index in range(len(GPU_QUERY))]
    fake_driver(tmp_path, monkeypatch, f'[ "$1" = --id=2 ] && echo "{", ".join(values)}"')

    assert gpu_state(2) == dict(zip(GPU_QUERY, values, strict=True))


@pytest.mark.parametrize("body", ["exit 9", "echo", "echo one, two", ":"])
def test_a_driver_that_does_not_answer_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    fake_driver(tmp_path, monkeypatch, body)

    assert gpu_state() == {}


def test_without_a_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    assert gpu_state() == {}
