"""Where INT8 loses: every tensor against FP32, every layer on its own, and which layers to keep in float.

All of it runs the exact integer simulation, whatever engine the figures of the report come from: it can observe every
tensor and quantize any set of layers, and it is the arithmetic that the engines approximate.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from calib.histogram.base import AbsHistogram
from calib.int8 import quantize
from calib.network import Network
from calib.plan import Int8Plan
from calib.table import LEVELS
from common.config import PrecisionName
from data.base import ImageSet, Preprocessing
from engines.base import Compiled
from engines.integer import IntegerNetwork
from evaluation.accuracy import Predictions
from evaluation.results import Analysis, ChangedImage, Histogram, LayerSensitivity, TensorFigures
from evaluation.running import Measure, run, sqnr_db, tracked
from evaluation.tasks import changed, distance, passes, points
from evaluation.verdict import Limits

ARITHMETIC = 5e11
"""Floating-point operations that the layers' sensitivity may take, if the number of images is not given."""
LEAST_IMAGES = 64
TENSOR_IMAGES = 1000
"""Images that the tensors' histograms and noise come from: thousands of values from each."""
TENSOR_BYTES = 2**28
"""Bytes of activations that may be held at a time while tensors are compared."""
SHOWN_BINS = 128
"""Of the histograms in the report; the calibrator's own have 2048."""
ENGINE = "exact integer simulation"


@dataclass(frozen=True)
class Sample:
    """Some of the evaluated images, spread evenly over them.

    Attributes:
        source: All images of the split.
        positions: int64 [n], positions in ``source``, ascending.
    """

    source: ImageSet
    positions: Tensor

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(float32 images [B, C, H, W], int64 labels [B])."""
        parts = self.positions.split(size)
        for part, images in zip(parts, self.source.stream(parts), strict=True):
            yield images, self.source.labels[part]

    def __len__(self) -> int:
        return len(self.positions)


def sample(source: ImageSet, first: int, total: int, count: int) -> Sample:
    """At most ``count`` of the ``total`` images from position ``first`` on, evenly spaced."""
    count = min(count, total)
    return Sample(source, first + torch.arange(count) * total // count)


def affordable_images(network: Network, plan: Int8Plan, source: ImageSet) -> int:
    """How many images the sensitivity of all layers may run on within ``ARITHMETIC``; at least ``LEAST_IMAGES``.

    A fixed amount of arithmetic, not of time, so that the figures do not depend on the machine's load.
    """
    image = source.images(slice(0, 1))
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        network.module(image)
    passes = 1 + 2 * len(plan.layers)
    return max(LEAST_IMAGES, int(ARITHMETIC / max(1, passes * counter.get_total_flops())))


class _Moments:
    """Energies of a signal, of another, of their product and of their difference, gathered batch by batch."""

    def __init__(self) -> None:
        self.signal = self.other = self.product = self.noise = 0.0

    def add(self, truth: Tensor, value: Tensor) -> None:
        # Sums within a batch are pairwise in float32, across batches in double.
        self.signal += float(truth.square().sum(dtype=torch.float64))
        self.other += float(value.square().sum(dtype=torch.float64))
        self.product += float((truth * value).sum(dtype=torch.float64))
        self.noise += float((truth - value).square().sum(dtype=torch.float64))

    @property
    def sqnr_db(self) -> float | None:
        return sqnr_db(self.signal, self.noise)

    @property
    def cosine(self) -> float | None:
        energy = math.sqrt(self.signal * self.other)
        return min(1.0, self.product / energy) if energy > 0 else None


class _TensorCollector:
    """Everything that is known of one tensor."""

    def __init__(self, scale: float | None, quantized: bool) -> None:
        self.scale = scale
        self.quantized = quantized
        self.histogram = AbsHistogram()
        self.total = 0
        self.beyond = 0
        self.own = _Moments()
        self.network = _Moments()

    def add(self, truth: Tensor) -> None:
        self.histogram.add(truth)
        self.total += truth.numel()
        if self.scale is not None:
            self.beyond += int((truth.abs() > self.scale * LEVELS).sum())
            self.own.add(truth, quantize(truth, self.scale) * self.scale)

    def figures(self, name: str, analysed: bool) -> TensorFigures:
        known = self.scale is not None
        return TensorFigures(
            name=name,
            histogram=_shorten(self.histogram),
            quantized=self.quantized,
            scale=self.scale,
            threshold=None if self.scale is None else self.scale * LEVELS,
            clipped=100 * self.beyond / self.total if known else None,
            own_sqnr_db=self.own.sqnr_db if known else None,
            sqnr_db=self.network.sqnr_db if analysed else None,
            cosine=self.network.cosine if analysed else None,
        )


def _shorten(histogram: AbsHistogram) -> Histogram:
    """The calibrator's histogram with neighbouring bins merged, up to the largest value."""
    counts = histogram.counts.reshape(SHOWN_BINS, -1).sum(axis=1)
    used = SHOWN_BINS
    if histogram.range > 0:
        used = max(1, min(SHOWN_BINS, math.floor(histogram.maximum / histogram.range * SHOWN_BINS) + 1))
    return Histogram(
        range=histogram.range * used / SHOWN_BINS,
        counts=[int(count) for count in counts[:used]],
        maximum=histogram.maximum,
    )


def tensor_figures(
    network: Network, scales: Mapping[str, float], plan: Int8Plan | None, images: Sample, title: str = "tensors"
) -> list[TensorFigures]:
    """Histogram, clipping and quantization noise of every tensor, in network order.

    Args:
        network: The float network.
        scales: Of the calibration table, those that can be used; empty without a table.
        plan: Which layers run in INT8: with it, each tensor is also compared with its value in the INT8 network.
        images: What to run on.
        title: Of the progress bar.
    """
    quantized = {network.tensor_of[node] for node in plan.scales} if plan else set()
    collectors = {name: _TensorCollector(scales.get(name), name in quantized) for name in network.tensors}
    truth: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor) -> None:
        collectors[name].add(value)
        truth[name] = value

    def compare(name: str, value: Tensor) -> None:
        collectors[name].network.add(truth.pop(name), value)

    simulation = IntegerNetwork(plan, compare) if plan else None
    for batch, _ in tracked(images.batches(_batch_size(network, images)), len(images), title):
        network.run(batch, keep)
        if simulation is not None:
            simulation(batch)
        truth.clear()
    return [collector.figures(name, simulation is not None) for name, collector in collectors.items()]


def _batch_size(network: Network, images: Sample) -> int:
    """Images whose activations fit into ``TENSOR_BYTES``."""
    size = 0

    def count(_: str, value: Tensor) -> None:
        nonlocal size
        size += value.numel() * value.element_size()

    network.run(images.source.images(images.positions[:1]), count)
    return max(1, min(len(images), 256, TENSOR_BYTES // max(1, size)))


@dataclass(frozen=True)
class Sensitivities:
    """What quantizing each layer does.

    Attributes:
        layers: Ranked: what hurts most comes first.
        images: Images measured on.
    """

    layers: list[LayerSensitivity]
    images: int


def sensitivities(network: Network, plan: Int8Plan, images: Sample, batch_size: int, measure: Measure) -> Sensitivities:
    """Accuracy and output noise with only one layer in INT8, and with all but one, for every INT8 layer.

    Args:
        network: The float network.
        plan: Its INT8 layers.
        images: What to run on.
        batch_size: Images per batch.
        measure: What the outputs are compared by.
    """
    names = [layer.name for layer in network.layers if layer.name in plan.layers]
    kinds = {layer.name: layer.kind for layer in network.layers}
    full = IntegerNetwork(plan)
    networks = [
        _as_compiled(network.module.forward),
        *(_as_compiled(full.only({name})) for name in names),
        *(_as_compiled(full.only(plan.layers - {name})) for name in names),
    ]
    stream = tracked(images.batches(batch_size), len(images), "layers")
    with torch.inference_mode():
        labels, (reference, *found) = run(networks, stream, measure)
    only, without = found[: len(names)], found[len(names) :]
    total = math.fsum(item.noise for item in only)
    layers = [
        LayerSensitivity(
            layer=name,
            kind=kinds[name],
            noise_share=100 * alone.noise / total if total > 0 else 0.0,
            only_points=points(alone, reference, labels),
            only_changed=changed(alone, reference),
            only_sqnr_db=alone.sqnr_db,
            without_points=points(rest, reference, labels),
            without_changed=changed(rest, reference),
            without_sqnr_db=rest.sqnr_db,
        )
        for name, alone, rest in zip(names, only, without, strict=True)
    ]
    return Sensitivities(sorted(layers, key=lambda layer: -layer.noise_share), len(images))


def _as_compiled(run: object) -> Compiled:
    return Compiled("simulation", "int8", "CPU", run, 0)  # type: ignore[arg-type]


def layers_to_keep(
    network: Network,
    plan: Int8Plan,
    ranked: Sequence[str],
    images: Sample,
    batch_size: int,
    measure: Measure,
    limits: Limits,
) -> tuple[list[str], str] | None:
    """The fewest layers, in ranked order, that must stay in float for INT8 to be what the verdict asks for.

    Args:
        network: The float network.
        plan: Its INT8 layers.
        ranked: Their names; what hurts most comes first.
        images: What to run on.
        batch_size: Images per batch.
        measure: What the outputs are compared by.
        limits: What the verdict asks for.

    Returns:
        The layers (none if INT8 is what is asked for as it is) and how far from FP32 the network then is, in words, or
        None if one layer alone in INT8 still loses too much.
    """
    full = IntegerNetwork(plan)
    for count in range(len(ranked)):
        keep = list(ranked[:count])
        networks = [_as_compiled(network.module.forward), _as_compiled(full.only(plan.layers - set(keep)))]
        with torch.inference_mode():
            stream = tracked(images.batches(batch_size), len(images), f"keeping {count} layers")
            labels, (reference, mixed) = run(networks, stream, measure)
        if passes(mixed, reference, labels, measure, limits):
            return keep, distance(mixed, reference, labels)
    return None


def analyse(
    network: Network,
    plan: Int8Plan,
    images: Sample,
    batch_size: int,
    measure: Measure,
    limits: Limits,
    passed: bool,
) -> Analysis:
    """Rank the layers, and where the verdict failed say which to keep in float.

    Args:
        network: The float network.
        plan: Its INT8 layers.
        images: What to run on.
        batch_size: Images per batch.
        measure: What the outputs are compared by.
        limits: Of the verdict.
        passed: Whether INT8 was within them.
    """
    found = sensitivities(network, plan, images, batch_size, measure)
    suggestion: list[str] = []
    if not found.layers:
        advice = "No layer of this network runs in INT8."
    elif passed:
        worst = found.layers[0]
        advice = "INT8 is within the tolerance: no layer needs higher precision."
        if worst.noise_share > 0:
            advice += f" {worst.layer} makes the largest part of the noise in the outputs ({worst.noise_share:.0f} %)."
    else:
        ranked = [layer.layer for layer in found.layers]
        kept = layers_to_keep(network, plan, ranked, images, batch_size, measure, limits)
        suggestion, advice = _advice(kept, len(images))
    return Analysis(found.images, ENGINE, found.layers, suggestion, advice)


def _advice(kept: tuple[list[str], str] | None, images: int) -> tuple[list[str], str]:
    if kept is None:
        return [], (
            "No choice of layers to keep in float makes INT8 pass: calibrate with more images or "
            "another algorithm, or train longer."
        )
    layers, left = kept
    if not layers:
        return [], (
            f"The exact integer arithmetic passes ({left} on {images:,} images): what is lost comes from the engine or "
            "from the images left out here, not from the scales."
        )
    names = ",".join(layers)
    return layers, (
        f"Keep {', '.join(layers)} in higher precision: INT8 is then {left} on {images:,} images. "
        f"Apply it with: quantize.py --keep-fp {names}"
    )


def changed_images(
    source: ImageSet,
    first: int,
    labels: Tensor,
    predictions: Mapping[PrecisionName, Predictions],
    preprocessing: Preprocessing,
    limit: int = 24,
) -> tuple[list[ChangedImage], dict[str, int]]:
    """Images whose prediction changed from FP32 to another precision, with pictures: (images, how many in all).

    Those that FP32 gets right come first, then those that it gets wrong and the other right, then the rest.

    Args:
        source: All images of the split, those outside the evaluation too.
        first: Position of the first evaluated image.
        labels: int64 [N], of the evaluated images.
        predictions: Of every precision that ran, FP32 among them.
        preprocessing: Undone for the pictures.
        limit: Most images per precision.
    """
    reference = predictions["fp32"]
    shown: list[ChangedImage] = []
    totals: dict[str, int] = {}
    for precision, ours in predictions.items():
        if precision == "fp32":
            continue
        positions = (ours.predicted != reference.predicted).nonzero().flatten()
        totals[precision] = len(positions)
        right, wrong = reference.correct(labels)[positions], ~ours.correct(labels)[positions]
        rank = torch.where(right, 0, torch.where(wrong, 2, 1))
        chosen = positions[rank.argsort(stable=True)][:limit]
        if not len(chosen):
            continue
        for position, image in zip(chosen.tolist(), source.images(chosen + first), strict=True):
            label = int(labels[position])
            before, after = int(reference.predicted[position]), int(ours.predicted[position])
            shown.append(
                ChangedImage(
                    index=first + position,
                    label=label,
                    precision=precision,
                    change="lost" if before == label else "gained" if after == label else "other",
                    fp32=before,
                    fp32_confidence=float(reference.confidence[position]),
                    predicted=after,
                    confidence=float(ours.confidence[position]),
                    picture=data_uri(image, preprocessing),
                )
            )
    return shown, totals


def data_uri(image: Tensor, preprocessing: Preprocessing, largest: int = 112) -> str:
    """An image as a PNG in a data URI, its normalisation undone; larger ones are reduced to ``largest`` pixels.

    Args:
        image: float32 [C, H, W], as the network gets it.
        preprocessing: What was done to it.
        largest: Longer side of the picture, pixels.
    """
    from PIL import Image

    if preprocessing.transform is not None:
        # What an own transform did cannot be undone: from its darkest to its brightest value.
        low, high = float(image.min()), float(image.max())
        image = (image - low) / (high - low if high > low else 1.0)
    if preprocessing.std:
        image = image * torch.tensor(preprocessing.std).reshape(-1, 1, 1)
    if preprocessing.mean:
        image = image + torch.tensor(preprocessing.mean).reshape(-1, 1, 1)
    pixels = (image / preprocessing.scale).round().clamp(0, 255).to(torch.uint8)
    array = pixels[0].numpy() if len(pixels) != 3 else pixels.permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(array)
    picture.thumbnail((largest, largest))
    stream = io.BytesIO()
    picture.save(stream, "png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
