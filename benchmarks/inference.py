"""Inference on the CPU: every engine in FP32 and INT8, and OpenVINO as an outside reference."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import kernels
from benchmarks import onnxruntime_cpu as ort
from benchmarks.results import Entry, Findings, Table, Target
from benchmarks.setting import Setting, top1
from benchmarks.timing import in_turns, ratio, spread, timed_often
from calib.network import INPUT
from calib.plan import Int8Plan
from common.threads import available_cores
from engines.eager import TorchEngine
from engines.onnxruntime.engine import (
    describe_dot_products,
    dot_products,
    integer_operators,
    open_runner,
    open_session,
)

EAGER = "FP32, PyTorch eager"
SIMULATION = "INT8, integer simulation"
ORT = "ONNX Runtime: "
OPENVINO = {"fp32": "OpenVINO: FP32", "int8": "OpenVINO: INT8, from this project's Q/DQ model"}
FILE_SHARE = 27.0
LIMIT = "the limit: INT8 with these products, the rest for nothing"

Runner = Callable[[Tensor], Tensor]

METHOD = (
    "Latency of one batch from the caller's side, engines in turns: in each turn a network runs for about 30 ms, its "
    "first run not counted, and the turn's figure is the median of the others. Ratios are medians over the turns. "
    "quantize_static makes its models of the same float network with its defaults, calibrated on the same images. "
    "All engines have the same number of threads; all models run in ONNX Runtime as this project's engine runs them, "
    "in the fastest way to use the threads, and quantize_static's also in a plain session. Where the time goes is what "
    "ONNX Runtime's profiler says of a session of one thread. INT8's convolutions and matrix products alone, against "
    "all of FP32, are the limit of what INT8 can gain with these kernels."
)


def run(setting: Setting) -> Findings:
    """See the module."""
    plan = setting.plan
    threads = setting.config.engine.threads or available_cores()
    skipped: dict[str, str] = {}
    runners, details = _torch_runners(setting)
    models, problem = _onnx_models(setting, plan)
    if problem:
        skipped["ONNX Runtime"] = problem
    for name, model in models.items():
        call, optimized = open_runner(model, threads)
        runners[ORT + name] = partial(_run, call)
        operators = ", ".join(f"{count} {kind}" for kind, count in sorted(integer_operators(optimized).items()))
        details[ORT + name] = {"file, bytes": model.ByteSize(), "integer operators": operators or "none"}
    if models:
        session, _ = open_session(models[ort.PER_TENSOR], threads)
        runners[ORT + ort.PLAIN] = partial(_run, lambda images: session.run(None, {INPUT: images}))
    found, problem = _openvino_runners(plan, threads)
    if problem:
        skipped["OpenVINO"] = problem
    runners |= found

    test = setting.data.test
    images = test.images(slice(0, len(test)))
    tables = [
        Table(
            "accuracy on the test images",
            "",
            [
                Entry(name, figures={"top-1, %": top1(call, images, test.labels), **details.get(name, {})})
                for name, call in runners.items()
            ],
        )
    ]
    targets: list[Target] = []
    goals = ort.GOALS_WITHOUT_DOT_PRODUCTS if dot_products() == [] else ort.GOALS
    for size, goal in goals.items():
        batch = images[torch.arange(size) % len(images)]
        seconds = in_turns(
            {name: timed_often(partial(call, batch)) for name, call in runners.items()}, setting.rounds(40)
        )
        reference = ORT + ort.FP32 if models else EAGER
        entries = []
        for name, figures in seconds.items():
            measured = spread(figures, 1000)
            speed = {"images/s": 1000 * size / measured.median}
            entries.append(Entry(name, measured, ratio(seconds[reference], figures), speed))
        tables.append(Table(f"batch {size}", "ms", entries, reference))
        if models:
            targets += _latency_targets(size, goal, seconds)
    if models:
        targets += _other_targets(models, tables[0])
        tables += [_operators(models, images[torch.arange(size) % len(images)], setting.rounds(60)) for size in goals]
    return Findings(METHOD, tables, targets, skipped)


def _torch_runners(setting: Setting) -> tuple[dict[str, Runner], dict[str, dict[str, Any]]]:
    engine = TorchEngine(setting.config.engine, setting.config.quantization)
    fp32 = engine.compile(setting.network, "fp32", None)
    int8 = engine.compile(setting.network, "int8", setting.table)
    return {EAGER: fp32, SIMULATION: int8}, {}


def _onnx_models(setting: Setting, plan: Int8Plan) -> tuple[dict[str, Any], str | None]:
    """FP32, this project's INT8 and quantize_static's two models; or why there are none."""
    try:
        return {**ort.make_models(plan, setting.batches)}, None
    except ImportError as error:
        return {}, f"it cannot be imported: {error}"


def _run(call: Callable[[Any], Any], images: Tensor) -> Tensor:
    return torch.from_numpy(call(images.numpy())[0])


def _openvino_runners(plan: Int8Plan, threads: int) -> tuple[dict[str, Runner], str | None]:
    try:
        import onnx
        import openvino
    except ImportError as error:
        return {}, f"it is not installed ({error}): pip install -e '.[bench]'"
    from engines.onnx.float import float_model
    from engines.onnx.int8 import int8_model

    runners: dict[str, Runner] = {}
    core = openvino.Core()
    with tempfile.TemporaryDirectory() as folder:
        for precision, model in (("fp32", float_model(plan.network)), ("int8", int8_model(plan))):
            path = Path(folder, f"{precision}.onnx")
            onnx.save(model, path)
            # FP32 stays FP32: by default it would be computed in bfloat16 where the CPU has matrix instructions.
            options = {
                "INFERENCE_NUM_THREADS": threads,
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_PRECISION_HINT": "f32",
            }
            request = core.compile_model(core.read_model(path), "CPU", options).create_infer_request()
            runners[f"{OPENVINO[precision]}"] = partial(_infer, request)
    return runners, None


def _infer(request: Any, images: Tensor) -> Tensor:
    return torch.from_numpy(request.infer({0: images.numpy()})[0])


def _latency_targets(size: int, goal: float, seconds: dict[str, list[float]]) -> list[Target]:
    ours = seconds[ORT + ort.OURS]
    others = [seconds[ORT + name] for name in (ort.PER_TENSOR, ort.PER_CHANNEL, ort.PLAIN)]
    static = max(ratio(seconds[ORT + ort.FP32], other) for other in others)
    note = (
        f"this CPU's integer dot products: {describe_dot_products(dot_products())}; the fastest of quantize_static's "
        f"models is {static:.2f} times as fast as FP32 here"
    )
    return [
        Target(
            f"ONNX Runtime, INT8 against FP32, batch {size}: times as fast",
            "at least",
            goal,
            "",
            ratio(seconds[ORT + ort.FP32], ours),
            note,
        ),
        Target(
            f"ONNX Runtime, this project's INT8 against the faster of quantize_static's models, batch {size}: "
            "times as fast",
            "at least",
            0.95,
            "",
            min(ratio(other, ours) for other in others),
        ),
    ]


def _operators(models: dict[str, Any], batch: Tensor, rounds: int) -> Table:
    """Where the time of FP32 and of this project's INT8 goes, on one thread."""
    seconds = kernels.profile({name: models[name] for name in (ort.FP32, ort.OURS)}, batch.numpy(), rounds)
    entries = []
    for kind in [*kernels.KINDS, kernels.OTHERS]:
        fp32, int8 = (1000 * seconds[name][kind] for name in (ort.FP32, ort.OURS))
        figures = {"FP32, ms": fp32, "INT8, ms": int8, "times as fast": fp32 / int8 if int8 else "-"}
        entries.append(Entry(kind, figures=figures))
    fp32, int8 = (1000 * sum(seconds[name].values()) for name in (ort.FP32, ort.OURS))
    for name, least in (("all", int8), (LIMIT, 1000 * seconds[ort.OURS][kernels.PRODUCTS])):
        entries.append(Entry(name, figures={"FP32, ms": fp32, "INT8, ms": least, "times as fast": fp32 / least}))
    return Table(f"where the time goes, batch {len(batch)}, one thread", "", entries)


def _other_targets(models: dict[str, Any], accuracy: Table) -> list[Target]:
    right = {entry.name: entry.figures["top-1, %"] for entry in accuracy.entries}
    share = 100 * models[ort.OURS].ByteSize() / models[ort.FP32].ByteSize()
    return [
        Target(
            "INT8 top-1 of ONNX Runtime against the integer simulation",
            "at most",
            0.05,
            "points",
            abs(right[ORT + ort.OURS] - right[SIMULATION]),
        ),
        Target("INT8 ONNX file, share of the FP32 one", "at most", FILE_SHARE, "%", share),
    ]
