"""Calibrating an ONNX file of resnet18's size: beside the plain run in ONNX Runtime, and its own entropy calibrator."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.calibration import onnx_runtime
from benchmarks.results import Entry, Findings, Table, Target
from benchmarks.setting import Setting
from benchmarks.timing import in_turns, ratio, spread, timed
from calib.network import INPUT
from calib.onnx.calibrate import calibrate_onnx
from calib.onnx.model import network_inputs, read_float_model
from calib.onnx.rules import entries
from calib.onnx.session import open_session
from calib.onnx.source import DEFAULT_BATCH, Pixels, open_source
from calib.tracing import trace
from common.threads import available_cores
from engines.onnx.export import export_fp32

PLAIN = "plain run in ONNX Runtime, all cores"
OURS = "python -m calib calibrate, entropy2"
ORT = "ONNX Runtime, entropy, its default of 128 bins"

TENSORRT = Entry("TensorRT 10.6.0, entropy 2, on an H100", figures={"by its own log, s": 7.68})
"""Of 496 images in batches of 16, random weights as here; the engine's build, 4.4 s, left out."""

METHOD = (
    "resnet18 of torchvision with random weights at 224 x 224, random images from a .npy file in batches of "
    f"{DEFAULT_BATCH}. The plain run has the session open already; calibration includes reading the file, opening its "
    "session and the search. ONNX Runtime's calibrator sees the first two images alone, since it keeps every value of "
    "every image, and its time is scaled to all of them. TensorRT's time is not of this machine: its log says "
    "it of 496 images."
)


def run(setting: Setting) -> Findings:
    """See the module."""
    from torchvision.models import resnet18

    images, size = (4, 64) if setting.quick else (500, 224)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "float.onnx"
        torch.manual_seed(0)
        export_fp32(trace(resnet18().eval(), name="ResNet18", input_shape=(3, size, size)), path)
        values = np.random.default_rng(0).standard_normal((images, 3, size, size), dtype=np.float32)
        np.save(folder / "images.npy", values)
        processor: dict[str, list[float]] = {PLAIN: [], OURS: [], ORT: []}
        contestants: dict[str, Callable[[], float]] = {
            PLAIN: timed(partial(_noted, processor[PLAIN], partial(_plain, _opened(path), values))),
            OURS: timed(partial(_noted, processor[OURS], partial(_ours, path, folder / "images.npy"))),
            ORT: partial(_onnx_runtime, folder, values),
        }
        seconds = in_turns(contestants, setting.rounds(3), {ORT: 1}, warm_up=False)
    times = ratio(seconds[OURS], seconds[PLAIN])
    rows = [
        Entry(name, spread(taken), ratio(seconds[PLAIN], taken), _processor_time(processor[name]))
        for name, taken in seconds.items()
    ]
    table = Table(f"calibration of resnet18, {images} images", "s", [*rows, TENSORRT], PLAIN)
    target = Target("calibration of resnet18, to the plain run", "at most", 1.3, "times", times)
    return Findings(METHOD, [table], [target])


def _noted(seconds: list[float], call: Callable[[], object]) -> None:
    """Run ``call`` once and note the processor time that it took, of all threads."""
    begin = time.process_time()
    call()
    seconds.append(time.process_time() - begin)


def _processor_time(seconds: list[float]) -> dict[str, float]:
    return {"processor time, s": statistics.median(seconds)} if seconds else {}


def _opened(path: Path) -> Callable[[NDArray[np.float32]], object]:
    session = open_session(path, read_float_model(path), available_cores())
    return lambda batch: session.run(None, {INPUT: batch})


def _plain(infer: Callable[[NDArray[np.float32]], object], images: NDArray[np.float32]) -> None:
    for begin in range(0, len(images), DEFAULT_BATCH):
        infer(images[begin : begin + DEFAULT_BATCH])


def _ours(path: Path, source: Path) -> None:
    model = read_float_model(path)
    batches = open_source(source, network_inputs(model), Pixels())
    found, observed = entries(model, "entropy2", path.parent)
    calibrate_onnx(path, observed, found, batches)


def _onnx_runtime(folder: Path, images: NDArray[np.float32]) -> float:
    begin = time.perf_counter()
    onnx_runtime(folder, [torch.from_numpy(images[:2])], 128)
    return (time.perf_counter() - begin) * len(images) / 2
