import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.errors import InputError
from data import Preprocessing, TensorImages
from data.augment import Affine
from data.loaders import EvaluationLoader, TrainLoader

SHAPE = Preprocessing(channels=1, height=2, width=2)


def make(count: int) -> TensorImages:
    """Images whose four pixels are their position, so that an image and its label can be matched."""
    position = torch.arange(count)
    pixels = torch.stack([position // 256, position % 256], 1).repeat(1, 2).view(count, 1, 2, 2).to(torch.uint8)
    return TensorImages(pixels, position, SHAPE)


def labels_of(loader) -> list[list[int]]:
    return [labels.tolist() for _, labels in loader]


def test_an_epoch_gives_each_image_at_most_once_in_full_batches():
    loader = TrainLoader(make(1003), 10, seed=1)
    given_labels = labels_of(loader)
    assert len(loader) == len(given_labels) == 100
    assert {len(batch) for batch in given_labels} == {10}
    flat = [label for batch in given_labels for label in batch]
    assert len(set(flat)) == 1000
    assert flat != sorted(flat)


def test_images_belong_to_their_labels():
    source = make(700)
    for images, labels in TrainLoader(source, 64, seed=3):
        assert torch.equal(images, source.images(labels))
    for images, labels in EvaluationLoader(source, 64):
        assert torch.equal(images, source.images(labels))


def test_order_depends_on_seed_and_epoch_alone():
    loader = TrainLoader(make(100), 10, seed=1)
    first = labels_of(loader)
    assert labels_of(loader) == first
    loader.set_epoch(1)
    second = labels_of(loader)
    assert second != first
    loader.set_epoch(0)
    assert labels_of(loader) == first
    other = TrainLoader(make(100), 10, seed=2)
    assert labels_of(other) not in (first, second)


@pytest.mark.parametrize("done", [1, 7, 60, 100])
def test_an_interrupted_epoch_goes_on_exactly(done, monkeypatch):
    # Several chunks of several batches each.
    monkeypatch.setattr("data.loaders._CHUNK_VALUES", 4 * 10 * 8)
    loader = TrainLoader(make(1000), 10, seed=5, augment=Affine())
    loader.set_epoch(2)
    whole = list(loader)
    interrupted = TrainLoader(make(1000), 10, seed=5, augment=Affine())
    interrupted.set_epoch(2)
    iterator = iter(interrupted)
    for _ in range(done):
        next(iterator)
    resumed = TrainLoader(make(1000), 10, seed=5, augment=Affine())
    resumed.load_state_dict(interrupted.state_dict())
    resumed.set_epoch(2)
    rest = list(resumed)
    assert len(rest) == 100 - done
    for (images, labels), (expected_images, expected_labels) in zip(rest, whole[done:], strict=True):
        assert torch.equal(images, expected_images)
        assert torch.equal(labels, expected_labels)
    assert len(list(resumed)) == 100


def test_a_position_is_forgotten_in_another_epoch():
    loader = TrainLoader(make(100), 10, seed=1)
    loader.load_state_dict({"epoch": 3, "next": 10})
    loader.set_epoch(4)
    assert len(list(loader)) == 10


def test_augmentation_changes_images_not_labels():
    source = make(100)
    plain, augmented = TrainLoader(source, 10, seed=1), TrainLoader(source, 10, seed=1, augment=Affine())
    for (images, labels), (changed, same) in zip(plain, augmented, strict=True):
        assert torch.equal(labels, same)
        assert not torch.equal(images, changed)
    assert torch.equal(next(iter(augmented))[0], next(iter(augmented))[0])


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_an_epoch(processes):
    loaders = [TrainLoader(make(200), 8, 1, Affine(), rank, processes) for rank in range(processes)]
    assert {len(loader) for loader in loaders} == {200 // (8 * processes)}
    flat = [label for loader in loaders for batch in labels_of(loader) for label in batch]
    assert len(flat) == len(set(flat)) == 8 * processes * len(loaders[0])
    # Together they take the very images and transforms of one process with batches of the whole step's size.
    alone = TrainLoader(make(200), 8 * processes, 1, Affine())
    for (images, labels), *parts in zip(alone, *loaders, strict=True):
        assert torch.equal(labels, torch.cat([part for _, part in parts]))
        assert torch.allclose(images, torch.cat([part for part, _ in parts]), atol=1e-6)


def test_too_few_images_for_one_batch():
    with pytest.raises(InputError, match=r"9 training images do not fill one batch of 10 .*data\.batch_size"):
        TrainLoader(make(9), 10, seed=1)
    with pytest.raises(InputError, match="2 images cannot be shared by 3 processes"):
        EvaluationLoader(make(2), 10, 0, 3)


@given(
    count=st.integers(1, 300),
    batch_size=st.integers(1, 50),
    processes=st.integers(1, 5),
)
def test_evaluation_gives_every_image_once_whatever_the_processes(count, batch_size, processes):
    if count < processes:
        return
    loaders = [EvaluationLoader(make(count), batch_size, rank, processes) for rank in range(processes)]
    shares = [labels_of(loader) for loader in loaders]
    assert [label for share in shares for batch in share for label in batch] == list(range(count))
    assert {len(share) for share in shares} == {len(loaders[0])}
    assert all(1 <= len(batch) <= max(batch_size, 2) for share in shares for batch in share)
