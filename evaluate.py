"""Compare the precisions of a trained network: accuracy, agreement, latency, and a verdict."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import parse, run_command
from common.config import Config
from common.console import start_logging, stdout_to_stderr
from common.errors import ExitCode, InputError
from common.files import check_writable
from common.options import RUN_FOLDER, evaluate_parser
from common.processes import joined
from common.run import Run

if TYPE_CHECKING:
    from evaluation.results import Report

logger = logging.getLogger("evaluate")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 for PASSED, 1 for FAILED, 2 where a precision was stopped."""
    config, flags = parse(evaluate_parser(), argv)
    # torchrun's variable; without it this is the only process.
    first = os.environ.get("RANK", "0") == "0"
    start_logging(logging.INFO if first else logging.ERROR)
    config.engine.warn_of_threads()
    config.evaluation.analysis = config.evaluation.analysis and not flags.no_analysis
    run = Run(config.run, config.artifacts)
    if not run.checkpoint.exists():
        raise InputError(f"there is no checkpoint {run.checkpoint}: run train.py first")
    target = run.folder if flags.report == RUN_FOLDER else flags.report
    if target is not None and first:
        check_writable(target, "the report")
    # Who only reads needs no lock: every file of the run is either old or new, never torn.
    with run.locked() if first and target == run.folder else nullcontext(), stdout_to_stderr():
        found = evaluated(config, run, flags.cache, explained=target is not None)
        if found is None:
            return ExitCode.PASSED
        report, stopped = found
        failure: Exception | None = None
        try:
            if target is not None:
                from evaluation.report import write_all

                write_all(report, target)
        except (InputError, OSError) as error:
            # What was measured is not lost.
            failure = error

    from evaluation.terminal import print_report

    print(json.dumps(asdict(report), indent=2, allow_nan=False)) if flags.json else print_report(report)
    if failure is not None:
        raise failure
    if stopped:
        return ExitCode.BAD_INPUT
    return ExitCode.PASSED if report.verdict.passed else ExitCode.FAILED


def evaluated(config: Config, run: Run, cache: Path | None, *, explained: bool) -> tuple[Report, bool] | None:
    """Evaluate, with what only a written report shows where ``explained``.

    Returns:
        The report, and whether the engine was stopped at a precision; None in all processes but the first.
    """
    from engines.cuda import baselines_if_possible
    from engines.select import select_engine
    from engines.tensorrt.support import mode_for_named_table
    from evaluation.pipeline import evaluate, explain
    from evaluation.running import check_range
    from evaluation.subject import open_subject

    options = config.evaluation
    if cache is not None:
        config.quantization.mode = mode_for_named_table(config.quantization.mode)
    with joined() as processes:
        processes.divide(config.engine)
        subject = open_subject(config, run, cache)
        check_range(subject.images, options.batch_size, options.start, options.batches)
        sizes = (options.batch_size, *(options.latency_batch_sizes if processes.first else ()))
        selection = select_engine(config.engine, subject.int8.quantization, run.folder, sizes)
        logger.info("engine %s: %s", selection.engine.name, selection.reason)
        network, precisions = subject.network, tuple(options.precisions)
        others = baselines_if_possible(network, config.engine, precisions) if processes.first else []
        found = evaluate(config, subject, selection, others, processes)
    if found is None:
        return None
    report, measured = found
    return explain(report, measured, config, subject) if explained else report, bool(measured.stopped)


if __name__ == "__main__":
    run_command(main)
