"""The environments that ``environment.py`` makes (``make test`` does it); CONTRACT_DIR names another place."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("CONTRACT_DIR", ROOT / ".contract")).resolve()


def require(folder: Path, what: str) -> None:
    """Skip the tests that need ``what`` where ``folder`` does not hold it, with the reason."""
    reason = folder / "unavailable.txt"
    if reason.exists():
        pytest.skip(f"{what} cannot be had here: {reason.read_text().strip()}")
    if not (folder / "complete.json").exists():
        pytest.skip(f"no {what} in {folder}: python tests/contract/environment.py {FOLDER.name}")
