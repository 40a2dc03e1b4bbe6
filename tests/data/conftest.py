"""Where no data set is."""

from pathlib import Path

import pytest


@pytest.fixture
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No data set can be found or downloaded; the default folders lie under the returned cache folder."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    for variable in ("MNIST_DIR", "FASHION_MNIST_DIR", "CIFAR10_DIR", "TRT_DATADIR"):
        monkeypatch.delenv(variable, raising=False)
    return cache
