"""``<net>_int8.onnx`` in TensorRT itself: whether its engine gives the simulation's answer, and how fast it is.

Answers: networks of torchvision are trained for some seconds on MNIST's digits, calibrated with ``minmax`` on 200 of
the training images, and built from their file (builder level 0, which takes whatever kernel there is); the engine and
the exact integer simulation of the file then classify 1,000 test images.

Latency: engines of LeNet's and ResNet-50's file beside FP32 and implicit INT8 from a table, random weights, each
replayed as a CUDA graph, all of one batch size in turns. Builds differ, so that each is made several times.

``python -m benchmarks.hardware --files`` runs it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calib.calibrator import calibrate
from calib.network import Network
from calib.plan import plan_int8
from calib.table import CalibrationTable
from calib.tracing import trace
from common.errors import InputError, first_line
from data import Splits
from data.base import ImageSet
from engines.integer import IntegerNetwork
from engines.onnx.export import onnx_table
from engines.onnx.float import float_model
from engines.onnx.int8 import int8_model
from engines.tensorrt.form import for_tensorrt
from models import LeNet, SmallResNet

NETWORKS = {
    "lenet": 28,
    "small_resnet": 28,
    **dict.fromkeys(("resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "googlenet"), 64),
    "inception_v3": 96,
    **dict.fromkeys(("densenet121", "squeezenet1_1", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large"), 64),
    **dict.fromkeys(("mnasnet1_0", "shufflenet_v2_x1_0", "regnet_y_400mf", "efficientnet_b0", "vgg11_bn"), 64),
    "alexnet": 96,
    "convnext_tiny": 64,
}
"""Network -> height and width of its images."""

TRAINED_ON, CALIBRATED_ON, TESTED_ON, BATCH = 20_000, 200, 1_000, 100
TURNS, REPLAYS = 60, 20
SLOW = frozenset({"alexnet", "vgg11_bn", "convnext_tiny", "inception_v3", "squeezenet1_1"})
"""Networks that a high learning rate does not train."""


class Engine(Protocol):
    """What :class:`benchmarks.bare_tensorrt.BareEngine` gives."""

    seconds: float
    layers: int

    def __call__(self, images: Tensor) -> Tensor: ...


Build = Callable[..., Engine]
"""As :meth:`benchmarks.bare_tensorrt.TensorRT.build`."""


@dataclass(frozen=True)
class Answer:
    """What an engine answered.

    Attributes:
        network: Its name.
        built: Seconds of the build.
        layers: Of the engine.
        agrees: Percent of the images that get the simulation's class.
        off: Mean difference of a score from the simulation's.
        moved: Mean difference of a score from FP32's to the simulation's.
        agrees_with_fp32: Percent of the images that get FP32's class.
        fp32: Top-1 of the float network, percent.
        top1: Of the engine.
    """

    network: str
    built: float
    layers: int
    agrees: float
    off: float
    moved: float
    agrees_with_fp32: float
    fp32: float
    top1: float


def answers(names: Sequence[str], splits: Splits, seconds: float, build: Build) -> Iterator[Answer | str]:
    """Train, calibrate, build and ask each network; of one that fails, the line that says why.

    Args:
        names: Of ``NETWORKS``.
        splits: MNIST.
        seconds: Of training, for each.
        build: Builds an engine.
    """
    for name in names:
        try:
            yield answer(name, splits, seconds, build)
        except InputError as error:
            yield f"{name}: {first_line(error)}"


def answer(name: str, splits: Splits, seconds: float, build: Build) -> Answer:
    """As :func:`answers`, of one network."""
    size = NETWORKS[name]
    torch.manual_seed(1)
    model = make_model(name)
    train(model, splits.train, size, seconds, 5e-4 if name in SLOW else 2e-3)
    network = trace(model.cpu().eval(), name, (1 if size == 28 else 3, size, size))
    first = len(splits.train) - CALIBRATED_ON
    batches = [enlarged(splits.train, slice(at, at + 50), size) for at in range(first, first + CALIBRATED_ON, 50)]
    plan = plan_int8(network, calibrate(network, batches, "minmax"))
    engine = build(int8_model(plan).SerializeToString(), BATCH, int8=True, level=0, timings=1)
    images = enlarged(splits.test, slice(0, TESTED_ON), size).split(BATCH)
    labels = splits.test.labels[:TESTED_ON]
    simulation = IntegerNetwork(for_tensorrt(plan))
    with torch.inference_mode():
        found, expected, fp32 = (
            torch.cat([run(batch) for batch in images]) for run in (engine, simulation, network.module)
        )

    def same(scores: Tensor, classes: Tensor) -> float:
        return 100 * float((scores.argmax(1) == classes).float().mean())

    return Answer(
        network=name,
        built=engine.seconds,
        layers=engine.layers,
        agrees=same(found, expected.argmax(1)),
        off=float((found - expected).abs().mean()),
        moved=float((expected - fp32).abs().mean()),
        agrees_with_fp32=same(found, fp32.argmax(1)),
        fp32=same(fp32, labels),
        top1=same(found, labels),
    )


def make_model(name: str) -> nn.Module:
    """A network of ``NETWORKS`` for ten classes, random weights, made such that seconds of training move it."""
    import torchvision

    if name in ("lenet", "small_resnet"):
        return LeNet() if name == "lenet" else SmallResNet()
    options = {"init_weights": True, "aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    model: nn.Module = getattr(torchvision.models, name)(weights=None, num_classes=10, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1  # of some it is so small that the averages do not follow
    if name == "squeezenet1_1":  # its scores pass a ReLU: where all are zero, it learns nothing any more
        scores = model.get_submodule("classifier.1")
        nn.init.normal_(scores.get_parameter("weight"), std=0.03)
        nn.init.constant_(scores.get_parameter("bias"), 1.0)
    return model


def train(model: nn.Module, images: ImageSet, size: int, seconds: float, rate: float) -> None:
    """Train for so many seconds, on the GPU where there is one; the rate rises at first, and falls with the time."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    count = min(TRAINED_ON, len(images) - CALIBRATED_ON)
    pixels, labels = images.images(slice(0, count)).to(device), images.labels[:count].to(device)
    begin, step = time.perf_counter(), 0
    while (spent := time.perf_counter() - begin) < seconds:
        step += 1
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, step / 20) * max(0.05, 1 - spent / seconds)
        some = torch.randint(count, (128,), device=device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda" and size > 28):
            loss = F.cross_entropy(model(resized(pixels[some], size)), labels[some])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def enlarged(images: ImageSet, index: slice, size: int) -> Tensor:
    """Digits as a network of images of this size takes them."""
    return resized(images.images(index), size)


def resized(pixels: Tensor, size: int) -> Tensor:
    """float32 [N, 1, 28, 28] -> [N, 3, size, size]; as they are for a size of 28."""
    if size == 28:
        return pixels
    larger: Tensor = F.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False)
    return larger.expand(-1, 3, -1, -1)


@dataclass(frozen=True)
class Race:
    """Latency of one network at one batch size.

    Attributes:
        network: Its name.
        batch: Images.
        milliseconds: ``FP32``, ``implicit`` and ``file`` -> a median for each engine that was built.
    """

    network: str
    batch: int
    milliseconds: dict[str, list[float]]

    @property
    def ratio(self) -> float:
        """The file's latency to implicit INT8's: medians of the builds."""
        return statistics.median(self.milliseconds["file"]) / statistics.median(self.milliseconds["implicit"])


def races(sizes: Sequence[int], builds: int) -> Iterator[Race]:
    """LeNet and ResNet-50 at each batch size, with so many engines of each kind."""
    import torchvision

    from benchmarks.bare_tensorrt import TensorRT, in_turns

    version = TensorRT().version
    for name, make, shape in (("LeNet", LeNet, (1, 28, 28)), ("ResNet-50", torchvision.models.resnet50, (3, 224, 224))):
        torch.manual_seed(0)
        made = files(trace(make().eval(), name, shape), version)
        for batch in sizes:
            engines = {}
            for number in range(builds):
                trt = TensorRT()  # with a timing cache of its own
                for kind, (model, table) in made.items():
                    engines[f"{kind} {number}"] = trt.build(model, batch, int8=kind != "FP32", table=table)
            found = in_turns(engines, TURNS if name == "LeNet" else TURNS // 3, REPLAYS)
            yield Race(name, batch, {kind: [found[f"{kind} {number}"] for number in range(builds)] for kind in made})


def files(network: Network, tensorrt: str) -> dict[str, tuple[bytes, bytes]]:
    """Kind of engine -> (the ONNX file, the calibration table that goes with it) of a network.

    Args:
        network: Calibrated here on smooth random images.
        tensorrt: Version for the table's first line.
    """
    assert network.input_shape is not None  # the caller traced with one
    channels, *sides = network.input_shape
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(100, channels, 3, 3, generator=generator)
    noise = 0.15 * torch.randn(100, *network.input_shape, generator=generator)
    images = (F.interpolate(coarse, size=sides, mode="bilinear") + noise).clamp(0, 1)
    table = calibrate(network, images.split(50))
    model = float_model(network)
    named = CalibrationTable(onnx_table(network, table, model).scales, table.algorithm, tensorrt)
    fp32 = model.SerializeToString()
    quantized = int8_model(plan_int8(network, table)).SerializeToString()
    return {"FP32": (fp32, b""), "implicit": (fp32, named.dumps().encode()), "file": (quantized, b"")}
