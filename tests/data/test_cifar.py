import hashlib
import pickle
from pathlib import Path

import pytest
import torch
from torchvision.datasets import CIFAR10

from common.config import DataConfig
from common.errors import InputError
from data import cifar, open_data
from data.locate import NotAvailableError


@pytest.fixture
def published(tmp_path: Path, isolated: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small CIFAR-10 whose files count as the published ones: the folder above ``cifar-10-batches-py``."""
    root = tmp_path / "cifar"
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)

    def write(name: str, entry: dict[str, object]) -> list[str]:
        content = pickle.dumps(entry)
        (folder / name).write_bytes(content)
        return [name, hashlib.md5(content).hexdigest()]

    def batch(name: str) -> list[str]:
        pixels = torch.randint(0, 256, (20, 3072), dtype=torch.uint8, generator=generator).numpy()
        return write(name, {"data": pixels, "labels": [*range(10)] * 2})

    monkeypatch.setattr(CIFAR10, "train_list", [batch(f"data_batch_{number}") for number in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [batch("test_batch")])
    meta, md5 = write("batches.meta", {"label_names": list(cifar.CLASSES)})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": meta, "key": "label_names", "md5": md5})
    return root


def test_opens_in_memory_normalised(published):
    data = open_data(DataConfig(dataset="cifar10", dir=published, validation=10), seed=1)
    assert (len(data.train_file), len(data.train), len(data.test)) == (100, 90, 20)
    assert data.info.classes[3] == "cat"
    stored = CIFAR10(str(published))
    expected = torch.from_numpy(stored.data[:4]).permute(0, 3, 1, 2).double() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)))
    assert torch.allclose(data.train_file.images(slice(0, 4)).double(), (expected - mean) / std, atol=1e-5)
    assert data.train_file.labels[:4].tolist() == stored.targets[:4]


def test_places(published, isolated, monkeypatch):
    assert cifar.find_or_download(published / "cifar-10-batches-py", download=False) == published
    with pytest.raises(NotAvailableError, match=r"CIFAR-10 was not found, .*CIFAR10_DIR"):
        cifar.find_or_download(None, download=False)
    monkeypatch.setenv("CIFAR10_DIR", str(published))
    assert cifar.find_or_download(None, download=False) == published
    (published / "cifar-10-batches-py" / "data_batch_3").unlink()
    with pytest.raises(InputError, match=r"CIFAR10_DIR\) lacks cifar-10-batches-py/data_batch_3"):
        cifar.find_or_download(None, download=False)


@pytest.mark.parametrize("name", ["data_batch_2", "test_batch", "batches.meta"])
def test_no_pickle_but_the_published_is_opened(published, tmp_path, name):
    class Hostile:
        def __reduce__(self):
            return Path.touch, (tmp_path / "opened",)

    (published / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(InputError, match=f"{name} is not the published file"):
        open_data(DataConfig(dataset="cifar10", dir=published), seed=1)
    assert not (tmp_path / "opened").exists()


def test_download_is_moved_into_place(published, isolated, monkeypatch):
    import shutil

    def download(dataset: CIFAR10) -> None:
        shutil.copytree(published, dataset.root, dirs_exist_ok=True)

    monkeypatch.setattr(CIFAR10, "download", download)
    root = cifar.find_or_download(None, download=True)
    assert root == isolated / "int8-workflow" / "cifar10"
    assert [path.name for path in root.parent.iterdir()] == ["cifar10"]
    assert len(cifar.load(root)[0].labels) == 100
