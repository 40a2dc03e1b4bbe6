from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.timing import in_turns, ratio, spread, timed, timed_often


def recorder(calls: list[str], name: str, figures: list[float]):
    def measure() -> float:
        calls.append(name)
        return figures[sum(call == name for call in calls) - 1]

    return measure


def test_every_round_begins_with_another_contestant_and_the_warm_up_does_not_count():
    calls: list[str] = []
    contestants = {name: recorder(calls, name, [9.0, 1.0, 2.0, 3.0]) for name in "abc"}

    figures = in_turns(contestants, 3)

    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert figures == {name: [1.0, 2.0, 3.0] for name in "abc"}


def test_slow_contestants_take_part_in_the_first_rounds_alone():
    calls: list[str] = []
    contestants = {name: recorder(calls, name, [1.0] * 5) for name in "ab"}

    figures = in_turns(contestants, 3, slow={"b": 1})

    assert "".join(calls) == "a" + "ab" + "a" + "a"
    assert (len(figures["a"]), len(figures["b"])) == (3, 1)


def test_times_are_those_of_the_clock(monkeypatch: pytest.MonkeyPatch):
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    durations = iter([100.0, 2.0, 4.0, 3.0])

    def call() -> None:
        clock[0] += next(durations)

    assert timed(call)() == 100.0
    assert timed_often(call, seconds=3.0)() == 4.0  # 2.0 is the first of the turn; 4.0 ends it


def test_a_turn_has_at_least_one_time_and_gives_the_median(monkeypatch: pytest.MonkeyPatch):
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    durations = iter([7.0, 1.0, 5.0, 2.0, 2.0])

    def call() -> None:
        clock[0] += next(durations)

    assert timed_often(call, seconds=9.5)() == 2.0


@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=30))
def test_spread_is_ordered(figures: list[float]):
    one = spread(figures, 1000)

    assert one.runs == len(figures)
    assert one.values == [1000 * figure for figure in figures]
    ordered = [one.minimum, one.lower_quartile, one.median, one.upper_quartile, one.maximum]
    assert all(low <= high * (1 + 1e-12) for low, high in pairwise(ordered))
    assert (one.minimum, one.maximum) == (min(one.values), max(one.values))


def test_spread_interpolates():
    one = spread([4.0, 1.0, 2.0, 3.0])
    assert (one.lower_quartile, one.median, one.upper_quartile) == (1.75, 2.5, 3.25)


def test_ratios_are_taken_round_by_round():
    # The machine was three times as slow in the second round, which concerns both.
    assert ratio([2.0, 6.0, 2.2], [1.0, 3.0, 1.0]) == 2.0
    assert ratio([2.0, 8.0, 100.0], [1.0, 2.0]) == 3.0
