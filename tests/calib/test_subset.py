"""The representative subset."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calib.subset import select
from common.errors import InputError

LABELS = torch.arange(1000) % 10


def test_stratified_takes_every_class_in_its_share() -> None:
    subset = select(LABELS, 10)
    assert torch.equal(torch.bincount(LABELS[subset.positions]), torch.full((10,), 50))
    assert len(subset.positions.unique()) == 500
    assert [len(batch) for batch in subset.batches] == [50] * 10


def test_the_seed_alone_decides() -> None:
    assert torch.equal(select(LABELS, 10, seed=3).positions, select(LABELS, 10, seed=3).positions)
    assert not torch.equal(select(LABELS, 10, seed=3).positions, select(LABELS, 10, seed=4).positions)


def test_first_with_one_batch_skipped_is_sample_int8s_choice() -> None:
    subset = select(LABELS, 10, "first", batches=10, batch_size=50, skip=1)
    assert torch.equal(subset.positions, torch.arange(50, 550))


def test_random_takes_no_image_twice() -> None:
    positions = select(LABELS, 10, "random", batches=20, batch_size=50).positions
    assert torch.equal(positions.sort().values, torch.arange(1000))


@given(
    sizes=st.lists(st.integers(1, 60), min_size=2, max_size=8),
    share=st.floats(0.05, 1.0),
    seed=st.integers(0, 2**31),
)
def test_stratified_is_full_unique_and_covers_every_class(sizes: list[int], share: float, seed: int) -> None:
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    wanted = max(len(sizes), int(share * len(labels)))
    subset = select(labels, len(sizes), batches=1, batch_size=wanted, seed=seed)
    counts = torch.bincount(labels[subset.positions], minlength=len(sizes))
    assert len(subset.positions.unique()) == len(subset.positions) == wanted
    assert bool((counts >= 1).all())
    assert bool((counts <= torch.tensor(sizes)).all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": 21}, "needs 1050 images .* but there are 1000"),
        ({"strategy": "first", "batches": 20, "skip": 1}, "needs 1050 images .* after 1 skipped"),
        ({"skip": 1}, "goes with the subset 'first'"),
        ({"batches": 1, "batch_size": 5}, "no image of class"),
        ({"strategy": "first", "batches": 1, "batch_size": 9}, "no image of class 9"),
        ({"num_classes": 11}, "no image of class 10"),
    ],
)
def test_impossible_subsets_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        select(LABELS, **{"num_classes": 10, **arguments})  # type: ignore[arg-type]


def test_data_sets_with_very_many_classes_may_lack_some() -> None:
    labels = torch.arange(4000) % 1000
    assert len(select(labels, 1000).positions) == 500
