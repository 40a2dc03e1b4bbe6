"""The data that a checkpoint was trained on, opened again."""

from __future__ import annotations

import dataclasses

from common.config import DataConfig
from common.errors import InputError
from data import Splits, open_splits
from data.transform import is_torchvisions
from models.checkpoint import CheckpointMeta


def reopen_data(meta: CheckpointMeta, here: DataConfig) -> Splits:
    """Open the data set of a checkpoint, with its preprocessing and its validation split.

    Args:
        meta: Says which data set.
        here: Says where it lies on this machine (``dir``, ``targets``), and whether it may be downloaded; all else is
            the checkpoint's, so that no later command can disagree with training. An own transform, which is code, is
            imported only if it is named here, too.

    Raises:
        InputError: the data cannot be opened, or its images, classes or preprocessing are not those of the training.
    """
    transform = meta.data.transform
    if transform is not None and transform != here.transform and not is_torchvisions(transform):
        raise InputError(
            f"the checkpoint names the preprocessing {transform!r:.100}, which this run's configuration does not: give "
            "--data.transform with it if you trust it"
        )
    config = dataclasses.replace(
        meta.data,
        dir=here.dir or meta.data.dir,
        targets=here.targets or meta.data.targets,
        download=here.download,
        workers=here.workers,
    )
    data = open_splits(config, meta.seed)
    if data.info.fingerprint != meta.dataset.fingerprint:
        raise InputError(
            f"the {data.info.name} data found here is not what the network was trained on: "
            "give its folder with --data-dir, or train again"
        )
    if (data.info.preprocessing, data.info.classes) != (meta.dataset.preprocessing, meta.dataset.classes):
        raise InputError(
            f"the {data.info.name} images are prepared differently, or have other classes, than when the network was "
            "trained: train again"
        )
    return data
