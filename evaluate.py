"""Compare the precisions of a trained network: accuracy, agreement, latency, and a verdict."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import Parser, config_parser, parse, run_command
from common.config import Config
from common.console import start_logging, stdout_to_stderr
from common.errors import ExitCode, InputError
from common.run import Run

if TYPE_CHECKING:
    from evaluation.results import Report

logger = logging.getLogger("evaluate")

ALIASES = {
    "--data-dir": "data.dir",
    "--split": "evaluation.split",
    "--batch-size": "evaluation.batch_size",
    "--start": "evaluation.start",
    "--batches": "evaluation.batches",
    "--tolerance": "evaluation.tolerance",
    "--agreement": "evaluation.agreement",
    "--precisions": "evaluation.precisions",
    "--latency-batch-sizes": "evaluation.latency_batch_sizes",
    "--engine": "engine.name",
    "--threads": "engine.threads",
    "--use-dla-core": "engine.dla_core",
}
RUN_FOLDER = Path("<artifacts>/<run>")


def parser() -> Parser:
    """The command's options."""
    result = config_parser("evaluate.py", "Compare FP32, FP16 and INT8 on the same images.", ALIASES)
    result.add_argument(
        "--report",
        nargs="?",
        type=Path,
        const=RUN_FOLDER,
        metavar="PATH",
        help="write report.json, report.md and report.html into the run's folder, or into PATH",
    )
    result.add_argument("--json", action="store_true", help="print the report as JSON alone on stdout")
    result.add_argument("--no-analysis", action="store_true", help="leave the per-layer analysis out of the report")
    result.add_argument("--cache", type=Path | None, help="calibration table to use instead of the run's own")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 if the verdict is PASSED, 1 if it is FAILED."""
    config, flags = parse(parser(), argv)
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
        check_writable(target)
    # Who only reads needs no lock: every file of the run is either old or new, never torn.
    with run.locked() if first and target == run.folder else nullcontext(), stdout_to_stderr():
        report = evaluated(config, run, flags.cache, explained=target is not None)
        if report is None:
            return ExitCode.PASSED
        failure: Exception | None = None
        try:
            if target is not None:
                write(report, target)
        except (InputError, OSError) as error:
            # What was measured is not lost.
            failure = error
    if flags.json:
        print(json.dumps(asdict(report), indent=2, allow_nan=False))
    else:
        from evaluation.terminal import print_report

        print_report(report)
    if failure is not None:
        raise failure
    return ExitCode.PASSED if report.verdict.passed else ExitCode.FAILED


def check_writable(folder: Path) -> None:
    """Make the report's folder and try it, before anything is measured.

    Raises:
        InputError: the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"cannot write the report into {folder}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"cannot write the report into {str(folder)!r}: a path must not contain NUL") from error


def write(report: Report, target: Path) -> None:
    """Write the report's files and its figures for TensorBoard into ``target``.

    Raises:
        InputError: the folder cannot be written.
    """
    from evaluation.report import write_report
    from evaluation.tensorboard import log_report

    for path in write_report(report, target):
        logger.info("wrote %s", path)
    log_report(report, target / "logs" / "evaluation")


def evaluated(config: Config, run: Run, cache: Path | None, *, explained: bool) -> Report | None:
    """Evaluate, with what only a written report shows where ``explained``; None in all processes but the first."""
    from engines import EngineError, select_engine
    from engines.cuda import baselines
    from engines.tensorrt.support import mode_for_named_table
    from evaluation.accuracy import check_range
    from evaluation.pipeline import evaluate, explain
    from evaluation.processes import joined
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
        try:
            others = baselines(subject.network, config.engine, tuple(options.precisions)) if processes.first else []
        except EngineError as error:
            logger.warning("no baseline on the GPU: %s", error)
            others = []
        found = evaluate(config, subject, selection, others, processes)
    if found is None:
        return None
    report, measured = found
    return explain(report, measured, config, subject) if explained else report


if __name__ == "__main__":
    run_command(main)
