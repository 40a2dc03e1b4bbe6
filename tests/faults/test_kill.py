"""Killed, interrupted or terminated at any moment, a command leaves each file old or new, and the next run works."""

import random
import signal
import time

import pytest
from machinery import CODES, SIGNALS, Scene, assert_next_run_works, assert_old_or_new, digests, leftovers

from tests.forking import Ended, Fault

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize(("action", "few"), [("kill", 5), ("tear", 3)])
def test_sigkill_at_an_operation(scene, moments, tried, action, few):
    """Killed just before an operation on a file, or in the middle of a write: the operations of the whole command."""
    for at in moments(scene.operations, few):
        note = f"{scene.command}: {action} at operation {at} of {scene.operations}"
        scene.reset()
        ended = scene.template.run(scene.argv, scene.folder, Fault(scene.folder / "artifacts", at, action))
        assert ended.code == -signal.SIGKILL, note
        assert len(leftovers(scene.run)) <= 1, note
        assert_old_or_new(scene, note)
        assert_next_run_works(scene, note)
        tried(action)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_at_an_operation(scene, moments, tried, number):
    """Interrupted or terminated at an operation on a file: nothing temporary stays, and the exit code says so."""
    for at in moments(scene.operations, 2):
        note = f"{scene.command}: {signal.Signals(number).name} at operation {at} of {scene.operations}"
        scene.reset()
        fault = Fault(scene.folder / "artifacts", at, "raise", number)
        ended = scene.template.run(scene.argv, scene.folder, fault)
        assert_stopped(ended, number, note)
        assert not leftovers(scene.run), note
        assert_old_or_new(scene, note)
        tried(signal.Signals(number).name)
    assert_next_run_works(scene, note)


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_at_any_time(scene, moments, tried, number):
    """At a random time from start to end, also in the middle of training, calibration and measurement."""
    generator = random.Random(f"{scene.command} {number}")
    for _ in moments(1000, 2):
        delay = generator.uniform(0.0, scene.seconds)
        note = f"{scene.command}: {signal.Signals(number).name} after {delay:.3f} s"
        scene.reset()
        running = scene.template.start(scene.argv, scene.folder)
        time.sleep(delay)
        running.signal(number)
        assert_stopped(running.wait(), number, note)
        assert_old_or_new(scene, note)
        tried(signal.Signals(number).name)
    assert_next_run_works(scene, note)


def assert_stopped(ended: Ended, number: int, note: str) -> None:
    # Done before the signal came, or stopped before the command set its handlers: as any program.
    assert ended.code in (CODES[number], 0, -number), f"{note}: exit code {ended.code}: {ended.stderr}"
    assert "Traceback" not in ended.stderr or ended.code == -number, f"{note}: {ended.stderr}"


def test_killed_training_resumes(template, finished, place, moments, tried):
    """Killed at any operation of a training, --resume ends in the very checkpoint of an undisturbed training."""
    scene = Scene(template, finished, place("resume"), "train")
    resumed = 0
    for at in moments(scene.operations, 5):
        note = f"train: kill at operation {at} of {scene.operations}"
        scene.reset()
        scene.template.run(scene.argv, scene.folder, Fault(scene.folder / "artifacts", at, "kill"))
        there = (scene.run / "checkpoints" / "last.ckpt").is_file()
        ended = scene.template.run((*scene.argv, "--resume"), scene.folder)
        tried("resume")
        if ended.code == 2:
            assert "train without --resume" in ended.stderr or "since the interrupted training" in ended.stderr, note
            continue
        assert there
        assert ended.code == 0, f"{note}: {ended.stderr}"
        assert digests(scene.run)["model.ckpt"] == scene.new["model.ckpt"], note
        assert not leftovers(scene.run), note
        resumed += 1
    assert resumed
