"""Networks that give no class: how far the outputs of each precision are from FP32's, and from the data's targets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from common.config import Task
from common.errors import InputError
from engines.base import Compiled, Outputs
from evaluation.measures import OutputFigures, TargetError
from evaluation.running import Collector, sqnr_db


@dataclass(frozen=True)
class Values:
    """Outputs are compared by their values (:class:`evaluation.running.Measure`).

    Attributes:
        task: ``regress``, ``embed`` or ``detect``.
        names: What the model calls its outputs.
    """

    task: Task
    names: tuple[str, ...]

    def collector(self, network: Compiled) -> ValueCollector:
        """See :class:`evaluation.running.Measure`."""
        return ValueCollector(self, f"{network.engine} {network.precision}")


@dataclass(frozen=True)
class OutputErrors:
    """One output over all images.

    Attributes:
        shape: Of one image's value.
        cosines: Cosine similarity to FP32's value, float64 [N]; NaN where one of them is all zero.
        count: Numbers compared.
        signal: Sum of squares of FP32's values.
        noise: Sum of squares of the difference.
        distance: Sum of the absolute differences.
        non_finite: Images with a NaN or an infinity; they are in nothing else.
        values: float32 [N, K], of regression alone; empty otherwise.
    """

    shape: tuple[int, ...]
    cosines: Tensor
    count: int
    signal: float
    noise: float
    distance: float
    non_finite: int
    values: Tensor


@dataclass(frozen=True)
class OutputsFound:
    """What one network gave for all images (:class:`evaluation.running.Found`).

    Attributes:
        names: What the model calls its outputs.
        errors: One for each.
    """

    names: tuple[str, ...]
    errors: tuple[OutputErrors, ...]

    @property
    def noise(self) -> float:
        """See :class:`evaluation.running.Found`."""
        return math.fsum(error.noise / error.signal for error in self.errors if error.signal > 0)

    @property
    def sqnr_db(self) -> float | None:
        """The least of the outputs'."""
        found = [ratio for error in self.errors if (ratio := sqnr_db(error.signal, error.noise)) is not None]
        return min(found, default=None)

    @property
    def non_finite(self) -> int:
        """See :class:`evaluation.running.Found`."""
        return max(error.non_finite for error in self.errors)


class ValueCollector:
    """Gathers how far one network's outputs are from the reference's.

    Args:
        measure: The task, and the outputs' names.
        title: Of the network, for errors.
    """

    def __init__(self, measure: Values, title: str) -> None:
        self._measure = measure
        self._title = title
        self._outputs = [_OutputCollector(measure.task == "regress") for _ in measure.names]

    def add(self, outputs: Outputs, reference: Outputs, labels: Tensor) -> None:
        """Take one batch.

        Raises:
            InputError: the network gives another number of outputs, or others than the reference.
        """
        shapes, expected = [tuple(item.shape) for item in outputs], [tuple(item.shape) for item in reference]
        if len(outputs) != len(self._outputs) or shapes != expected:
            raise InputError(f"{self._title} gives outputs of shape {shapes} where FP32 gives {expected}")
        for collector, output, truth in zip(self._outputs, outputs, reference, strict=True):
            collector.add(output, truth, len(labels))

    def found(self, parts: Sequence[Collector]) -> OutputsFound:
        """See :class:`evaluation.running.Collector`."""
        collectors = cast("Sequence[ValueCollector]", parts)
        grouped = zip(*(collector._outputs for collector in collectors), strict=True)
        return OutputsFound(self._measure.names, tuple(_merged(group) for group in grouped))


class _OutputCollector:
    """One output; ``keep`` keeps its values, for what is known only when all images have been seen."""

    def __init__(self, keep: bool) -> None:
        self.keep = keep
        self.shape: tuple[int, ...] = ()
        self.cosines: list[Tensor] = []
        self.values: list[Tensor] = []
        self.signal: list[float] = []
        self.noise: list[float] = []
        self.distance: list[float] = []
        self.count = 0
        self.non_finite = 0

    def add(self, output: Tensor, reference: Tensor, images: int) -> None:
        per_image = output.dim() > 0 and len(output) == images
        # An output that belongs to no image, such as anchors, is one row.
        ours, truth = (item.reshape(images if per_image else 1, -1).float() for item in (output, reference))
        self.shape = tuple(output.shape[1:] if per_image else output.shape)
        if self.keep:
            self.values.append(ours)
        finite = ours.isfinite().all(dim=1) & truth.isfinite().all(dim=1)
        self.non_finite += int((~finite).sum())
        ours, truth = ours[finite].double(), truth[finite].double()
        energies = ours.square().sum(dim=1) * truth.square().sum(dim=1)
        cosines = (ours * truth).sum(dim=1) / energies.sqrt()
        self.cosines.append(torch.where(energies > 0, cosines.clamp(-1, 1), torch.nan))
        self.signal.append(float(truth.square().sum()))
        self.noise.append(float((truth - ours).square().sum()))
        self.distance.append(float((truth - ours).abs().sum()))
        self.count += ours.numel()


def _merged(parts: Sequence[_OutputCollector]) -> OutputErrors:
    values = [item for part in parts for item in part.values]
    return OutputErrors(
        shape=parts[0].shape,
        cosines=torch.cat([item for part in parts for item in part.cosines]),
        count=sum(part.count for part in parts),
        # Rounded once, so that the sums are the same however the batches were shared.
        signal=math.fsum(item for part in parts for item in part.signal),
        noise=math.fsum(item for part in parts for item in part.noise),
        distance=math.fsum(item for part in parts for item in part.distance),
        non_finite=sum(part.non_finite for part in parts),
        values=torch.cat(values) if values else torch.empty(0),
    )


def output_figures(found: OutputsFound, reference: OutputsFound) -> list[OutputFigures]:
    """The figures of each output of one precision against FP32's."""
    return [
        OutputFigures(
            name=name,
            shape=list(ours.shape),
            cosine=_mean(ours.cosines),
            least_cosine=_least(ours.cosines),
            sqnr_db=sqnr_db(ours.signal, ours.noise),
            mse=ours.noise / max(1, ours.count),
            mae=ours.distance / max(1, ours.count),
            relative_error=relative_error(ours.values, truth.values) if len(ours.values) else None,
            non_finite=ours.non_finite,
        )
        for name, ours, truth in zip(found.names, found.errors, reference.errors, strict=True)
    ]


def target_error(found: OutputsFound, targets: Tensor) -> TargetError | None:
    """How far a regression network is from the targets, float32 [N, K]; None where its outputs are not finite.

    An image whose output is not finite is left out.
    """
    values = found.errors[0].values.double()
    finite = values.isfinite().all(dim=1)
    values, truth = values[finite], targets.double()[finite]
    relative = relative_error(values, truth) if len(values) else None
    if relative is None:
        return None
    difference = values - truth
    return TargetError(float(difference.square().mean()), float(difference.abs().mean()), relative)


def relative_error(values: Tensor, truth: Tensor) -> float | None:
    """Root mean squared error over the standard deviation of ``truth``, percent; of several columns, their root mean.

    Where ``truth`` is the same for all rows, its magnitude takes the place of its deviation. None where it is zero.

    Args:
        values: [N, K]; a row that is not finite is left out.
        truth: [N, K].
    """
    finite = values.isfinite().all(dim=1) & truth.isfinite().all(dim=1)
    values, truth = values[finite].double(), truth[finite].double()
    if not len(values):
        return None
    error = (values - truth).square().mean(dim=0)
    spread = truth.var(dim=0, unbiased=False)
    magnitude = truth.square().mean(dim=0)
    # Equal float32 values have a variance of rounding.
    spread = torch.where(spread > 1e-12 * magnitude, spread, magnitude)
    if bool(((spread == 0) & (error > 0)).any()):
        return None
    ratios = torch.where(spread > 0, error / spread, 0.0)
    return 100 * math.sqrt(float(ratios.mean()))


def _mean(cosines: Tensor) -> float | None:
    value = float(cosines.mean()) if len(cosines) else math.nan
    return None if math.isnan(value) else value


def _least(cosines: Tensor) -> float | None:
    value = float(cosines.min()) if len(cosines) else math.nan
    return None if math.isnan(value) else value
