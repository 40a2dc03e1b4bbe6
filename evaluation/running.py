"""Running several precisions over the same images, each batch read once and given to all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from common.errors import InputError
from common.processes import ALONE, Processes
from data.base import ImageSet, batches
from engines.base import Compiled, EngineError, Outputs


class Found(Protocol):
    """What one network gave for all images, compared with the reference."""

    @property
    def noise(self) -> float:
        """Energy of the difference to the reference's outputs; of several outputs, each in its own signal's."""
        ...

    @property
    def sqnr_db(self) -> float | None:
        """Signal-to-noise ratio of the outputs against the reference's, in dB; None where they are identical."""
        ...

    @property
    def non_finite(self) -> int:
        """Images whose output has a NaN or an infinity."""
        ...


class Collector(Protocol):
    """Gathers what one network gives, batch by batch, so that no outputs or images are kept."""

    def add(self, outputs: Outputs, reference: Outputs, labels: Tensor) -> None:
        """Take one batch: outputs of this network and of the reference, and the batch's labels or targets."""
        ...

    def found(self, parts: Sequence[Collector]) -> Found:
        """What all the collectors of this network, of one part of the images each, have gathered."""
        ...


class Measure(Protocol):
    """What outputs are compared by."""

    def collector(self, network: Compiled) -> Collector:
        """An empty collector for ``network``."""
        ...


@dataclass(frozen=True)
class _Part:
    """What some of the batches gave: their labels, and what was gathered of each network."""

    labels: list[Tensor]
    collectors: list[Collector]


def run(
    compiled: Sequence[Compiled], stream: Iterable[tuple[Tensor, Tensor]], measure: Measure
) -> tuple[Tensor, list[Found]]:
    """Run every network over the same batches; the first is the reference that the others are measured against.

    Args:
        compiled: Networks; the first is FP32.
        stream: Batches of (float32 images [B, C, H, W], their labels int64 [B] or targets float32 [B, K]).
        measure: What to gather.

    Returns:
        The labels of all images, and what was found of each network.

    Raises:
        InputError: an output does not fit ``measure``, FP32's outputs are not finite, or an engine stops.
    """
    return _finish([_collect(compiled, stream, measure)])


def run_shared(
    compiled: Sequence[Compiled],
    source: ImageSet,
    measure: Measure,
    batch_size: int,
    start: int = 0,
    count: int | None = None,
    processes: Processes = ALONE,
) -> tuple[Tensor, list[Found]] | None:
    """:func:`run` over a part of an image set, with a progress bar; each process takes a run of the batches.

    Returns:
        As :func:`run` in the first process; None in the others.

    Raises:
        InputError: as :func:`run` and :func:`check_range` do, in any process; the first tells.
    """
    total = check_range(source, batch_size, start, count)
    share = processes.share(math.ceil(total / batch_size))
    mine: _Part | InputError
    try:
        stream = batches(source, batch_size, start + share.start, len(share))
        mine = _collect(compiled, tracked(stream, total // processes.count, "accuracy", processes.first), measure)
    except InputError as error:
        mine = error
    parts = processes.gather(mine)
    if parts is None:
        return None
    for part in parts:
        if isinstance(part, InputError):
            raise part
    done = [part for part in parts if isinstance(part, _Part)]
    if len({len(part.collectors) for part in done}) > 1:
        raise InputError("the processes cannot all run the same precisions: use equal machines, or --precisions")
    return _finish(done)


def check_range(source: ImageSet, batch_size: int, start: int, count: int | None) -> int:
    """Number of images that ``batches`` will give.

    Raises:
        InputError: none, or fewer batches than asked for.
    """
    total = math.ceil(len(source) / batch_size)
    if start >= total:
        raise InputError(
            f"evaluation.start {start} skips all {total} batches of {batch_size} images ({len(source)} images): "
            "lower --start or --batch-size"
        )
    if count is not None and start + count > total:
        raise InputError(
            f"evaluation.batches {count} from batch {start} on is more than the {total} batches of {batch_size} "
            f"images there are ({len(source)} images)"
        )
    last = len(source) if count is None else min(len(source), (start + count) * batch_size)
    return last - start * batch_size


def tracked(
    stream: Iterator[tuple[Tensor, Tensor]], total: int, title: str, shown: bool = True
) -> Iterator[tuple[Tensor, Tensor]]:
    """``stream`` with a progress bar of ``total`` images on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not (shown and console.is_terminal)) as progress:
        task = progress.add_task(title, total=total)
        for images, labels in stream:
            yield images, labels
            progress.advance(task, len(images))


def sqnr_db(signal: float, noise: float) -> float | None:
    """10 log10(signal / noise) of two energies; None without noise (or without signal)."""
    return 10 * math.log10(signal / noise) if noise > 0 and signal > 0 else None


def _collect(compiled: Sequence[Compiled], stream: Iterable[tuple[Tensor, Tensor]], measure: Measure) -> _Part:
    collectors = [measure.collector(network) for network in compiled]
    labels: list[Tensor] = []
    for images, target in stream:
        labels.append(target)
        reference: Outputs | None = None
        for network, collector in zip(compiled, collectors, strict=True):
            try:
                outputs = network.outputs(images)
            except EngineError as error:
                raise InputError(f"{network.engine} in {network.precision} stopped: {error}") from error
            reference = outputs if reference is None else reference
            collector.add(outputs, reference, target)
    return _Part(labels, collectors)


def _finish(parts: Sequence[_Part]) -> tuple[Tensor, list[Found]]:
    """The labels and what was found of each network, from all parts in order."""
    labels = [labels for part in parts for labels in part.labels]
    if not labels:
        raise InputError("there are no images to evaluate")
    results = [collectors[0].found(collectors) for collectors in zip(*(part.collectors for part in parts), strict=True)]
    if results[0].non_finite:
        raise InputError(
            f"the FP32 outputs are not finite for {results[0].non_finite} of {sum(map(len, labels))} images: "
            "the weights are broken, or so large that values overflow; train again"
        )
    return torch.cat(labels), results
