"""One training: from a network with the weights it starts from to those of its best epoch."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import seed_everything
from torch import nn

from common.config import Config, DatasetName, TaskName
from common.errors import InputError
from common.versions import installed_versions
from data.base import DatasetInfo
from models import fit
from models.checkpoint import CheckpointMeta
from models.classifier import Classifier
from models.network import (
    build_network,
    check_network,
    is_exported,
    network_arguments,
    network_name,
    to_eval_mode,
)
from models.precision import measure_precision

if TYPE_CHECKING:
    from data.module import ImageData

logger = logging.getLogger(__name__)

TAKE_AS_IT_IS = (
    "a network that was trained elsewhere, for whatever task, is taken as it is: --model.weights FILE "
    "--trainer.max_epochs 0"
)


@dataclass(frozen=True)
class Trained:
    """A finished training.

    Attributes:
        network: With the weights of the best epoch.
        epochs: Epochs that these weights have seen.
        metrics: ``test_loss``, ``test_top1``, ``test_top5`` and ``val_top1``, the last three in [0, 1].
        seconds: That the training took.
        trial: Whether it was a run of a few batches under ``fast_dev_run``, which leaves nothing.
    """

    network: nn.Module
    epochs: int
    metrics: dict[str, float]
    seconds: float
    trial: bool


def prepare(config: Config, info: DatasetInfo, options: fit.TrainerOptions) -> nn.Module:
    """Make the network that ``config`` names and, where it is to be trained, try it on images as ``info`` describes.

    Raises:
        InputError: it cannot be made, or is to be trained and is not a classifier of the data.
    """
    classes, shape = len(info.classes), info.preprocessing.shape
    network = build_network(config.model, classes, shape[0])
    if is_taken_as_it_is(options):
        return network
    try:
        if config.model.task not in ("auto", "classify"):
            raise InputError(f"train.py trains classifiers, not networks that {config.model.task}")
        if not classes:
            raise InputError("train.py trains classifiers, and these images have no classes")
        if is_exported(network):
            raise InputError("a module of torch.export does not train")
        check_network(network, network_name(config.model.class_path), shape, classes)
    except InputError as error:
        raise InputError(f"{error} ({TAKE_AS_IT_IS})") from error
    return network


def is_taken_as_it_is(options: fit.TrainerOptions) -> bool:
    """Whether the network is not trained here, but taken with the weights that it starts from."""
    return options.values.trainer.max_epochs == 0


def taken(network: nn.Module) -> Trained:
    """What ``train.py`` writes of a network that was trained elsewhere, and is no classifier that could be tested."""
    return Trained(to_eval_mode(network), epochs=0, metrics={}, seconds=0.0, trial=False)


def train(
    network: nn.Module, data: ImageData, config: Config, options: fit.TrainerOptions, folder: Path, resume: bool
) -> Trained:
    """Train ``network`` on ``data``, and test its best epoch once.

    Args:
        network: From :func:`prepare`; its weights are changed.
        data: The images.
        config: Which data set, network and optimiser.
        options: Arguments of ``lightning.Trainer``, checked.
        folder: The run's, for checkpoints to resume from, and logs.
        resume: Go on from the last of these checkpoints instead of starting anew.

    Raises:
        InputError: the loss is not finite, nothing can be written, or another process of this training ended.
    """
    last = fit.checkpoint_to_resume(folder) if resume else None
    as_it_is = is_taken_as_it_is(options)
    if options.measure_precision and not as_it_is:
        options = options.with_precision(_precision(network, data.info, config.data.batch_size, last))
    fitting = fit.make_trainer(options, folder, config.optimizer.average, resume)
    trainer = fitting.trainer
    record = fit.training_record(config, data.info, options)
    classifier = Classifier(network, config.optimizer, len(data.info.classes), record)
    try:
        if as_it_is:
            fitting.checkpoints.remove_earlier(trainer)
        else:
            fit.interruptible(lambda: trainer.fit(classifier, datamodule=data, ckpt_path=last))
        epochs = fit.load_best(fitting, classifier)
        fit.interruptible(lambda: trainer.test(classifier, datamodule=data, verbose=False))
    except OSError as error:
        raise InputError(f"cannot go on training in {folder}: {error.strerror or error}") from error
    except RuntimeError as error:
        if trainer.world_size == 1 or not fit.lost_another_process(error):
            raise
        raise InputError("another process ended; see its error above") from error
    # Metrics are float32: further digits are noise.
    metrics = {
        key: round(float(value), 6) for key, value in trainer.callback_metrics.items() if key.startswith("test_")
    }
    if fitting.checkpoints.best_score is not None:
        metrics["val_top1"] = round(fitting.checkpoints.best_score, 6)
    return Trained(classifier.network, epochs, metrics, classifier.seconds, fit.is_trial(trainer))


def _precision(network: nn.Module, info: DatasetInfo, batch_size: int, last: Path | None) -> str:
    """What to train in on this CPU: what the training that goes on was in, else what is faster."""
    before = fit.precision_of(last) if last is not None else None
    if before is not None:
        return before
    measured = measure_precision(network, info.preprocessing.shape, len(info.classes), batch_size)
    logger.info("training in %s: %s", measured.precision, measured.reason)
    return measured.precision


def start(config: Config) -> fit.TrainerOptions:
    """Check the Trainer's arguments, and seed every random choice. Raises InputError as ``fit.check_trainer`` does."""
    fit.quiet()
    options = fit.check_trainer(config.trainer)
    seed_everything(config.seed, workers=True, verbose=False)
    return options


def describe(config: Config, info: DatasetInfo, trained: Trained, task: TaskName) -> CheckpointMeta:
    """What the checkpoint says of a training; ``task`` is what the network was trained or given for."""
    directory = config.data.dir.resolve() if config.data.dir else None
    targets = config.data.targets.resolve() if config.data.targets else None
    return CheckpointMeta(
        network=network_name(config.model.class_path),
        class_path=config.model.class_path,
        init_args=network_arguments(config.model, len(info.classes), info.preprocessing.channels),
        dataset=info,
        data=dataclasses.replace(config.data, dataset=cast(DatasetName, info.name), dir=directory, targets=targets),
        seed=config.seed,
        epochs=trained.epochs,
        task=task,
        metrics=trained.metrics,
        versions=installed_versions("torch", "torchvision", "lightning"),
    )


def figures(meta: CheckpointMeta, seconds: float) -> list[tuple[str, str]]:
    """The figures of a training, each with its name, for people."""
    shown = [
        (title, f"{meta.metrics[key] * factor:.{digits}f}{unit}")
        for key, title, factor, digits, unit in (
            ("test_top1", "test top-1", 100, 2, " %"),
            ("test_top5", "test top-5", 100, 2, " %"),
            ("test_loss", "test loss", 1, 4, ""),
            ("val_top1", "validation top-1, by which the epoch was chosen", 100, 2, " %"),
        )
        if key in meta.metrics
    ]
    return [*shown, ("epochs of these weights", str(meta.epochs)), ("training", f"{seconds:.1f} s")]


def summarize(run: str, checkpoint: Path | None, meta: CheckpointMeta, seconds: float) -> dict[str, Any]:
    """What ``train.py --json`` prints; ``checkpoint`` is None after a trial."""
    return {
        "run": run,
        "checkpoint": str(checkpoint) if checkpoint is not None else None,
        "network": meta.network,
        "dataset": meta.dataset.name,
        "notes": list(meta.dataset.notes),
        "seed": meta.seed,
        "epochs": meta.epochs,
        "seconds": round(seconds, 2),
        "metrics": meta.metrics,
    }
