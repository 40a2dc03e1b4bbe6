"""Measuring in turns, so that a change of clock or of load hits everyone alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from benchmarks.results import Spread

TURN_SECONDS = 0.03
"""How long something short is repeated in one turn."""


def in_turns(
    contestants: Mapping[str, Callable[[], float]],
    rounds: int,
    slow: Mapping[str, int] | None = None,
    warm_up: bool = True,
) -> dict[str, list[float]]:
    """Measure every contestant once a round, each round beginning with another one.

    Args:
        contestants: Name -> a function that runs it once and returns the figure (:func:`timed` makes one).
        rounds: Number of rounds.
        slow: Contestants that take part in the first so many rounds alone.
        warm_up: Whether a round is run before the first one that counts; slow ones do not take part in it.

    Returns:
        The figures of each contestant, by round.
    """
    slow = slow or {}
    names = list(contestants)
    figures: dict[str, list[float]] = {name: [] for name in names}
    if warm_up:
        for name in names:
            if name not in slow:
                contestants[name]()
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            if number < slow.get(name, rounds):
                gc.collect()
                figures[name].append(contestants[name]())
    return figures


def timed(call: Callable[[], object]) -> Callable[[], float]:
    """A function that runs ``call`` once and returns the seconds."""

    def measure() -> float:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    return measure


def timed_often(call: Callable[[], object], seconds: float = TURN_SECONDS) -> Callable[[], float]:
    """A function that runs ``call`` for about ``seconds`` and returns the median of its times, in seconds.

    The first run of a turn, which finds the caches full of the others' data, does not count.
    """

    def measure() -> float:
        call()
        times: list[float] = []
        end = time.perf_counter() + seconds
        while not times or time.perf_counter() < end:
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        return statistics.median(times)

    return measure


def spread(figures: Sequence[float], factor: float = 1.0) -> Spread:
    """Median, extremes and quartiles (linear interpolation) of figures, each multiplied by ``factor``."""
    values = sorted(figure * factor for figure in figures)
    lower, upper = (values[0], values[0])
    if len(values) > 1:
        lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(
        runs=len(values),
        median=statistics.median(values),
        minimum=values[0],
        maximum=values[-1],
        lower_quartile=lower,
        upper_quartile=upper,
        values=[figure * factor for figure in figures],
    )


def ratio(figures: Sequence[float], reference: Sequence[float]) -> float:
    """Median of ``figures / reference``, round by round, over the rounds that both took part in."""
    return statistics.median(one / other for one, other in zip(figures, reference, strict=False))
