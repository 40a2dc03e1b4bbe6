from __future__ import annotations

from common.versions import installed_versions


def test_installed_versions():
    assert installed_versions("torch", "no-such-package").keys() == {"torch"}
