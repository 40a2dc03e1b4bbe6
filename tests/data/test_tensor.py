import pytest
import torch

from data import Preprocessing, TensorImages, batches
from data.tensor import Selection

PLAIN = Preprocessing(channels=1, height=4, width=3)
COLOUR = Preprocessing(channels=3, height=4, width=3, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.5))


def make(count: int, preprocessing: Preprocessing) -> TensorImages:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, *preprocessing.shape), dtype=torch.uint8, generator=generator)
    return TensorImages(pixels, torch.arange(count), preprocessing)


def test_mean_and_deviation_are_per_channel():
    source = make(5, COLOUR)
    mean, std = torch.tensor(COLOUR.mean), torch.tensor(COLOUR.std)
    expected = (source.pixels.double() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    assert torch.allclose(source.images(slice(0, 5)).double(), expected, atol=1e-6)


def test_slice_and_positions_agree():
    source = make(10, COLOUR)
    assert torch.equal(source.images(slice(2, 6)), source.images(torch.arange(2, 6)))
    assert torch.equal(
        source.images(torch.tensor([7, 1])), torch.cat([source.images(slice(7, 8)), source.images(slice(1, 2))])
    )


def test_stored_pixels_are_never_written():
    source = make(4, PLAIN)
    before = source.pixels.clone()
    source.images(slice(0, 4)).zero_()
    assert torch.equal(source.pixels, before)


def test_one_channel_may_be_left_out():
    source = TensorImages(torch.zeros(2, 4, 3, dtype=torch.uint8), torch.zeros(2), PLAIN)
    assert source.images(slice(0, 2)).shape == (2, 1, 4, 3)


@pytest.mark.parametrize(
    ("pixels", "labels"),
    [
        (torch.zeros(2, 1, 4, 3), torch.zeros(2)),
        (torch.zeros(2, 1, 3, 4, dtype=torch.uint8), torch.zeros(2)),
        (torch.zeros(2, 3, 4, 3, dtype=torch.uint8), torch.zeros(2)),
        (torch.zeros(2, 1, 4, 3, dtype=torch.uint8), torch.zeros(3)),
    ],
    ids=["type", "size", "channels", "labels"],
)
def test_what_does_not_fit_is_refused(pixels, labels):
    with pytest.raises(ValueError, match=r"images|pixels"):
        TensorImages(pixels, labels, PLAIN)


def test_selection_keeps_its_order():
    source = make(10, PLAIN)
    chosen = Selection(source, torch.tensor([8, 3, 5]))
    assert len(chosen) == 3
    assert chosen.labels.tolist() == [8, 3, 5]
    assert torch.equal(chosen.images(slice(1, 3)), source.images(torch.tensor([3, 5])))
    assert torch.equal(chosen.images(torch.tensor([0])), source.images(torch.tensor([8])))
    assert chosen.preprocessing is source.preprocessing


@pytest.mark.parametrize(
    ("start", "count", "expected"),
    [(0, None, list(range(10))), (1, 1, [4, 5, 6, 7]), (2, 5, [8, 9]), (3, None, []), (0, 0, [])],
)
def test_batches_in_order_to_skip_and_to_give(start, count, expected):
    source = make(10, PLAIN)
    given = list(batches(source, 4, start, count))
    assert [label for _, labels in given for label in labels.tolist()] == expected
    for images, labels in given:
        assert torch.equal(images, source.images(labels))
