"""Learning-rate policies, as factors on ``optimizer.lr``."""

from __future__ import annotations

import math

from common.config import OptimizerConfig

WARM_UP = 0.25
"""Share of the training in which ``onecycle`` rises."""
START = 0.04
"""Factor at which ``onecycle`` begins."""


def learning_rate_factor(config: OptimizerConfig, iteration: int, total: int | None) -> float:
    """The factor on ``config.lr`` for the step after ``iteration`` finished ones.

    * ``constant``: 1.
    * ``inv``: (1 + gamma * iteration) ** -power, as Caffe's solver computes it.
    * ``cosine``: from 1 to 0 along half a cosine.
    * ``onecycle``: from 0.04 to 1 in the first quarter, then to 0, each along half a cosine (Smith and Topin,
      "Super-Convergence", 2017; the momentum stays).

    Args:
        config: Names the policy.
        iteration: Optimiser steps so far.
        total: Optimiser steps of the whole training; only ``cosine`` and ``onecycle`` look at it.
    """
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "inv":
        return (1 + config.gamma * iteration) ** -config.power
    assert total is not None, "cosine and onecycle need the number of steps"
    progress = min(1.0, iteration / total)
    if config.schedule == "cosine":
        return _half_cosine(1 - progress)
    if progress < WARM_UP:
        return START + (1 - START) * _half_cosine(progress / WARM_UP)
    return _half_cosine((1 - progress) / (1 - WARM_UP))


def _half_cosine(position: float) -> float:
    """From 0 at 0 to 1 at 1."""
    return 0.5 - 0.5 * math.cos(math.pi * position)
