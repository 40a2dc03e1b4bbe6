import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer

from common.config import DataConfig
from common.errors import InputError
from data import ImageData, open_data
from data.splits import hold_out
from data.tensor import Selection
from tests.data.sets import write_set


@pytest.fixture
def small(tmp_path) -> DataConfig:
    return DataConfig(dataset="mnist", dir=write_set(tmp_path / "set", train=600), validation=100, batch_size=50)


def test_parts_fit_together(small):
    data = open_data(small, seed=1)
    assert (len(data.train_file), len(data.train), len(data.validation), len(data.test)) == (600, 500, 100, 20)
    assert torch.equal(data.train_file.labels[data.train_index], data.train.labels)
    assert torch.equal(data.train_file.images(data.train_index), data.train.images(slice(0, 500)))
    assert data.info.title == "MNIST (600 + 20)"
    assert data.info.preprocessing.shape == (1, 28, 28)
    assert data.info.classes == tuple("0123456789")


def test_fingerprint_tells_the_data(small, tmp_path):
    one = open_data(small, seed=1).info.fingerprint
    assert open_data(small, seed=2).info.fingerprint == one
    small.dir = write_set(tmp_path / "packed", train=600, suffix=".gz")
    assert open_data(small, seed=1).info.fingerprint == one
    small.dir = write_set(tmp_path / "other", train=590)
    assert open_data(small, seed=1).info.fingerprint != one


@given(
    counts=st.lists(st.integers(0, 60), min_size=1, max_size=6).filter(lambda counts: sum(counts) >= 6),
    wanted=st.integers(1, 80),
    seed=st.integers(0, 99),
)
def test_hold_out_is_stratified(counts, wanted, seed):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    kept, held = hold_out(labels, wanted, seed)
    assert len(held) == min(wanted, len(labels) // 6)
    assert torch.equal(torch.cat([kept, held]).sort().values, torch.arange(len(labels)))
    assert torch.equal(kept, kept.sort().values)
    exact = torch.tensor(counts, dtype=torch.float64) * len(held) / len(labels)
    assert (torch.bincount(labels[held], minlength=len(counts)) - exact).abs().max() < 1


def test_hold_out_depends_on_the_seed_alone():
    labels = torch.arange(600) % 10
    assert torch.equal(hold_out(labels, 100, 1)[1], hold_out(labels, 100, 1)[1])
    assert not torch.equal(hold_out(labels, 100, 1)[1], hold_out(labels, 100, 2)[1])


def test_hold_out_is_limited_with_a_warning(caplog):
    assert len(hold_out(torch.arange(600) % 10, 5000, 1)[1]) == 100
    assert "100 images are held out for validation, not 5,000" in caplog.text
    with pytest.raises(InputError, match="too few to hold some out"):
        hold_out(torch.arange(5), 1, 1)


def test_fashion_has_its_own_classes(small):
    small.dataset = "fashion_mnist"
    info = open_data(small, seed=1).info
    assert (info.name, info.title, info.classes[9]) == ("fashion_mnist", "Fashion-MNIST (600 + 20)", "Ankle boot")
    assert "not the published Fashion-MNIST" in info.notes[0]


def test_auto_takes_mnist_where_it_is(small):
    small.dataset = "auto"
    assert open_data(small, seed=1).info.name == "mnist"


def test_auto_falls_back_to_the_digits_and_says_so(isolated, caplog):
    data = open_data(DataConfig(dataset="auto", download=False), seed=1)
    assert data.info.name == "digits"
    assert (len(data.train_file), len(data.test)) == (1442, 355)
    assert "not MNIST" in data.info.notes[0]
    assert "stand in for MNIST: MNIST was not found" in data.info.notes[1]
    assert "going on with scikit-learn's digits" in caplog.text


def test_auto_never_hides_a_fault(small, isolated):
    (small.dir / "train-images-idx3-ubyte").write_bytes(b"broken")
    small.dataset = "auto"
    with pytest.raises(InputError, match=r"train-images-idx3-ubyte is not an idx file"):
        open_data(small, seed=1)
    small.dir = small.dir / "absent"
    with pytest.raises(InputError, match="is not a folder"):
        open_data(small, seed=1)


def test_mnist_never_falls_back(isolated):
    with pytest.raises(InputError, match="MNIST was not found"):
        open_data(DataConfig(dataset="mnist", download=False), seed=1)


def test_digits_by_name_have_one_note():
    data = open_data(DataConfig(dataset="digits"), seed=1)
    assert len(data.info.notes) == 1
    assert data.info == open_data(DataConfig(dataset="digits"), seed=2).info
    # Pinned: the pixels are the same on every machine.
    assert data.info.fingerprint.startswith("a2e328f44939ce71")


def test_heavy_libraries_are_imported_at_first_use(root, small):
    code = (
        "import pathlib, sys, data; from common.config import DataConfig; "
        "data.open_splits(DataConfig(dataset='mnist', dir=pathlib.Path(sys.argv[1]), validation=100), 1); "
        "assert not {'lightning', 'sklearn', 'torchvision', 'PIL'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(small.dir)], check=True, cwd=root)


def test_device_copies_are_made_once(small):
    data = open_data(small, seed=1)
    assert data.train_dataloader().source is data.train
    data.trainer = Mock(strategy=Mock(root_device=torch.device("meta")), global_rank=1, world_size=2)
    train, validation = data.train_dataloader(), data.val_dataloader()
    assert (train.rank, train.processes, validation.rank, validation.processes) == (1, 2, 1, 2)
    assert train.source.labels.device.type == "meta"
    assert isinstance(train.source, Selection)
    assert isinstance(validation.source, Selection)
    assert train.source.source is validation.source.source
    assert data.train_dataloader().source is train.source


class Recorder(LightningModule):
    """A linear classifier that records the labels of every training batch, and where they lay."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(784, 10)
        self.seen: list[list[int]] = []
        self.devices: set[str] = set()

    def on_before_batch_transfer(self, batch, dataloader_idx):
        self.devices |= {part.device.type for part in batch}
        return batch

    def training_step(self, batch, batch_idx):
        images, labels = batch
        self.seen.append(labels.tolist())
        return F.cross_entropy(self.linear(images.flatten(1)), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.gpu
def test_data_set_lives_on_the_gpu(small, tmp_path):
    gpu, cpu = Recorder(), Recorder()
    arguments = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, "default_root_dir": tmp_path}
    Trainer(accelerator="gpu", devices=1, **arguments).fit(gpu, datamodule=open_data(small, seed=1))
    Trainer(accelerator="cpu", **arguments).fit(cpu, datamodule=open_data(small, seed=1))
    assert (gpu.devices, cpu.devices) == ({"cuda"}, {"cpu"})
    assert gpu.seen == cpu.seen


def test_the_real_set(mnist_dir):
    data = open_data(DataConfig(dataset="mnist", dir=mnist_dir), seed=1)
    assert isinstance(data, ImageData)
    assert (len(data.train), len(data.validation), len(data.test)) == (55_000, 5_000, 10_000)
    assert data.info.notes == ()
    images = data.train_file.images(slice(0, 1))
    assert images.max() <= 1
    assert data.train_file.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
