"""Which of several processes this is, when torchrun, SLURM or Lightning has started them."""

from __future__ import annotations

import os


def is_first_process() -> bool:
    """Whether this process has rank 0, by the variables of torchrun, SLURM and Lightning's own launcher."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "NODE_RANK", "LOCAL_RANK", "SLURM_PROCID"))
