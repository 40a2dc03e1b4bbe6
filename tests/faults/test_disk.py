"""A full disk, a failing disk and missing rights: one clear line, no traceback, and nothing half written."""

import errno

import pytest
from machinery import assert_next_run_works, assert_old_or_new, leftovers

from tests.forking import Ended, Fault

pytestmark = pytest.mark.e2e


def errors(ended: Ended) -> list[str]:
    return [line for line in ended.stderr.splitlines() if line.startswith("error: ")]


def assert_one_line_or_done(scene, ended, note):
    """Either the command went on without what failed and is done, or it says in one line what was refused."""
    assert ended.code in (0, 2), f"{note}: exit code {ended.code}: {ended.stderr}"
    assert "Traceback" not in ended.stderr, f"{note}: {ended.stderr}"
    assert len(errors(ended)) == (1 if ended.code == 2 else 0), f"{note}: {ended.stderr}"
    assert not leftovers(scene.run), note
    assert_old_or_new(scene, note)


def test_disk_full_from_an_operation_on(scene, moments, tried):
    """ENOSPC, after half of a write where it meets one; then there is space again."""
    for at in moments(scene.operations, 4):
        note = f"{scene.command}: disk full from operation {at} of {scene.operations} on"
        scene.reset()
        ended = scene.template.run(scene.argv, scene.folder, Fault(scene.folder / "artifacts", at, "full"))
        assert_one_line_or_done(scene, ended, note)
        if ended.code == 2:
            assert "No space left on device" in errors(ended)[0], f"{note}: {ended.stderr}"
        tried("ENOSPC")
    assert_next_run_works(scene, note)


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_operation_fails_once(scene, moments, tried, number):
    """One operation fails; what can be done without it goes on."""
    for at in moments(scene.operations, 3):
        note = f"{scene.command}: {errno.errorcode[number]} at operation {at} of {scene.operations}"
        scene.reset()
        fault = Fault(scene.folder / "artifacts", at, "fail", number)
        ended = scene.template.run(scene.argv, scene.folder, fault)
        assert_one_line_or_done(scene, ended, note)
        tried(errno.errorcode[number])
    assert_next_run_works(scene, note)
