"""Calibration: ours against a plain NumPy loop, ONNX Runtime's and ModelOpt's, on the same network and images."""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torchvision
from torch import Tensor

from benchmarks import plain
from benchmarks.results import Entry, Findings, Spread, Table, Target
from benchmarks.setting import BATCH, BATCHES, Setting, top1
from benchmarks.timing import in_turns, ratio, spread, timed
from calib.calibrator import find_thresholds
from calib.collect import collect
from calib.network import INPUT, Network
from calib.plan import plan_int8
from calib.table import LEVELS, CalibrationTable
from calib.tracing import trace
from engines.integer import IntegerNetwork

OURS = "this project"
PLAIN = "plain NumPy loop"
ORT = "ONNX Runtime, entropy, 2048 bins"
ORT_DEFAULT = "ONNX Runtime, entropy, its default of 128 bins"
MODELOPT = "NVIDIA ModelOpt, entropy, 2048 bins"

TENSORRT_SECONDS: Final[Mapping[str, float]] = {
    "LeNet, 500 images": 1.56,
    "shufflenet_v2_x0_5, 24 images of 3 x 64 x 64": 17.4,
    "densenet121, 24 images of 3 x 64 x 64": 77.4,
}
"""What TensorRT's own calibration of these took on an H100, by its log (docs/hardware.md)."""


@dataclass(frozen=True)
class CalibratorResult:
    """What a calibrator found.

    Attributes:
        thresholds: Tensor -> threshold; a tensor that is missing takes the one of its ``scale_source``.
        search: Seconds of the search alone, where it is a step of its own.
    """

    thresholds: Mapping[str, float]
    search: float | None = None


Calibrator = Callable[[Network, list[Tensor]], CalibratorResult]


def run(setting: Setting) -> Findings:
    """See the module."""
    network, batches = setting.network, setting.batches
    calibrators: dict[str, Calibrator] = {OURS: ours, PLAIN: plain_numpy}
    slow = {PLAIN: setting.rounds(5)}
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        problem = _save_onnx(network, Path(folder) / "float.onnx")
        if problem:
            skipped |= {ORT: problem, ORT_DEFAULT: problem}
        else:
            bins = 256 if setting.quick else 2048  # the search takes the square of them
            calibrators[ORT] = lambda network, batches: onnx_runtime(Path(folder), batches, bins)
            calibrators[ORT_DEFAULT] = lambda network, batches: onnx_runtime(Path(folder), batches, 128)
            slow |= {ORT: setting.rounds(3), ORT_DEFAULT: setting.rounds(3)}
        problem = _modelopt_problem()
        if problem:
            skipped[MODELOPT] = problem
        else:
            calibrators[MODELOPT] = modelopt
            slow[MODELOPT] = setting.rounds(2)
        outcomes: dict[str, list[CalibratorResult]] = {name: [] for name in calibrators}

        def measured(name: str) -> Callable[[], float]:
            def measure() -> float:
                begin = time.perf_counter()
                outcome = calibrators[name](network, batches)
                seconds = time.perf_counter() - begin
                outcomes[name].append(outcome)
                return seconds

            return measure

        seconds = in_turns({name: measured(name) for name in calibrators}, setting.rounds(30), slow)
    rounds = len(seconds[OURS])
    searches = [outcome.search or 0.0 for outcome in outcomes[OURS][-rounds:]]
    found = {name: _complete(network, outcomes[name][-1].thresholds) for name in calibrators}
    accuracies = _accuracies(setting, found)
    same = sum(abs(found[PLAIN][name] - found[OURS][name]) <= 1e-6 * found[OURS][name] for name in network.tensors)
    tables = [
        Table(
            f"calibration of {BATCHES * BATCH} images in batches of {BATCH}, all {len(network.tensors)} tensors",
            "s",
            [
                Entry(
                    name,
                    spread(seconds[name]),
                    ratio(seconds[OURS], seconds[name]),
                    {"INT8 top-1, %": accuracies[name], "to FP32, points": accuracies[name] - accuracies["FP32"]},
                )
                for name in calibrators
            ],
            OURS,
            [
                f"Accuracy is the integer simulation's on the test images; FP32 has {accuracies['FP32']:.2f} %.",
                f"The plain loop finds the thresholds of this project for {same} of {len(network.tensors)} tensors.",
            ],
        ),
        Table(
            "this project's calibration, by its two steps",
            "s",
            [
                Entry(
                    "forward passes and histograms",
                    spread([whole - part for whole, part in zip(seconds[OURS], searches, strict=True)]),
                ),
                Entry("search for the thresholds", spread(searches)),
            ],
        ),
        _beside_tensorrt(setting, spread(seconds[OURS])),
        Table(
            "thresholds",
            "",
            [Entry(tensor, figures={name: found[name][tensor] for name in calibrators}) for tensor in network.tensors],
        ),
    ]
    whole, search = spread(seconds[OURS]).median, spread(searches).median
    what = f"calibration of {BATCHES * BATCH} images, {len(network.tensors)} tensors"
    targets = [
        Target(what, "at most", 0.20, "s", whole),
        Target(f"{what}: the aim", "at most", 0.10, "s", whole),
        Target("search for all thresholds, 1,921 candidates each", "at most", 0.05, "s", search),
    ]
    return Findings(METHOD, tables, targets, skipped)


NOT_OF_THIS_RUN = (
    "TensorRT's times are not of this run: its own log gave them on an H100, the engine's build left out "
    "(docs/hardware.md). They stand beside these for their size, not for a ratio: it is another machine."
)


def _beside_tensorrt(setting: Setting, lenet: Spread) -> Table:
    """This project's times on this machine, and what TensorRT's log said on another one."""
    measured = {"LeNet, 500 images": lenet}
    for name in ("shufflenet_v2_x0_5",) if setting.quick else ("shufflenet_v2_x0_5", "densenet121"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = trace(getattr(torchvision.models, name)(num_classes=10).eval(), name)
            batches = list(torch.rand(3, 8, 3, 64, 64))
        taken = in_turns({name: timed(partial(ours, network, batches))}, setting.rounds(5))[name]
        measured[f"{name}, 24 images of 3 x 64 x 64"] = spread(taken)
    column = "TensorRT 10.6.0 on an H100, s"
    return Table(
        "beside TensorRT's own calibration",
        "s",
        [Entry(f"{OURS}: {name}", taken, figures={column: TENSORRT_SECONDS[name]}) for name, taken in measured.items()],
        notes=[NOT_OF_THIS_RUN],
    )


METHOD = (
    "The float network runs over the same batches in memory; collecting histograms and searching thresholds is timed. "
    "Pooled tensors share their input's scale, so that this project, the plain loop and ModelOpt keep a histogram for "
    "6 of LeNet's 8 tensors; ONNX Runtime keeps one for each, runs the network itself, and its time includes "
    "preparing the graph and opening the session. The plain loop is the definition: np.histogram, then every "
    "candidate in turn. Calibrators of this project take part in all rounds, slow ones in the first few."
)


def ours(network: Network, batches: list[Tensor]) -> CalibratorResult:
    """This project's calibrator."""
    calibration = find_thresholds(collect(network, batches))
    return CalibratorResult({name: one.value for name, one in calibration.thresholds.items()}, calibration.post_seconds)


def plain_numpy(network: Network, batches: list[Tensor]) -> CalibratorResult:
    """The definition in NumPy."""
    histograms: dict[str, plain.PlainHistogram] = {}

    def observe(name: str, value: Tensor) -> None:
        if network.scale_source[name] == name:
            histograms.setdefault(name, plain.PlainHistogram()).add(value.numpy())

    for batch in batches:
        network.run(batch, observe)
    return CalibratorResult({name: plain.threshold(histogram) for name, histogram in histograms.items()})


def onnx_runtime(folder: Path, batches: list[Tensor], bins: int) -> CalibratorResult:
    """ONNX Runtime's entropy calibrator on ``float.onnx`` in ``folder``."""
    from onnxruntime.quantization import CalibrationDataReader
    from onnxruntime.quantization.calibrate import EntropyCalibrater

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches: Iterator[dict[str, Any]] = iter([{INPUT: batch.numpy()} for batch in batches])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.batches, None)

    with contextlib.redirect_stdout(io.StringIO()):
        calibrator = EntropyCalibrater(
            str(folder / "float.onnx"), augmented_model_path=str(folder / "augmented.onnx"), num_bins=bins
        )
        calibrator.augment_graph()
        calibrator.create_inference_session()
        calibrator.collect_data(Reader())
        ranges = calibrator.compute_data()
    return CalibratorResult({name: float(np.abs(ranges[name].range_value).max()) for name in ranges.keys()})  # noqa: SIM118


def modelopt(network: Network, batches: list[Tensor]) -> CalibratorResult:
    """NVIDIA ModelOpt's histogram calibrator."""
    from modelopt.torch.quantization.calib import HistogramCalibrator

    calibrators: dict[str, Any] = {}

    def observe(name: str, value: Tensor) -> None:
        if network.scale_source[name] == name:
            if name not in calibrators:
                calibrators[name] = HistogramCalibrator(num_bits=8, axis=None, unsigned=False, num_bins=2048)
            calibrators[name].collect(value)

    for batch in batches:
        network.run(batch, observe)
    return CalibratorResult(
        {name: float(calibrator.compute_amax("entropy")) for name, calibrator in calibrators.items()}
    )


def _modelopt_problem() -> str | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            __import__("modelopt.torch.quantization.calib")
    except Exception as error:  # noqa: BLE001 - whatever an optional package's import runs into
        return f"nvidia-modelopt cannot be imported ({type(error).__name__}: {error}): pip install -e '.[bench]'"
    return None


def _save_onnx(network: Network, path: Path) -> str | None:
    """Export the float network; why that is not possible, or None."""
    try:
        import onnx
        import onnxruntime.quantization  # noqa: F401
    except ImportError as error:
        return f"ONNX Runtime cannot be imported: {error}"
    from engines.onnx.float import float_model

    onnx.save(float_model(network), path)
    return None


def _complete(network: Network, thresholds: Mapping[str, float]) -> dict[str, float]:
    """The thresholds of all tensors."""
    return {name: thresholds.get(name, thresholds[network.scale_source[name]]) for name in network.tensors}


def _accuracies(setting: Setting, found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Top-1 in percent of FP32, and of INT8 with each calibrator's thresholds."""
    test = setting.data.test
    images = test.images(slice(0, len(test)))
    network = setting.network
    result = {"FP32": top1(lambda part: network.run(part, lambda name, value: None), images, test.labels)}
    for name, thresholds in found.items():
        table = CalibrationTable({tensor: value / LEVELS for tensor, value in thresholds.items()})
        result[name] = top1(IntegerNetwork(plan_int8(network, table)), images, test.labels)
    return result
