"""Calibrate a trained network and prepare a precision: ``python quantize.py --precision int8``."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from common.cli import parse, run_command
from common.config import Config
from common.console import start_logging
from common.errors import ExitCode
from common.options import check_quantize, quantize_parser
from common.processes import Processes, joined
from common.run import Run

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from evaluation.quantized import Quantized
    from evaluation.studied import Studied

logger = logging.getLogger("quantize")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    config, flags = parse(quantize_parser(), argv)
    with joined() as processes:
        start_logging(logging.INFO if processes.first else logging.ERROR)
        config.engine.warn_of_threads()
        processes.divide(config.engine)
        if processes.first:
            with processes.leading() as call:
                found = quantize(config, flags, processes, call)
                print(json.dumps(found.summary(), indent=2)) if flags.json else found.show()
        else:  # the first alone reads and writes the run; the others calibrate with it, if it does
            from evaluation.subject import open_collector

            processes.help(lambda: open_collector(config, processes))
    return ExitCode.PASSED


def quantize(config: Config, flags: Namespace, processes: Processes, call: Callable[[], None]) -> Quantized | Studied:
    """The command, in the first process; ``call`` has the others calibrate with it."""
    run, quantization = Run(config.run, config.artifacts), config.quantization
    check_quantize(flags)
    if flags.keep_fp is not None:
        quantization.keep_fp = [name.strip() for name in flags.keep_fp.split(",") if name.strip()]

    from calib.kept import check_layers, warn_of_little_int8
    from calib.record import record_quantization
    from calib.run_table import calibrate_subset, run_table
    from engines.onnx.files import write_files
    from engines.onnx.macs import macs_of
    from engines.select import select_engine
    from engines.tensorrt.support import mode_for_named_table
    from evaluation.quantized import Quantized
    from evaluation.studied import study
    from evaluation.studies import keep_in_float
    from evaluation.subject import open_trained

    with run.locked(create=False):
        trained = open_trained(config, run)
        trained.announce(config.seed)
        if flags.compare_algorithms or flags.sweep_images:
            return study(trained, config, flags.compare_algorithms, flags.sweep_images, flags.sweep_seeds)
        network, subset, int8 = trained.network, partial(trained.subset, config), flags.precision == "int8"
        if int8 and flags.cache is not None:
            quantization.mode = mode_for_named_table(quantization.mode)
            logger.info("--cache names the table: through TensorRT it goes as explicit quantization")
        # Before calibration, which may replace a table.
        selection = select_engine(config.engine, quantization, run.folder)
        logger.info("engine %s: %s", selection.engine.name, selection.reason)
        used = table = own = macs = None
        if int8:
            check_layers(network, quantization)
            wanted = trained.wanted(config)
            calibrate = partial(calibrate_subset, network, subset, wanted, config, processes, call)
            used = run_table(run.table(network.name), flags.cache, wanted, calibrate, flags.recalibrate)
            table = used.table
            if flags.auto_mixed:
                keep_in_float(network, trained.data(config), table, quantization, config.evaluation, trained.measure)
            own = selection.own_calibration(network, table, subset, wanted, flags.recalibrate)
        compiled = selection.prepare(network, flags.precision, table)
        if used is not None:
            record_quantization(run.folder, used.path, trained.weights, quantization)
            macs = macs_of(compiled, network, used.table, quantization)
            warn_of_little_int8(network, quantization, macs)
        metadata = trained.metadata(config.seed)
        files = write_files(network, table, run, metadata, subset, config, flags.any_size) if flags.export else ()
    return Quantized(trained, config, compiled, selection.reason, used, own, macs, files)


if __name__ == "__main__":
    run_command(main)
