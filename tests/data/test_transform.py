"""Own preprocessing, gray images, images without classes and with targets."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from calib.subset import draw
from common.config import CalibrationConfig, DataConfig
from common.errors import InputError
from data import open_splits
from data.folder import GRAY_MEAN, open_folders
from data.targets import read_targets
from data.transform import is_torchvisions, open_transform
from models.checkpoint import CheckpointMeta
from models.reopen import reopen_data

WEIGHTS = "torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms"
MODES = ("RGB", "L", "RGBA", "P", "LA")


def halved(image: Image.Image) -> Tensor:
    """An own transform: 12 x 10 pixels, values in [0, 0.5]."""
    size = image.resize((12, 10))
    values = torch.frombuffer(bytearray(size.tobytes()), dtype=torch.uint8).reshape(10, 12, -1)
    return values.permute(2, 0, 1).float() / 510


def as_they_are(image: Image.Image) -> Tensor:
    return torch.zeros(3, image.height, image.width)


def fails(image: Image.Image) -> Tensor:
    raise ValueError("no such thing\nand more")


def gives_bytes(image: Image.Image) -> Tensor:
    return torch.zeros(3, 4, 4, dtype=torch.uint8)


def gives_nan(image: Image.Image) -> Tensor:
    return torch.full((3, 4, 4), float("nan"))


class Doubled:
    """A transform that is made first."""

    def __call__(self, image: Image.Image) -> Tensor:
        return 2 * halved(image)


NAME = f"{__name__}:"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Images of all modes and of many sizes, without classes."""
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 15), ("test", 5)):
        (tmp_path / part).mkdir()
        for number in range(count):
            size = (20 + 7 * number % 31, 24 + 5 * number % 17)
            pixels = torch.randint(0, 256, (size[1], size[0], 3), dtype=torch.uint8, generator=generator)
            mode = MODES[number % len(MODES)]
            Image.fromarray(pixels.numpy()).convert(mode).save(tmp_path / part / f"{number:02}.png")
    return tmp_path


def config(root: Path, **options: object) -> DataConfig:
    values = {"dataset": "imagefolder", "dir": root, "image_size": 16, "resize": 18, "workers": 0, **options}
    return DataConfig(**values)  # type: ignore[arg-type]


def test_images_of_all_modes_and_sizes_in_colour_and_gray(root: Path) -> None:
    colour = open_folders(config(root))
    gray = open_folders(config(root, channels=1))

    assert colour.train.images(slice(0, 15)).shape == (15, 3, 16, 16)
    assert gray.train.images(slice(0, 15)).shape == (15, 1, 16, 16)
    assert gray.train.preprocessing.mean == GRAY_MEAN
    assert colour.classes == gray.classes == ()


def test_torchvisions_own_preprocessing_is_applied_to_the_bit(root: Path) -> None:
    from torchvision.models import ResNet18_Weights

    images = open_folders(config(root, transform=WEIGHTS)).test
    expected = ResNet18_Weights.IMAGENET1K_V1.transforms()

    assert images.preprocessing.shape == (3, 224, 224)
    first = Image.open(root / "test" / "02.png").convert("RGB")
    assert torch.equal(images.images(slice(2, 3))[0], expected(first))


@pytest.mark.parametrize(("name", "largest"), [("halved", 0.5), ("Doubled", 1.0)])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_function_or_class_of_ones_own(root: Path, name: str, largest: float, workers: int) -> None:
    data = open_splits(config(root, transform=NAME + name, workers=workers), seed=1)

    assert data.info.preprocessing.shape == (3, 10, 12)
    assert (data.info.preprocessing.transform, len(data.info.preprocessing.transform_digest or "")) == (NAME + name, 16)
    images = data.train_file.images(slice(0, 15))
    assert images.shape == (15, 3, 10, 12)
    assert 0.6 * largest < float(images.max()) <= largest
    gray = open_splits(config(root, transform=NAME + name, channels=1), seed=1)
    assert gray.info.preprocessing.shape == (1, 10, 12)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "data.transform .* has no 'nothing'"),
        ("MODES", "is neither a class nor a function"),
        ("fails", r"00.png: data.transform .*:fails failed: ValueError: no such thing$"),
        ("gives_bytes", r"gives torch.uint8 \[3, 4, 4\], not a float tensor"),
        ("gives_nan", "gives NaN or infinity"),
    ],
)
def test_transforms_that_do_not_serve(root: Path, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_folders(config(root, transform=NAME + name))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("transforms", "is not of the form"),
        ("no.such.module", "cannot import data.transform 'no.such.module': No module named 'no'"),
        ("torchvision.models.ResNet18_Wights.V1.transforms", "module 'torchvision.models' has no 'ResNet18_Wights'"),
        ("torchvision.models.ResNet18_Weights.V7.transforms", "has no 'V7'"),
        ("torchvision.transforms.Resize", "cannot be made: TypeError"),
    ],
)
def test_paths_that_name_nothing(path: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_transform(path, 3)


def test_images_that_a_transform_leaves_at_different_sizes_are_named(root: Path) -> None:
    images = open_folders(config(root, transform=NAME + "as_they_are")).train

    with pytest.raises(InputError, match="01.png: data.transform .* makes 3x.* of it, and 3x24x20 of the first image"):
        images.images(slice(0, 3))


def test_a_checkpoint_names_no_code_but_torchvisions(root: Path) -> None:
    assert is_torchvisions(WEIGHTS)
    assert is_torchvisions("torchvision.models.segmentation.FCN_ResNet50_Weights.DEFAULT.transforms")
    assert not is_torchvisions("torchvision.models.os.abort")
    here = config(root, transform=NAME + "halved")
    data = open_splits(here, seed=1)
    meta = CheckpointMeta("Net", "a.Net", {}, data.info, here, seed=1)

    assert reopen_data(meta, here).info == data.info
    with pytest.raises(InputError, match="which this run's configuration does not: give --data.transform"):
        reopen_data(meta, config(root))


def write_targets(root: Path, lines: list[str]) -> Path:
    (root / "targets.csv").write_text("\n".join(lines), encoding="utf-8")
    return root / "targets.csv"


def test_targets_take_the_place_of_labels(root: Path) -> None:
    lines = ["image,age,height"] + [f"train/{n:02}.png,{n},{n / 2}" for n in range(15)]
    path = write_targets(root, [*lines, *(f"test/{n:02}.png,{100 + n},0" for n in range(5))])

    data = open_splits(config(root, targets=path), seed=1)

    assert (data.info.classes, data.info.targets) == ((), 2)
    assert data.test.labels.tolist() == [[100 + n, 0] for n in range(5)]
    assert sorted(data.train.labels[:, 0].tolist() + data.validation.labels[:, 0].tolist()) == list(range(15))
    drawn = draw(data, 0, CalibrationConfig(batches=2, batch_size=4), seed=1)
    assert len(set(drawn.positions.tolist())) == 8
    other = write_targets(root, [line.replace(",3,", ",4,") for line in path.read_text().splitlines()])
    assert open_splits(config(root, targets=other), seed=1).info.fingerprint != data.info.fingerprint


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["image,age"], "holds no targets"),
        (["train/00.png,1", "train/01.png"], "line 2 is not an image's path and numbers"),
        (["train/00.png,1", "train/01.png,inf"], "line 2 is not an image's path and numbers"),
        (["train/00.png,1", "train/01.png,old"], "line 2 is not"),
        (["train/00.png,1", "train/00.png,2"], "line 2 gives train/00.png other numbers than a line before"),
        (["train/00.png,1", "train/01.png,1,2"], "line 2 has 2 numbers, the lines before 1"),
    ],
)
def test_targets_that_are_none(root: Path, lines: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_targets(write_targets(root, lines))


def test_a_spreadsheets_mark_is_no_part_of_the_first_path(root: Path) -> None:
    assert read_targets(write_targets(root, ["\ufefftrain/00.png,1"])) == {"train/00.png": (1.0,)}


def test_an_image_without_a_target_is_named(root: Path) -> None:
    path = write_targets(root, ["train/00.png,1"])

    with pytest.raises(InputError, match="has no line for train/01.png"):
        open_folders(config(root, targets=path))
