"""Which precision a network trains faster in on this CPU, by a short measurement.

Whether bfloat16 gains depends on the processor's instructions, on PyTorch's kernels for them and on the network: with
matrix instructions (AMX) it takes half of float32's time, without any it takes ten times as long.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from models.network import logits_of

FLOAT32 = "32-true"
BFLOAT16 = "bf16-mixed"

_MARGIN = 0.8
"""Share of float32's time that bfloat16 may take: a gain that the next measurement would find again."""
_PRODUCT = 256
"""Rows and columns of the matrices whose product is tried first."""
_VALUES = 128 * 28 * 28
"""Values of the images of a step, at most: a batch of MNIST's. Larger images are measured in smaller batches."""
_FEWEST = 4
"""Images of a step, where a batch has as many: batch normalisation needs more than one."""
_ROUNDS, _WARM_UP, _STEPS = 2, 2, 4
"""Turns of each precision, and in a turn, steps that do not count and that do."""


@dataclass(frozen=True)
class MeasuredPrecision:
    """What was found.

    Attributes:
        precision: The one to train in, as ``lightning.Trainer`` names it.
        reason: Why, for people.
    """

    precision: str
    reason: str


def measure_precision(
    network: nn.Module, shape: tuple[int, int, int], classes: int, batch_size: int
) -> MeasuredPrecision:
    """Time matrix products of both precisions and, where bfloat16 is no slower, forward and backward passes.

    ``network`` and the random numbers to come stay as they are.

    Args:
        network: In float32, on the CPU; its scores are one tensor.
        shape: (C, H, W) of its images.
        classes: Number of classes.
        batch_size: Of the training.
    """
    with torch.random.fork_rng(devices=[]):
        matrix = torch.rand(_PRODUCT, _PRODUCT)
        half = matrix.bfloat16()
        times = _in_turns(lambda: matrix @ matrix, lambda: half @ half)
        if times[1] > times[0]:
            return MeasuredPrecision(
                FLOAT32, f"a matrix product in bfloat16 takes {times[1] / times[0]:.1f} times as long"
            )
        images = min(batch_size, max(_FEWEST, _VALUES // (shape[0] * shape[1] * shape[2])))
        batch, labels = torch.rand(images, *shape), torch.randint(classes, (images,))
        # In the memory format of the training, with statistics of its own for batch normalisation.
        trial: nn.Module = copy.deepcopy(network).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]

        def step(mixed: bool) -> None:
            trial.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                loss = F.cross_entropy(logits_of(trial)(batch), labels)
            loss.backward()

        try:
            times = _in_turns(lambda: step(False), lambda: step(True))
        except (RuntimeError, TypeError) as error:
            return MeasuredPrecision(FLOAT32, f"the network does not run in bfloat16 ({type(error).__name__})")
    precision = BFLOAT16 if times[1] <= _MARGIN * times[0] else FLOAT32
    return MeasuredPrecision(
        precision,
        f"forward and backward pass of {images} images take {1000 * times[1]:.1f} ms in bfloat16 and "
        f"{1000 * times[0]:.1f} ms in float32",
    )


def _in_turns(*steps: Callable[[], object]) -> list[float]:
    """Seconds of each, the least of what was measured.

    Each runs a few times in a row: kernels that follow those of the other precision are slower than in a training.
    """
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(_ROUNDS):
        for step, found in zip(steps, times, strict=True):
            for number in range(_WARM_UP + _STEPS):
                begin = time.perf_counter()
                step()
                seconds = time.perf_counter() - begin
                if number >= _WARM_UP:
                    found.append(seconds)
    return [min(found) for found in times]
