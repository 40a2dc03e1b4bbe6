import gzip
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.errors import InputError
from data import mnist
from data.locate import NotAvailableError
from data.mnist import DIMENSIONS, FASHION_MNIST, MNIST, find_or_download, load
from tests.data.sets import idx_bytes, write_set


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("separator", ["-", "."])
@pytest.mark.parametrize("subfolder", [".", "MNIST/raw"])
def test_every_accepted_layout(tmp_path, suffix, separator, subfolder):
    write_set(tmp_path / subfolder, suffix=suffix, separator=separator)
    assert find_or_download(MNIST, tmp_path, download=False) == tmp_path
    loaded = load(MNIST, tmp_path)
    assert loaded.train.pixels.shape == (60, 28, 28)
    assert loaded.train.pixels.dtype == torch.uint8
    assert loaded.test.labels.dtype == torch.int64
    assert loaded.test.labels.tolist() == [*range(10)] * 2
    assert "not the published MNIST: they hold 60 + 20 images" in loaded.notes[0]


def test_fashion_is_found_where_torchvision_puts_it(tmp_path):
    write_set(tmp_path / "FashionMNIST" / "raw")
    assert len(load(FASHION_MNIST, tmp_path).train.labels) == 60


def test_what_is_missing_is_named(tmp_path):
    write_set(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(InputError, match=r"lacks t10k-labels-idx1-ubyte\[\.gz\]"):
        load(MNIST, tmp_path)
    with pytest.raises(InputError, match=r"lacks t10k-labels-idx1-ubyte\[\.gz\]"):
        find_or_download(MNIST, tmp_path, download=True)


def test_folder_of_nvidias_samples(tmp_path, isolated, monkeypatch):
    write_set(tmp_path / "samples" / "mnist")
    monkeypatch.setenv("TRT_DATADIR", str(tmp_path / "samples"))
    assert find_or_download(MNIST, None, download=False) == tmp_path / "samples" / "mnist"
    with pytest.raises(NotAvailableError):
        find_or_download(FASHION_MNIST, None, download=False)


def test_variable_and_default_folder(tmp_path, isolated, monkeypatch):
    with pytest.raises(NotAvailableError, match=r"MNIST was not found, .*data\.dir or MNIST_DIR"):
        find_or_download(MNIST, None, download=False)
    default = write_set(isolated / "int8-workflow" / "mnist")
    assert find_or_download(MNIST, None, download=False) == default
    monkeypatch.setenv("MNIST_DIR", str(write_set(tmp_path / "named")))
    assert find_or_download(MNIST, None, download=False) == tmp_path / "named"


def swap(folder: Path, one: str, other: str) -> None:
    (folder / one).rename(folder / "third")
    (folder / other).rename(folder / one)
    (folder / "third").rename(folder / other)


def too_large(folder: Path) -> None:
    write_set(folder, size=32)


def out_of_range(folder: Path) -> None:
    labels = torch.arange(20, dtype=torch.uint8) % 10
    labels[13] = 10
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(labels))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: swap(folder, "train-labels-idx1-ubyte", "train-images-idx3-ubyte"),
            r"train-images.* holds labels .*swapped",
        ),
        (
            lambda folder: swap(folder, "train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte"),
            r"train-images.* holds 60 images but .*train-labels.* 20 labels",
        ),
        (too_large, r"train-images.* 32 x 32 pixels, not 28 x 28"),
        (out_of_range, r"t10k-labels.* the label 10, outside 0 to 9 \(first at position 13\)"),
    ],
)
def test_files_that_do_not_fit(tmp_path, damage, message):
    damage(write_set(tmp_path))
    with pytest.raises(InputError, match=message):
        load(MNIST, tmp_path)


@pytest.fixture
def published(tmp_path, monkeypatch) -> Path:
    """A small set whose digests and counts count as the published ones."""
    folder: Path = write_set(tmp_path / "published")
    digests = dict(zip(DIMENSIONS, load(MNIST, folder).digests, strict=True))
    monkeypatch.setattr(mnist, "MNIST", replace(MNIST, sha256=digests))
    monkeypatch.setattr(mnist, "COLLECTIONS", (mnist.MNIST, FASHION_MNIST))
    monkeypatch.setattr(mnist, "PUBLISHED_COUNTS", {"train": 60, "t10k": 20})
    return folder


def test_published_files_need_no_note(published):
    assert load(mnist.MNIST, published).notes == ()


@pytest.mark.parametrize("part", DIMENSIONS)
def test_one_changed_byte_is_found_and_named(published, part):
    path = next(published.glob(f"{part}*"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{part}.* has the size of MNIST's {part} but other content"):
        load(mnist.MNIST, published)


def test_swapped_splits_are_found_by_their_digests(published):
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        swap(published, f"train-{kind}", f"t10k-{kind}")
    with pytest.raises(InputError, match=r"train-images.* holds the content of t10k-images: are two files swapped"):
        load(mnist.MNIST, published)


def test_another_data_set_is_named(published):
    with pytest.raises(InputError, match=r"belongs to MNIST, not to Fashion-MNIST: set data\.dataset to mnist"):
        load(FASHION_MNIST, published)


class FakeDownload:
    """Stands in for torchvision's data set: copies a folder to where torchvision would put it."""

    source: Path | None = None
    roots: list[Path]

    def __init__(self, root: str, download: bool) -> None:
        assert download
        type(self).roots.append(Path(root))
        target = Path(root) / "MNIST" / "raw"
        shutil.copytree(self.source, target)
        for path in list(target.iterdir()):
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))


@pytest.fixture
def fake_download(isolated, monkeypatch):
    from torchvision import datasets

    fake = type("Fake", (FakeDownload,), {"roots": []})
    monkeypatch.setattr(datasets, "MNIST", fake)
    return fake


def test_download_is_checked_and_moved_into_place(fake_download, published, isolated):
    fake_download.source = published
    folder = find_or_download(mnist.MNIST, None, download=True)
    assert folder == isolated / "int8-workflow" / "mnist"
    assert len(list(folder.iterdir())) == 4
    assert load(mnist.MNIST, folder).notes == ()
    assert [path.name for path in folder.parent.iterdir()] == ["mnist"]
    find_or_download(mnist.MNIST, None, download=True)
    assert len(fake_download.roots) == 1


def test_corrupt_download_is_refused_and_leaves_nothing(fake_download, published, isolated):
    (published / "t10k-labels-idx1-ubyte").write_bytes(b"<html>login</html>")
    fake_download.source = published
    with pytest.raises(InputError, match="is not an idx file"):
        find_or_download(mnist.MNIST, None, download=True)
    assert list((isolated / "int8-workflow").iterdir()) == []


def test_incomplete_default_folder_is_completed(fake_download, published, isolated):
    default = isolated / "int8-workflow" / "mnist"
    default.mkdir(parents=True)
    shutil.copy(published / "train-images-idx3-ubyte", default)
    fake_download.source = published
    assert find_or_download(mnist.MNIST, None, download=True) == default
    assert len(list(default.iterdir())) == 4


def test_no_download_without_leave_or_for_a_named_folder(fake_download, published, tmp_path):
    fake_download.source = published
    with pytest.raises(NotAvailableError, match=r"data\.download is off"):
        find_or_download(mnist.MNIST, None, download=False)
    with pytest.raises(InputError, match="is not a folder"):
        find_or_download(mnist.MNIST, tmp_path / "absent", download=True)
    assert fake_download.roots == []


def test_the_real_files(mnist_dir):
    loaded = load(MNIST, mnist_dir)
    assert loaded.notes == ()
    assert loaded.digests == tuple(MNIST.sha256.values())
    assert torch.bincount(loaded.train.labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert len(loaded.test.labels) == 10_000
    with pytest.raises(InputError, match=r"belongs to MNIST, not to Fashion-MNIST"):
        load(FASHION_MNIST, mnist_dir)
