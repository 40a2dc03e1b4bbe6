"""First layers in ONNX Runtime: the file for any reader against the one for a CPU, with several columns at once."""

from __future__ import annotations

from collections import Counter
from functools import partial

import torch
from torch import nn

from benchmarks.results import Entry, Findings, Table, Target
from benchmarks.setting import Setting
from benchmarks.timing import in_turns, ratio, spread, timed_often
from calib.calibrator import calibrate
from calib.plan import plan_int8
from calib.tracing import trace
from engines.onnxruntime.columns import columns_at_once

STEMS = {
    "LeNet on MNIST": (partial(nn.Conv2d, 1, 20, 5), 28),
    "LeNet-5": (partial(nn.Conv2d, 1, 6, 5, padding=2), 28),
    "16 channels, 3 x 3, on MNIST": (partial(nn.Conv2d, 1, 16, 3, padding=1), 28),
    "32 channels, 3 x 3, on CIFAR-10": (partial(nn.Conv2d, 3, 32, 3, padding=1), 32),
    "MobileNetV3": (partial(nn.Conv2d, 3, 16, 3, stride=2, padding=1), 224),
    "EfficientNet-B0": (partial(nn.Conv2d, 3, 32, 3, stride=2, padding=1), 224),
    "VGG": (partial(nn.Conv2d, 3, 64, 3, padding=1), 224),
    "ResNet": (partial(nn.Conv2d, 3, 64, 7, stride=2, padding=3), 224),
    "AlexNet": (partial(nn.Conv2d, 3, 64, 11, stride=4, padding=2), 224),
}
"""Whose first convolution -> (what makes it, side of its image)."""

METHOD = (
    "The first convolution of known networks with random weights, followed by max and average pooling, on one image "
    "and one thread. In the file for a CPU, a convolution of few channels computes several columns of its output at "
    "once; in the file for any reader it does not. Both give the same numbers. Latencies are taken as for inference. "
    "The real networks gain less, since what follows takes as long in both."
)


def run(setting: Setting) -> Findings:
    """See the module."""
    try:
        import onnxruntime  # noqa: F401
    except ImportError as error:
        return Findings(METHOD, [], skipped={"ONNX Runtime": f"it cannot be imported: {error}"})
    from engines.onnx.int8 import int8_model
    from engines.onnxruntime.engine import integer_operators, open_runner

    entries, gains = [], {}
    for name, (make, side) in list(STEMS.items())[: 2 if setting.quick else None]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            conv = make()
        shape = conv.in_channels, side, side
        images = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
        model = nn.Sequential(conv, nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        network = trace(model.eval(), "stem", shape)
        plan = plan_int8(network, calibrate(network, [images]))
        runners = {
            form: open_runner(int8_model(plan, for_cpu), threads=1)
            for form, for_cpu in (("any reader", False), ("CPU", True))
        }
        seconds = in_turns(
            {form: timed_often(partial(call, images.numpy())) for form, (call, _) in runners.items()},
            setting.rounds(30),
            warm_up=not setting.quick,
        )
        gain = ratio(seconds["any reader"], seconds["CPU"])
        with torch.no_grad():
            columns = columns_at_once(conv, conv(images).shape[-1])
        if columns > 1:
            gains[name] = gain
        operators = {form: Counter(integer_operators(graph)) for form, (_, graph) in runners.items()}
        entries.append(
            Entry(
                name,
                spread(seconds["CPU"], 1000),
                gain,
                {
                    "columns at once": columns,
                    "any reader, ms": spread(seconds["any reader"], 1000).median,
                    "same operators": "yes" if operators["CPU"] == operators["any reader"] else "no",
                },
            )
        )
    least = min(gains, key=lambda name: gains[name])
    return Findings(
        METHOD,
        [Table("first layers, the file for a CPU", "ms", entries)],
        [
            Target(
                "ONNX Runtime, first layers in the file for a CPU against the one for any reader: times as fast",
                "at least",
                1.0,
                "",
                gains[least],
                f"the one that gains least: {least}",
            )
        ],
    )
