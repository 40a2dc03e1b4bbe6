"""Compare the precisions of a trained network: accuracy, agreement, latency, and a verdict."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from common.cli import config_parser, parse, run_command
from common.console import start_logging
from common.errors import ExitCode
from common.run import Run

ALIASES = {
    "--data-dir": "data.dir",
    "--split": "evaluation.split",
    "--batch-size": "evaluation.batch_size",
    "--start": "evaluation.start",
    "--batches": "evaluation.batches",
    "--tolerance": "evaluation.tolerance",
    "--precisions": "evaluation.precisions",
    "--latency-batch-sizes": "evaluation.latency_batch_sizes",
    "--engine": "engine.name",
    "--threads": "engine.threads",
}
logger = logging.getLogger("evaluate")
IN_RUN = Path("<artifacts>/<run>")


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate; 0 if the verdict is PASSED, 1 if it is FAILED."""
    parser = config_parser("evaluate.py", str(__doc__), ALIASES)
    parser.add_argument(
        "--report", nargs="?", type=Path, const=IN_RUN, help="write report.json, .md and .html; into PATH if given"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON, and nothing else, on stdout")
    parser.add_argument("--no-analysis", action="store_true", help="leave the per-layer analysis out of the report")
    parser.add_argument("--cache", type=Path, help="another calibration table than the run's")
    config, flags = parse(parser, argv)
    run = Run(config.run, config.artifacts)
    start_logging()

    from dataclasses import asdict

    from engines import select_engine
    from evaluation.pipeline import evaluate, explain
    from evaluation.report import write_report
    from evaluation.subject import open_subject
    from evaluation.terminal import print_report

    subject = open_subject(config, run, flags.cache)
    selection = select_engine(config.engine, subject.int8.quantization, run.folder)
    logger.info("engine %s: %s", selection.engine.name, selection.reason)
    report, measured = evaluate(config, subject, selection)
    if flags.report is not None:
        config.evaluation.analysis &= not flags.no_analysis
        report = explain(report, measured, config, subject)
        with run.locked():
            for path in write_report(report, run.folder if flags.report == IN_RUN else flags.report):
                logger.info("wrote %s", path)
    if flags.json:
        print(json.dumps(asdict(report), indent=2, allow_nan=False))
    else:
        print_report(report)
    return int(ExitCode.PASSED if report.verdict.passed else ExitCode.FAILED)


if __name__ == "__main__":
    run_command(main)
