"""Two commands at once, readers beside writers, and a lock that dies with its holder."""

import signal
import time

import pytest
from machinery import COMMANDS, check_whole, digests

from tests.forking import Fault

pytestmark = pytest.mark.e2e


def stopped(scene, at):
    """The scene's command, stopped just before operation ``at`` on the run's files."""
    fault = Fault(scene.folder / "artifacts", at, "raise", signal.SIGSTOP)
    running = scene.template.start(scene.argv, scene.folder, fault)
    deadline = time.monotonic() + 60
    while running.state() != "T":
        assert time.monotonic() < deadline, running.stderr.read_text()
        time.sleep(0.01)
    return running


@pytest.mark.parametrize("second", tuple(COMMANDS))
def test_second_command_stops_with_a_line(scene, second, tried):
    """While one command works on a run, another that would write there ends with exit code 2 and changes nothing."""
    scene.reset()
    first = stopped(scene, scene.operations - 1)
    before = digests(scene.run)
    ended = scene.template.run(COMMANDS[second], scene.folder)
    assert ended.code == 2, ended.stderr
    assert f"another command (process {first.pid}) is working on" in ended.stderr.splitlines()[-1]
    assert digests(scene.run) == before
    first.signal(signal.SIGCONT)
    assert first.wait().code == 0
    tried("second command")


def test_reading_while_another_writes(scene, moments, tried):
    """``evaluate.py`` without a report takes no lock: whenever it reads, it finds whole files that fit each other."""
    read = tuple(argument for argument in COMMANDS["evaluate"] if argument != "--report")
    for at in moments(scene.operations, 2):
        scene.reset()
        writer = stopped(scene, at)
        ended = scene.template.run((*read, "--json"), scene.folder)
        # 1: the table is of other weights than the checkpoint by now, so that INT8 was not evaluated.
        assert ended.code in (0, 1), f"{scene.command} stopped at operation {at}: {ended.stderr}"
        if ended.code == 1:
            assert "INT8 is skipped: " in ended.stderr
        writer.signal(signal.SIGCONT)
        assert writer.wait().code == 0
        check_whole(scene.run)
        tried("reader")


def test_runs_side_by_side(template, finished, place, tried):
    """Two runs in one artifacts folder do not disturb each other."""
    folder = place("side")
    ends = []
    for name in ("one", "two"):
        argv = [argument.replace("--run=run", f"--run={name}") for argument in COMMANDS["train"]]
        ends.append(template.start(argv, folder))
    assert [running.wait().code for running in ends] == [0, 0]
    one, two = (digests(folder / "artifacts" / name)["model.ckpt"] for name in ("one", "two"))
    assert one == two == digests(finished / "artifacts" / "run")["model.ckpt"]
    tried("side by side")
