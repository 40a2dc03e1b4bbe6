import pytest

from common.threads import SPINS, share_cores


def test_threads_wait_asleep_unless_the_user_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", environment := {})
    share_cores()
    assert environment == {"GOMP_SPINCOUNT": SPINS}

    for own in ({"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "1"}):
        monkeypatch.setattr("os.environ", environment := dict(own))
        share_cores()
        assert environment == own
