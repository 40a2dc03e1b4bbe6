"""The studies that ``quantize.py`` was asked for: which algorithm, how many images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from calib.algorithms import ALGORITHMS
from common.config import AlgorithmName, Config
from common.console import print_table
from common.errors import InputError
from evaluation.studies import Outcome, SweepPoint, compare_algorithms, sweep_images
from evaluation.subject import TrainedRun


@dataclass(frozen=True)
class Studied:
    """What the studies found, on the validation images.

    Attributes:
        run: Name of the run, which they left as it was.
        network: Name of its network.
        seed: Of the first calibration; those of a sweep count up from it.
        algorithms: What each algorithm gives.
        sweep: What each number of images gives.
    """

    run: str
    network: str
    seed: int
    algorithms: dict[AlgorithmName, Outcome] | None
    sweep: list[SweepPoint] | None

    def summary(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        found: dict[str, Any] = {"run": self.run, "network": self.network, "seed": self.seed, "split": "validation"}
        if self.algorithms is not None:
            found["algorithms"] = {name: asdict(outcome) for name, outcome in self.algorithms.items()}
        if self.sweep is not None:
            found["sweep"] = [
                {
                    "images": point.images,
                    "spread": point.spread,
                    "outcomes": [asdict(outcome) for outcome in point.outcomes],
                }
                for point in self.sweep
            ]
        return found

    def show(self) -> None:
        """Print it; differences are to FP32."""
        if self.algorithms is not None:
            _show_algorithms(self.algorithms)
        if self.sweep is not None:
            _show_sweep(self.sweep)


def study(trained: TrainedRun, config: Config, algorithms: str | None, counts: str | None, seeds: int) -> Studied:
    """Run the studies that were asked for; nothing of the run changes.

    Args:
        trained: The network with its data, whose validation images are taken.
        config: How to calibrate, and which layers stay in float.
        algorithms: To compare, as in ``entropy2,minmax``; None for no such study.
        counts: Numbers of images, as in ``50,100,500``; None for no such study.
        seeds: Calibrations for each number of images.

    Raises:
        InputError: an unknown algorithm, or a number of images that is not one.
    """
    network, quantization, seed = trained.network, config.quantization, config.seed
    data, measure = trained.data(config), trained.measure
    compared = sweep = None
    if algorithms:
        names = [name.strip() for name in algorithms.split(",")]
        for name in names:
            if name not in ALGORITHMS:
                raise InputError(f"unknown algorithm {name!r}: take some of {', '.join(ALGORITHMS)}")
        compared = compare_algorithms(network, data, config.calibration, quantization, seed, names, measure)
    if counts:
        if not all(part.strip().isdecimal() and int(part) > 0 for part in counts.split(",")) or seeds < 1:
            raise InputError(f"--sweep-images takes numbers of images such as 50,100,500, not {counts!r}")
        numbers = [int(part) for part in counts.split(",")]
        several = range(seed, seed + seeds)
        sweep = sweep_images(network, data, config.calibration, quantization, numbers, several, measure)
    return Studied(config.run, network.name, seed, compared, sweep)


def _show_algorithms(outcomes: Mapping[AlgorithmName, Outcome]) -> None:
    classes = any(one.top1 is not None for one in outcomes.values())
    rows = [
        (name, *((_percent(one.top1), _signed(one.points), _percent(one.changed)) if classes else ()), _decibels(one))
        for name, one in outcomes.items()
    ]
    columns = ("algorithm", *(("top-1", "points", "changed") if classes else ()), "SQNR")
    print_table("algorithms, INT8 on the validation images", columns, rows)
    tensors = next(iter(outcomes.values())).scales
    scales = [(tensor, *(f"{one.scales[tensor]:.6g}" for one in outcomes.values())) for tensor in tensors]
    print_table("scales", ("tensor", *outcomes), scales)


def _show_sweep(points: Sequence[SweepPoint]) -> None:
    rows = []
    for point in points:
        spread = point.spread
        worst = max(spread, key=spread.__getitem__)
        rows.append((f"{point.images}", *_over_the_seeds(point), f"{100 * spread[worst]:.2f} % ({worst})"))
    classes = points[0].outcomes[0].top1 is not None
    measured = ("top-1, mean", "over the seeds", "changed, most") if classes else ("SQNR, least",)
    columns = ("images", *measured, "largest spread of a scale")
    print_table("numbers of calibration images, INT8 on the validation images", columns, rows)


def _over_the_seeds(point: SweepPoint) -> tuple[str, ...]:
    top1 = [one.top1 for one in point.outcomes if one.top1 is not None]
    if not top1:
        return (_decibels(min(point.outcomes, key=lambda one: math.inf if one.sqnr_db is None else one.sqnr_db)),)
    changed = max(one.changed for one in point.outcomes if one.changed is not None)
    return f"{sum(top1) / len(top1):.2f} %", f"{min(top1):.2f} to {max(top1):.2f} %", f"{changed:.2f} %"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} %"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"


def _decibels(outcome: Outcome) -> str:
    return "-" if outcome.sqnr_db is None else f"{outcome.sqnr_db:.1f} dB"
