"""Train a network and write its checkpoint: ``python train.py``."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from contextlib import nullcontext

from common.cli import parse, run_command
from common.console import print_table, start_logging, stdout_to_stderr
from common.errors import ExitCode
from common.options import train_parser
from common.processes import is_first_process
from common.run import Run

logger = logging.getLogger("train")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--trainer.help" in arguments:
        from models.fit import trainer_parser

        trainer_parser().print_help()
        return ExitCode.PASSED
    config, flags = parse(train_parser(), arguments)
    if flags.epochs is not None:
        config.trainer["max_epochs"] = flags.epochs
    first = is_first_process()
    start_logging(logging.INFO if first else logging.WARNING)
    run = Run(config.run, config.artifacts)

    with run.locked() if first else nullcontext(), stdout_to_stderr():
        import torch

        from calib.task import purpose
        from calib.tracing import trace
        from data import open_data
        from models import training
        from models.checkpoint import save_checkpoint
        from models.network import is_exported, network_name

        options = training.start(config)
        data = open_data(config.data, config.seed)
        network = training.prepare(config, data.info, options)
        name = network_name(config.model.class_path)
        # What quantize.py could not use is not trained first; a user's network may draw random numbers here.
        with torch.random.fork_rng(devices=[]):
            traced = trace(network, name, data.info.preprocessing.shape)
        asked = config.model.task if training.is_taken_as_it_is(options) else "classify"
        found = purpose(traced, asked, len(data.info.classes), data.info.targets)
        parameters = sum(parameter.numel() for parameter in network.parameters())
        logger.info("%s with %s parameters on %s; seed %d", name, f"{parameters:,}", data.info.title, config.seed)
        logger.info("task: %s", found)
        for note in data.info.notes if first else ():
            logger.warning("%s", note)
        if found.task == "classify" and not is_exported(network):
            trained = training.train(network, data, config, options, run.folder, flags.resume)
        else:
            trained = training.taken(network)
        meta = training.describe(config, data.info, trained, asked)
        if trained.trial:
            logger.info("trainer.fast_dev_run: a trial, which writes nothing; %s stays as it was", run.folder)
        elif first:
            save_checkpoint(run.checkpoint, trained.network, meta)
            logger.info("wrote %s", run.checkpoint)
    if not first:
        return ExitCode.PASSED
    checkpoint = None if trained.trial else run.checkpoint
    if flags.json:
        print(json.dumps(training.summarize(run.name, checkpoint, meta, trained.seconds), indent=2))
    else:
        title = f"{meta.network} on {meta.dataset.name}"
        print_table(title, ("figure", "value"), training.figures(meta, trained.seconds))
        if checkpoint is not None:
            print(f"checkpoint: {checkpoint}")
    return ExitCode.PASSED


if __name__ == "__main__":
    run_command(main)
