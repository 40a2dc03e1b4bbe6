"""The cores of this machine, and how PyTorch's threads wait for each other on them."""

from __future__ import annotations

import os

SPINS = "1000"
"""About 0.05 ms: longer than the pauses between the operations of a network."""


def available_cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def share_cores() -> None:
    """Let a thread that waits for the others sleep after a moment; call it before torch is imported.

    GNU OpenMP lets it spin for about 10 ms. Where another program has taken the core of a thread that is waited for,
    that keeps the core busy which this thread could run on: with ten busy processes on two cores, calibration took
    2 s so, and takes 0.25 s now. What the environment says already stays.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS
