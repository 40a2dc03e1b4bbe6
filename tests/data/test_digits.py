import torch
import torch.nn.functional as F

from data import digits


def test_split_is_stratified_fixed_and_whole():
    train, test = digits.load()
    assert (len(train.labels), len(test.labels)) == (1442, 355)
    sizes = torch.bincount(torch.cat([train.labels, test.labels]))
    assert sizes.sum() == 1797
    assert torch.equal(torch.bincount(test.labels), sizes // 5)
    again = digits.load()[0]
    assert torch.equal(again.pixels, train.pixels)
    assert torch.equal(again.labels, train.labels)


def test_no_image_is_in_both_splits():
    train, test = digits.load()
    seen = {pixels.numpy().tobytes() for pixels in train.pixels}
    assert not any(pixels.numpy().tobytes() in seen for pixels in test.pixels)


def test_enlargement_is_bilinear():
    levels = torch.randint(0, 17, (50, 8, 8), generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(levels[:, None].double() * 255 / 16, size=(28, 28), mode="bilinear", align_corners=False)
    enlarged = digits.enlarge(levels)
    assert enlarged.dtype == torch.uint8
    # Half a level from rounding.
    assert (enlarged.double() - expected[:, 0]).abs().max() <= 0.5 + 1e-9
