import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.config import DataConfig
from common.errors import InputError
from data import Preprocessing, batches, open_data
from data.folder import IMAGENET_MEAN, IMAGENET_STD, FolderImages, decode, open_folders
from tests.data.sets import write_image, write_part

SMALL = Preprocessing(3, 24, 24, mean=IMAGENET_MEAN, std=IMAGENET_STD, resize=32)


def config(root: Path, validation: int = 5000) -> DataConfig:
    return DataConfig(dataset="imagefolder", dir=root, image_size=24, resize=32, batch_size=4, validation=validation)


@pytest.fixture
def images(tmp_path):
    paths = [write_image(tmp_path / f"{number}.png", seed=number) for number in range(11)]
    return FolderImages(paths, torch.arange(11), SMALL, workers=2)


@pytest.mark.parametrize("size", [(40, 36), (36, 40), (32, 32), (20, 17), (500, 33)])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_preprocessing_is_torchvisions(tmp_path, size, mode):
    from torchvision import transforms
    from torchvision.datasets.folder import default_loader

    path = write_image(tmp_path / "image.png", size, mode=mode)
    reference = transforms.Compose(
        [
            transforms.Resize(32),
            transforms.CenterCrop(24),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    given = FolderImages([path], torch.tensor([0]), SMALL, workers=0).images(slice(0, 1))
    assert torch.allclose(given[0], reference(default_loader(str(path))), atol=1e-5)


RAMP = Preprocessing(3, 8, 256)


def write_ramp(path: Path, values: np.ndarray) -> Path:
    Image.fromarray(np.tile(values, (8, 1))).save(path)
    return path


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("deep.png", np.arange(256, dtype=np.uint16) * 257),
        ("deep.tiff", np.arange(256, dtype=np.uint16) * 257),
        ("wide.tiff", np.arange(256, dtype=np.int32) * 257),
        ("float.tiff", np.arange(256, dtype=np.float32) / 255),
    ],
)
def test_deep_gray_images_keep_their_shades(tmp_path, name, values):
    pixels = decode(write_ramp(tmp_path / name, values), RAMP)
    assert torch.equal(pixels, torch.arange(256, dtype=torch.uint8).expand(3, 8, 256))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.linspace(0, 255, 256, dtype=np.float32), r"float\.tiff holds float values from 0 to 255, not from 0 to 1"),
        (np.full(256, np.nan, dtype=np.float32), r"float\.tiff holds float values from nan to nan"),
        (np.arange(256, dtype=np.int32) - 9, r"float\.tiff holds integer values from -9 to 246, not from 0 to 65535"),
    ],
)
def test_values_that_have_no_known_white_are_refused(tmp_path, values, message):
    with pytest.raises(InputError, match=message):
        decode(write_ramp(tmp_path / "float.tiff", values), RAMP)


@pytest.mark.filterwarnings("error")
def test_transparency_is_dropped_in_silence(tmp_path):
    image = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (8, 1)))
    palette = image.convert("P")
    palette.save(tmp_path / "palette.png", transparency=bytes(range(256)))
    image.convert("RGBA").save(tmp_path / "alpha.png")
    assert torch.equal(decode(tmp_path / "palette.png", RAMP), decode(tmp_path / "alpha.png", RAMP))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_are_in_order_whatever_the_workers(images, workers):
    expected = torch.stack([images.images(slice(position, position + 1))[0] for position in range(11)])
    images.workers = workers
    given = list(batches(images, 4))
    assert torch.equal(torch.cat([part for part, _ in given]), expected)
    assert torch.cat([labels for _, labels in given]).tolist() == list(range(11))
    assert torch.equal(images.images(torch.tensor([7, 2])), expected[[7, 2]])


def test_images_are_decoded_ahead_and_not_all_at_once(images):
    decoded = []
    enough, more = threading.Event(), threading.Event()

    class Recording:
        channels = 3

        def __call__(self, image):
            decoded.append(image)
            if len(decoded) >= 3:
                (enough if len(decoded) == 3 else more).set()
            return torch.zeros(SMALL.shape)

    images.transform = Recording()
    stream = images.stream([slice(position, position + 1) for position in range(11)])
    next(stream)
    # Two batches beyond the first are decoded while nobody asks for them, and no more.
    assert enough.wait(timeout=30)
    assert not more.wait(timeout=0.5)
    stream.close()
    assert len(decoded) == 3


def test_threads_end_with_the_stream(images):
    before = threading.active_count()
    stream = images.stream([slice(0, 4), slice(4, 8), slice(8, 11)])
    next(stream)
    stream.close()
    for thread in threading.enumerate():
        if thread.name.startswith("decode"):
            thread.join(timeout=30)
    assert threading.active_count() <= before


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_image_is_named(images, workers):
    images.workers = workers
    content = images.paths[5].read_bytes()
    for broken in (content[: len(content) // 2], b"", b"not an image", content[:40] + bytes(60)):
        images.paths[5].write_bytes(broken)
        with pytest.raises(InputError, match=r"5\.png is not a readable image"):
            list(images.stream([slice(0, 4), slice(4, 8)]))


def test_decompression_bomb_and_strip_are_refused(tmp_path, monkeypatch):
    path = write_image(tmp_path / "image.png", (64, 64))
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        with pytest.raises(InputError, match=r"image\.png is not a readable image \(DecompressionBombError\)"):
            decode(path, SMALL)
    strip = write_image(tmp_path / "strip.png", (60_000, 1))
    with pytest.raises(InputError, match=r"strip\.png is too long a strip \(60000 x 1\)"):
        decode(strip, Preprocessing(3, 224, 224, resize=256))


def test_three_parts(tmp_path):
    write_part(tmp_path, "train", 6)
    write_part(tmp_path, "validation", 2)
    write_part(tmp_path, "test", 3)
    data = open_data(config(tmp_path), seed=1)
    assert (len(data.train_file), len(data.train), len(data.validation), len(data.test)) == (12, 12, 4, 6)
    assert data.train_index.tolist() == list(range(12))
    assert data.info.classes == ("cat", "dog")
    assert data.info.title == "image folder (12 + 6 images, 2 classes)"
    assert data.info.preprocessing == SMALL
    assert data.info.notes == ()
    assert data.test.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_validation_folder_is_the_test_set_where_there_is_no_other(tmp_path):
    write_part(tmp_path, "train", 12)
    write_part(tmp_path, "val", 2)
    data = open_data(config(tmp_path, validation=4), seed=1)
    assert (len(data.train), len(data.validation), len(data.test)) == (20, 4, 4)
    assert data.validation.labels.tolist() == [0, 0, 1, 1]
    assert "val/ is the test set" in data.info.notes[0]


def test_fingerprint_tells_files_and_sizes(tmp_path):
    write_part(tmp_path, "train", 3)
    write_part(tmp_path, "test", 1)
    first = open_folders(config(tmp_path)).fingerprint
    assert open_folders(config(tmp_path)).fingerprint == first
    path = tmp_path / "train" / "cat" / "0.png"
    content = path.read_bytes()
    path.write_bytes(content + b"\0")
    assert open_folders(config(tmp_path)).fingerprint != first
    path.write_bytes(content)
    path.rename(path.with_name("other.png"))
    assert open_folders(config(tmp_path)).fingerprint != first


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(InputError, match=r"needs data\.dir"):
        open_data(DataConfig(dataset="imagefolder"), seed=1)
    with pytest.raises(InputError, match=r"has no folder train/"):
        open_folders(config(tmp_path))
    (tmp_path / "train").mkdir()
    with pytest.raises(InputError, match=r"has neither test/ nor val/"):
        open_folders(config(tmp_path))
    (tmp_path / "test").mkdir()
    with pytest.raises(InputError, match=r"train holds no class folders"):
        open_folders(config(tmp_path))
    write_part(tmp_path, "train", 2)
    write_part(tmp_path, "test", 2, ("cat", "horse"))
    with pytest.raises(InputError, match=r"differ in their class folders: dog, horse"):
        open_folders(config(tmp_path))
    write_part(tmp_path, "train", 2, ("cat", "dog", "horse"))
    (tmp_path / "test" / "dog").mkdir()
    with pytest.raises(InputError, match=r"test: Found no valid file for the classes dog$"):
        open_folders(config(tmp_path))
