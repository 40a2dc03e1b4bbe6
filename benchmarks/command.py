"""The command ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import logging
import os
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from common.console import start_logging
from common.errors import ExitCode, InputError
from common.files import write_json, write_text
from common.run import Run

if TYPE_CHECKING:
    from benchmarks.results import Benchmark, Results
    from benchmarks.setting import Setting

logger = logging.getLogger("benchmarks")

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"

ELSEWHERE = tuple(Path(__file__).with_name(name) for name in ("h100.json", "epyc.json"))
"""What ``python -m benchmarks NAME`` wrote on other machines: ``overhead`` on one with an NVIDIA H100, and
``onnx_calibration`` on an AMD EPYC without VNNI. The page shows them behind the machine's own."""

BENCHMARKS = {
    "calibration": "Calibration",
    "onnx_calibration": "Calibration of an ONNX file",
    "cost": "Cost of calibration",
    "overhead": "Calibration beside the forward pass",
    "training": "Training",
    "inference": "Inference on the CPU",
    "columns": "First layers on the CPU",
    "accuracy": "Evaluation",
    "startup": "Start-up",
    "networks": "Other networks",
    "report": "The report",
}
"""Module of this package -> title, in the order of the page."""

OUTSIDE = ("huggingface-hub", "nvidia-modelopt", "openvino")
"""Packages that only the benchmarks use."""


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    result = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure the speed of this project side by side with what people use otherwise.",
        epilog="benchmarks: " + ", ".join(BENCHMARKS),
    )
    result.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run (default: all)")
    result.add_argument(
        "--quick", action="store_true", help="a trial on the digits without repetitions; its figures mean nothing"
    )
    result.add_argument("--page", action="store_true", help="write docs/benchmarks.md from the results")
    result.add_argument(
        "--no-run", action="store_true", help="run nothing: print, and with --page write, the last results"
    )
    result.add_argument("--artifacts", type=Path, default=Path("artifacts"), help="folder of all runs")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; a target that is missed is no failure."""
    options = parser().parse_args(argv)
    for name in options.names:
        if name not in BENCHMARKS:
            raise InputError(f"unknown benchmark {name!r}: take some of {', '.join(BENCHMARKS)}")
    if options.names and options.no_run:
        raise InputError("--no-run shows all of the last results: leave the names out")
    if options.page and options.quick:
        raise InputError("--page goes with a full run, not with --quick: its figures mean nothing")
    start_logging(logging.WARNING)
    # Advice of the tools that are compared with, which is not meant for readers of the results.
    logging.getLogger().setLevel(logging.ERROR)
    logger.setLevel(logging.INFO)
    from benchmarks.page import markdown, print_benchmark, print_targets
    from benchmarks.results import read_results

    path = Run("bench-quick" if options.quick else "bench", options.artifacts).folder / "bench.json"
    if options.no_run:
        results = read_results(path)
        for benchmark in results.benchmarks:
            print_benchmark(benchmark)
    else:
        from benchmarks.setting import Setting

        setting = Setting(options.artifacts, options.quick)
        results = start(setting, path)
        for name in options.names or BENCHMARKS:
            benchmark = run_one(name, setting)
            results = add(results, benchmark)
            write_json(path, dataclasses.asdict(results))
            print_benchmark(benchmark)
        logger.info("wrote %s", path)
    print_targets(results)
    if options.page:
        write_text(PAGE, markdown(results, [read_results(path) for path in ELSEWHERE]))
        logger.info("wrote %s", PAGE)
    return ExitCode.PASSED


def start(setting: Setting, path: Path) -> Results:
    """Results without benchmarks, or the last ones where machine and versions are still the same."""
    from benchmarks.results import FORMAT, Results, read_results
    from common.versions import installed_versions
    from evaluation.environment import environment

    here = environment()
    here = dataclasses.replace(here, versions={**here.versions, **installed_versions(*OUTSIDE)})
    new = Results(FORMAT, setting.quick, setting.subject, here, [])
    try:
        last = read_results(path)
    except InputError:
        return new
    same = dataclasses.replace(last.environment, gpu_details={}) == dataclasses.replace(here, gpu_details={})
    return dataclasses.replace(new, benchmarks=last.benchmarks) if same and last.subject == new.subject else new


def add(results: Results, benchmark: Benchmark) -> Results:
    """The results with ``benchmark``, in place of an earlier one of its name, in the order of the page."""
    kept = {one.name: one for one in results.benchmarks} | {benchmark.name: benchmark}
    return dataclasses.replace(results, benchmarks=[kept[name] for name in BENCHMARKS if name in kept])


def run_one(name: str, setting: Setting) -> Benchmark:
    """Run one benchmark."""
    from benchmarks.results import Benchmark

    module = importlib.import_module(f"benchmarks.{name}")
    logger.info("%s", BENCHMARKS[name])
    created = datetime.now(timezone.utc).astimezone().isoformat(timespec="seconds")
    before, begin = _load(), time.perf_counter()
    findings = module.run(setting)
    return Benchmark(name, BENCHMARKS[name], created, time.perf_counter() - begin, [*before, *_load()], findings)


def _load() -> list[float]:
    """The load average over one minute; empty where there is none."""
    return [os.getloadavg()[0]] if hasattr(os, "getloadavg") else []
