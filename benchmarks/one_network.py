"""One network through tracing, calibration, export and execution, for :mod:`benchmarks.matrix`; prints one JSON line.

Weights are random (seed 0), with what would make the network trivial changed: weights that start at zero, statistics
of batch normalisation, which are taken from the images. Trained weights would have to be downloaded.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import onnx
import torch
from torch import Tensor, nn

from calib import calibrate, plan_int8, trace
from calib.onnx.macs import count_macs
from calib.plan import Int8Plan
from common.errors import InputError, first_line
from common.macs import MacCount
from common.run import Run
from engines.base import EngineError
from engines.integer import IntegerNetwork
from engines.onnx.export import export
from engines.onnxruntime.engine import open_session
from engines.onnxruntime.form import for_onnxruntime
from engines.onnxruntime.macs import executed_macs
from engines.tensorrt.form import for_tensorrt

IMAGES: Final = 16
"""Images that a network is judged on; half as many calibrate it."""

_SMALL: Final = 0.02

_STIRRED: Final = 1e-6
"""What float32 rounds in a few operations, of the value."""


@dataclass
class NetworkRow:
    """What became of a network.

    Attributes:
        network: ``torchvision:resnet18``.
        size: Height and width of its images, pixels.
        parameters: Millions.
        traced_by: ``torch.fx``, or ``torch.export``.
        gmacs: Multiply-accumulates for one image, 10^9.
        file_share: Percent of them in INT8 in the Q/DQ file.
        executed_share: Percent in INT8 as ONNX Runtime executes the CPU file.
        in_float: The layers that it computes in float, the largest first.
        sqnr: Of the integer simulation to FP32, dB.
        fp32_agreement: Percent of the images with the same largest output in FP32 and in the simulation.
        stirred_agreement: Percent with the same in the simulation of images changed by a millionth of their values.
        file_agreement: Percent with the same in the Q/DQ file, run as it is written, and its simulation.
        cpu_agreement: Percent with the same in ONNX Runtime's kernels and their simulation.
        seconds: Step -> seconds.
        failed: Why it went no further, in one line; empty where it did.
    """

    network: str
    size: int = 0
    parameters: float = 0.0
    traced_by: str = ""
    gmacs: float = 0.0
    file_share: float | None = None
    executed_share: float | None = None
    in_float: list[str] = field(default_factory=list)
    sqnr: float | None = None
    fp32_agreement: float | None = None
    stirred_agreement: float | None = None
    file_agreement: float | None = None
    cpu_agreement: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    failed: str = ""

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Take the seconds of a step, and name it where it fails."""
        begin = time.perf_counter()
        try:
            yield
        except Exception as error:
            kind = "" if isinstance(error, InputError | EngineError) else f"{type(error).__name__}: "
            self.failed = self.failed or f"{step}: {kind}{first_line(error)}"
            raise
        finally:
            self.seconds[step] = round(time.perf_counter() - begin, 2)


def build(spec: str, size: int) -> nn.Module:
    """The network of a name such as ``timm:vit_tiny_patch16_224``, with random weights, for square images.

    Raises:
        InputError: no such network, or its package is not installed.
    """
    source, _, name = spec.partition(":")
    try:
        return _SOURCES[source](name, size)
    except ImportError as error:
        raise InputError(f"{source} is not installed: pip install {source}") from error
    except KeyError as error:
        raise InputError(f"no network {spec}") from error


def _torchvision(name: str, size: int) -> nn.Module:
    from torchvision import models

    options: dict[str, Any] = {}
    if name.startswith("vit"):
        options = {"image_size": size}
    elif name in ("googlenet", "inception_v3"):
        options = {"init_weights": False}  # which takes half a minute
    model: nn.Module = models.get_model(name, weights=None, **options)
    return model


def _timm(name: str, size: int) -> nn.Module:
    import timm

    try:
        model: nn.Module = timm.create_model(name, pretrained=False, img_size=size)
    except TypeError:  # a network that any size goes through takes none
        model = timm.create_model(name, pretrained=False)
    return model


def _transformers(name: str, size: int) -> nn.Module:
    import transformers

    stages = {"hidden_sizes": [48, 96, 192, 384], "depths": [2, 2, 4, 2]}
    tokens = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 768}
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "resnet": ("ResNet", {"embedding_size": 32, "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]}),
        "vit": ("ViT", {**tokens, "image_size": size}),
        "deit": ("DeiT", {**tokens, "image_size": size}),
        "beit": ("Beit", {**tokens, "image_size": size}),
        "convnext": ("ConvNext", stages),
        "convnextv2": ("ConvNextV2", stages),
        "swin": (
            "Swin",
            {
                "image_size": size,
                "embed_dim": 48,
                "depths": [2, 2, 2, 2],
                "num_heads": [3, 6, 12, 24],
                "window_size": 4,
            },
        ),
        "regnet": ("RegNet", {"hidden_sizes": [32, 64, 128, 256], "depths": [1, 1, 2, 1], "groups_width": 16}),
        "mobilenet_v2": ("MobileNetV2", {}),
    }
    kind, options = kinds[name]
    config = getattr(transformers, f"{kind}Config")(num_labels=10, **options)
    model: nn.Module = getattr(transformers, f"{kind}ForImageClassification")(config)
    return model


_SOURCES: Final[dict[str, Callable[[str, int], nn.Module]]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "transformers": _transformers,
}


def examine(row: NetworkRow) -> NetworkRow:
    """Fill a row in that names a network and the size of its images, as far as the network goes."""
    try:
        _examine(row)
    except Exception as error:  # noqa: BLE001 - whatever goes wrong in any network is what is looked for
        row.failed = row.failed or f"{type(error).__name__}: {first_line(error)}"
    return row


def _examine(row: NetworkRow) -> None:
    name = row.network.partition(":")[2]
    torch.manual_seed(0)
    with row.timed("build"):
        model = build(row.network, row.size)
        row.parameters = round(sum(weight.numel() for weight in model.parameters()) / 1e6, 2)
        batches, judged = images(IMAGES // 2, row.size, 1).split(4), images(IMAGES, row.size, 2)
        enliven(model, batches[0])
    with row.timed("trace"):
        network = trace(model, name, (3, row.size, row.size))
        row.traced_by = network.traced_by.partition(",")[0]
    with row.timed("calibrate"):
        table = calibrate(network, list(batches))
        plan = plan_int8(network, table)
    with tempfile.TemporaryDirectory() as folder:
        with row.timed("export"):
            files = export(network, plan, table, Run("run", Path(folder)), {})
        assert files.int8 is not None  # there is a table
        assert files.int8_cpu is not None
        portable, cpu = onnx.load(files.int8), onnx.load(files.int8_cpu)
    with row.timed("count"):
        found = count_macs(portable, "")
        row.gmacs, row.file_share = round(found.total / 1e9, 4), found.share
    with row.timed("simulate"), torch.inference_mode():
        expected = _first(network.module(judged))
        simulation = IntegerNetwork(plan)
        simulated = _first(simulation(judged))
        row.sqnr, row.fp32_agreement = sqnr(expected, simulated), agreement(expected, simulated)
        row.stirred_agreement = agreement(simulated, _first(simulation(judged * (1 + _STIRRED))))
    with row.timed("run"):
        session, optimized = open_session(cpu, 1)
        executed = executed_macs(network, cpu, optimized)
        row.executed_share, row.in_float = executed.share, _largest(executed)
        row.cpu_agreement = _agreement(lambda part: session.run(None, {"data": part})[0], for_onnxruntime(plan), judged)
        plain, _ = open_session(portable, 1, optimize=False)
        row.file_agreement = _agreement(lambda part: plain.run(None, {"data": part})[0], for_tensorrt(plan), judged)


def images(count: int, size: int, seed: int) -> Tensor:
    """Smooth random images with some noise, normalised: float32 [count, 3, size, size]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, max(2, size // 8), max(2, size // 8), generator=generator)
    smooth = nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    result: Tensor = (smooth + 0.1 * torch.randn(smooth.shape, generator=generator) - 0.45) / 0.25
    return result


def enliven(model: nn.Module, batch: Tensor) -> None:
    """Give weights that start at zero values, and batch normalisation statistics of ``batch``; then eval mode."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not name.endswith("bias") and float(weight.abs().max()) < 1e-3:
                noise = torch.rand(weight.shape, generator=generator)
                # Scales of residual branches are vectors; position tables and tokens are added to values.
                weight.copy_(0.5 + 0.5 * noise if weight.dim() == 1 else _SMALL * (noise - 0.5))
        norms = [part for part in model.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
        model.eval()
        for norm in norms:
            norm.train()
            norm.momentum = None
            norm.reset_running_stats()
        if norms:
            model(batch)
    model.eval()


def sqnr(reference: Tensor, found: Tensor) -> float | None:
    """Signal to quantization noise, dB; None where they are equal."""
    noise = (reference.double() - found.double()).square().sum()
    return round(float(10 * (reference.double().square().sum() / noise).log10()), 1) if noise > 0 else None


def agreement(first: Tensor, second: Tensor) -> float:
    """Percent of images whose largest output is the same."""
    same = first.flatten(1).argmax(1) == second.flatten(1).argmax(1)
    return round(100 * float(same.double().mean()), 1)


def _agreement(run: Callable[[Any], Any], plan: Int8Plan, judged: Tensor) -> float:
    return agreement(torch.from_numpy(run(judged.numpy())), _first(IntegerNetwork(plan)(judged)))


def _first(value: Any) -> Tensor:
    first: Tensor = value[0] if isinstance(value, tuple | list) else value
    return first


def _largest(count: MacCount) -> list[str]:
    return [f"{layer.layer} ({layer.operator})" for layer in count.in_float[:3]]


def main() -> None:
    """``one_network.py NETWORK SIZE``."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    row = examine(NetworkRow(sys.argv[1], int(sys.argv[2])))
    json.dump(dataclasses.asdict(row), sys.stdout)


if __name__ == "__main__":
    main()
