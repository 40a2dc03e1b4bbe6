"""Train a network and write its checkpoint: ``python train.py``."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from common.cli import Parser, config_parser, parse, run_command
from common.config import Config, DatasetName
from common.console import print_table, start_logging, stdout_to_stderr
from common.errors import ExitCode, InputError
from common.run import Run

if TYPE_CHECKING:
    from models.checkpoint import CheckpointMeta

logger = logging.getLogger("train")

ALIASES = {"--data-dir": "data.dir", "--batch-size": "data.batch_size"}


@dataclass(frozen=True)
class Outcome:
    """A finished training; ``written`` unless it was a trial, which leaves no checkpoint."""

    meta: CheckpointMeta
    seconds: float
    written: bool


def parser() -> Parser:
    """The command's options."""
    result = config_parser("train.py", "Train a network and write its checkpoint.", ALIASES)
    result.add_argument("--epochs", type=int | None, help="short for --trainer.max_epochs")
    result.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    result.add_argument("--json", action="store_true", help="print JSON alone on stdout")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--trainer.help" in arguments:
        from models.fit import trainer_parser

        trainer_parser().print_help()
        return ExitCode.PASSED
    config, flags = parse(parser(), arguments)
    if flags.epochs is not None:
        config.trainer["max_epochs"] = flags.epochs
    first = is_first_process()
    start_logging(logging.INFO if first else logging.WARNING)
    run = Run(config.run, config.artifacts)
    with run.locked() if first else nullcontext(), stdout_to_stderr():
        outcome = train(config, run, flags.resume, first)
    if first:
        summary = summarize(run, outcome)
        print(json.dumps(summary, indent=2)) if flags.json else show(summary)
    return ExitCode.PASSED


def is_first_process() -> bool:
    """Whether this process has rank 0, by the variables of torchrun, SLURM and Lightning's own launcher."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "NODE_RANK", "LOCAL_RANK", "SLURM_PROCID"))


def train(config: Config, run: Run, resume: bool, first: bool) -> Outcome:
    """Train, test the best epoch once, and write ``model.ckpt``; nothing under ``trainer.fast_dev_run``.

    Args:
        config: Of the run.
        run: Where results go.
        resume: Go on from the last checkpoint instead of starting anew.
        first: Whether this is the process of rank 0, which alone writes.

    Raises:
        InputError: configuration, data or network do not fit, the loss is not finite, nothing can be written, or
            another process of this training ended.
    """
    import torch
    from lightning.pytorch import seed_everything

    from calib.graph import trace
    from data import open_data
    from models import fit
    from models.checkpoint import CheckpointMeta, installed_versions, save_checkpoint
    from models.classifier import Classifier
    from models.network import build_network, check_network, network_arguments, network_name

    fit.quiet()
    options = fit.check_trainer(config.trainer)
    seed_everything(config.seed, workers=True, verbose=False)
    data = open_data(config.data, config.seed)
    classes, shape = len(data.info.classes), data.info.preprocessing.shape
    network = build_network(config.model, classes, shape[0])
    name = network_name(config.model.class_path)
    check_network(network, name, shape, classes)
    # What quantize.py could not use is not trained first; a user's network may draw random numbers here.
    with torch.random.fork_rng(devices=[]):
        trace(network, name, shape)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    logger.info("%s with %s parameters on %s; seed %d", name, f"{parameters:,}", data.info.title, config.seed)
    for note in data.info.notes if first else ():
        logger.warning("%s", note)

    fitting = fit.make_trainer(options, run.folder, config.optimizer.average, resume)
    trainer = fitting.trainer
    last = fit.checkpoint_to_resume(run.folder) if resume else None
    classifier = Classifier(network, config.optimizer, classes, fit.training_record(config, data.info, options))
    try:
        fit.interruptible(lambda: trainer.fit(classifier, datamodule=data, ckpt_path=last))
        epochs = fit.load_best(fitting, classifier)
        fit.interruptible(lambda: trainer.test(classifier, datamodule=data, verbose=False))
    except OSError as error:
        raise InputError(f"cannot go on training in {run.folder}: {error.strerror or error}") from error
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
    meta = CheckpointMeta(
        network=name,
        class_path=config.model.class_path,
        init_args=network_arguments(config.model, classes, shape[0]),
        dataset=data.info,
        data=dataclasses.replace(
            config.data,
            dataset=cast(DatasetName, data.info.name),
            dir=config.data.dir.resolve() if config.data.dir else None,
        ),
        seed=config.seed,
        epochs=epochs,
        metrics=metrics,
        versions=installed_versions("torch", "torchvision", "lightning"),
    )
    trial = fit.is_trial(trainer)
    if trial:
        logger.info("trainer.fast_dev_run: a trial, which writes nothing; %s stays as it was", run.folder)
    elif first:
        save_checkpoint(run.checkpoint, classifier.network, meta)
        logger.info("wrote %s", run.checkpoint)
    return Outcome(meta, classifier.seconds, written=not trial)


def summarize(run: Run, outcome: Outcome) -> dict[str, Any]:
    """What ``--json`` prints."""
    meta = outcome.meta
    return {
        "run": run.name,
        "checkpoint": str(run.checkpoint) if outcome.written else None,
        "network": meta.network,
        "dataset": meta.dataset.name,
        "notes": list(meta.dataset.notes),
        "seed": meta.seed,
        "epochs": meta.epochs,
        "seconds": round(outcome.seconds, 2),
        "metrics": meta.metrics,
    }


def show(summary: dict[str, Any]) -> None:
    """Print the final figures."""
    shown = [
        (title, f"{summary['metrics'][key] * factor:.{digits}f}{unit}")
        for key, title, factor, digits, unit in (
            ("test_top1", "test top-1", 100, 2, " %"),
            ("test_top5", "test top-5", 100, 2, " %"),
            ("test_loss", "test loss", 1, 4, ""),
            ("val_top1", "validation top-1, by which the epoch was chosen", 100, 2, " %"),
        )
        if key in summary["metrics"]
    ]
    rows = [*shown, ("epochs of these weights", str(summary["epochs"])), ("training", f"{summary['seconds']:.1f} s")]
    print_table(f"{summary['network']} on {summary['dataset']}", ("figure", "value"), rows)
    if summary["checkpoint"] is not None:
        print(f"checkpoint: {summary['checkpoint']}")


if __name__ == "__main__":
    run_command(main)
