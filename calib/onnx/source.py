"""Calibration batches for an ONNX network: from a folder of images, a ``.npy`` file or a ``.npz`` file."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from calib.onnx.model import NetworkInput
from common.errors import InputError
from common.images import in_eight_bits
from common.threads import available_cores

Fit = Literal["crop", "letterbox", "stretch"]
"""How an image comes to the network's size: shorter side resized and the centre cut out, as classifiers do it; longer
side resized and the rest filled, as detectors do it; both sides resized."""

Batch = Mapping[str, NDArray[Any]]
"""Name of an input -> its values, first axis the images."""

DEFAULT_BATCH = 16
IMAGE_FILES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


@dataclass(frozen=True)
class Pixels:
    """From an image file to a network's input: ``(pixel * scale - mean) / std``.

    Attributes:
        size: Height and width; the network's own if None.
        mean: For each channel, or one for all.
        std: Likewise.
        scale: Of the 8-bit pixels; 1/255 makes them numbers in [0, 1].
        channels: ``rgb``, ``bgr`` or ``gray``; by the network's number of channels if None.
        resize: Shorter side that ``crop`` resizes the image to before it cuts; the size itself if None.
        fit: How the image comes to that size.
        fill: Pixel that a letterbox is filled with; 114 is what YOLO takes.
    """

    size: tuple[int, int] | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    scale: float = 1 / 255
    channels: Literal["rgb", "bgr", "gray"] | None = None
    resize: int | None = None
    fit: Fit = "crop"
    fill: int = 114


@dataclass(frozen=True)
class Batches:
    """Calibration batches in order; each pass over them reads them again.

    Attributes:
        images: Number of images.
        sizes: Images of each batch.
        load: A batch, from its first image and the one after its last.
        left_over: Images behind the last batch, which fill no batch of the fixed size that the network takes.
    """

    images: int
    sizes: tuple[int, ...]
    load: Callable[[int, int], Batch]
    left_over: int = 0

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[Batch]:
        ranges = list(pairwise(accumulate(self.sizes, initial=0)))
        # The next batch is decoded while the network runs.
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
            pending = pool.submit(self.load, *ranges[0])
            for following in ranges[1:]:
                batch = pending.result()
                pending = pool.submit(self.load, *following)
                yield batch
            yield pending.result()


def open_source(
    source: Path,
    inputs: Sequence[NetworkInput],
    pixels: Pixels,
    batch_size: int | None = None,
    batches: int | None = None,
) -> Batches:
    """Open calibration data for a network.

    Args:
        source: A folder of images, searched with all its folders and sorted by path; a ``.npy`` file, float32
            [N, ...] or [batches, N, ...]; or a ``.npz`` file whose arrays are named like the inputs.
        inputs: The network's inputs.
        pixels: How images become the input's values.
        batch_size: Images of a batch. By default that of an array with batches, else the network's own, else 16.
        batches: At most so many.

    Raises:
        InputError: nothing is there, it cannot be read, or it does not fit the network.
    """
    if not inputs:
        raise InputError("the network has no input, and so nothing to calibrate with")
    fixed = {item.batch for item in inputs if item.batch}
    if len(fixed) > 1:
        raise InputError(f"the inputs of the network have different fixed batch sizes: {sorted(fixed)}")
    try:
        if source.is_dir():
            images, given, load = _folder(source, inputs, pixels)
        else:
            images, given, load = _arrays(source, inputs)
    except OSError as error:
        raise InputError(f"cannot read {source}: {error.strerror or error}") from error
    least = next(iter(fixed), None)
    size = batch_size or given or max(DEFAULT_BATCH // least * least if least else DEFAULT_BATCH, least or 1)
    if least and size % least:
        raise InputError(f"the network takes batches of {least}: --batch-size {size} is no multiple of it")
    left_over = images % least if least else 0
    sizes = [min(size, images - left_over - begin) for begin in range(0, images - left_over, size)]
    if not sizes:
        raise InputError(f"{source} has {images} images, and the network takes batches of {least}")
    kept = sizes[:batches]
    return Batches(sum(kept), tuple(kept), load, left_over if len(kept) == len(sizes) else 0)


_Opened = tuple[int, int | None, Callable[[int, int], Batch]]
"""Number of images, the batch size that the file has or None, and what loads a range of images."""


def _arrays(source: Path, inputs: Sequence[NetworkInput]) -> _Opened:
    try:
        loaded = np.load(source, mmap_mode="r", allow_pickle=False)
        named = isinstance(loaded, np.lib.npyio.NpzFile)
        names = [item.name for item in inputs if item.name in loaded] if named else []
        arrays = {name: loaded[name] for name in names} if named else {inputs[0].name: loaded}
    except OSError:
        raise
    except (ValueError, EOFError, zipfile.BadZipFile, KeyError, MemoryError) as error:
        raise InputError(f"{source} is neither a folder of images nor a .npy or .npz file, or a damaged one") from error
    if missing := [item.name for item in inputs if item.name not in arrays]:
        needed = ", ".join(repr(item.name) for item in inputs)
        if named:
            raise InputError(f"{source} has no array {missing[0]!r}: the inputs of the network are {needed}")
        raise InputError(f"the network has the inputs {needed}: give a .npz file with an array of each name")
    if others := [item.name for item in inputs if not isinstance(arrays[item.name], np.ndarray)]:
        raise InputError(f"{source}: {others[0]!r} is no array: write the file with numpy.savez")
    flat: dict[str, NDArray[Any]] = {}
    given: set[int | None] = set()
    for item in inputs:
        array = arrays[item.name]
        batched = _has_batches(array, item, f"{source}, array {item.name!r}" if named else f"{source}")
        given.add(array.shape[1] if batched else None)
        flat[item.name] = array.reshape(-1, *array.shape[2:]) if batched else array
    counts = {len(array) for array in flat.values()}
    if len(counts) > 1 or len(given) > 1:
        raise InputError(f"the arrays of {source} have different numbers of images or batches")
    types = {item.name: item.dtype for item in inputs}

    def load(begin: int, end: int) -> Batch:
        return {name: np.array(array[begin:end], types[name]) for name, array in flat.items()}

    return counts.pop(), given.pop(), load


def _has_batches(array: NDArray[Any], item: NetworkInput, what: str) -> bool:
    """Whether an array has an axis of batches before that of the images; ``what`` names it in errors.

    Raises:
        InputError: it does not fit the network's input.
    """
    if item.dtype == "object":
        raise InputError(f"input {item.name!r} of the network is text, which is not calibrated: cut it off")
    # float16 networks are given what others are given; the order of bytes is NumPy's matter.
    if str(array.dtype.newbyteorder("=")) not in (item.dtype, "float32" if item.dtype == "float16" else item.dtype):
        raise InputError(f"{what} is {array.dtype}, and the network takes {item.text()}: convert it first")
    rank = array.ndim if item.shape is None else len(item.shape)
    if not rank:
        raise InputError(f"input {item.name!r} of the network is a single number, with no axis for images: fix it")
    batched = array.ndim == rank + 1
    if array.ndim not in (rank, rank + 1) or not _fits(array.shape[2:] if batched else array.shape[1:], item.shape):
        raise InputError(f"{what} is {list(array.shape)}, and the network takes {item.text()}")
    if not array.size:
        raise InputError(f"{what} is empty: {list(array.shape)}")
    return batched


def _fits(sample: Sequence[int], shape: tuple[int | None, ...] | None) -> bool:
    return shape is None or all(wanted in (None, size) for size, wanted in zip(sample, shape[1:], strict=True))


def _folder(source: Path, inputs: Sequence[NetworkInput], pixels: Pixels) -> _Opened:
    if len(inputs) != 1:
        names = ", ".join(repr(item.name) for item in inputs)
        raise InputError(f"the network has the inputs {names}: give a .npz file with an array of each name")
    paths = sorted(
        Path(folder, name)
        for folder, _, names in os.walk(source, onerror=_raise)
        for name in names
        if Path(name).suffix.lower() in IMAGE_FILES
    )
    if not paths:
        raise InputError(f"{source} holds no image ({', '.join(sorted(IMAGE_FILES))})")
    layout = _layout(inputs[0], pixels)
    pool = ThreadPoolExecutor(min(available_cores(), 8), thread_name_prefix="decode")

    def load(begin: int, end: int) -> Batch:
        images = pool.map(lambda path: _decode(path, layout, pixels), paths[begin:end])
        return {inputs[0].name: np.stack(list(images))}

    return len(paths), None, load


def _raise(error: OSError) -> None:
    raise error


@dataclass(frozen=True)
class _Layout:
    """What an image becomes: colours, height, width, and whether the channels come last."""

    colours: str
    height: int
    width: int
    last: bool
    dtype: str


def _layout(item: NetworkInput, pixels: Pixels) -> _Layout:
    if item.dtype not in ("float32", "float16") or (item.shape is not None and len(item.shape) != 4):
        raise InputError(f"the network takes {item.text()}, and no images: give a .npy or .npz file")
    _, *sizes = item.shape or (None, None, None, None)
    last = sizes[0] not in (1, 3) and sizes[2] in (1, 3)
    channels, height, width = (sizes[2], *sizes[:2]) if last else sizes
    wanted = pixels.size or ((height, width) if height and width else None)
    if wanted is None:
        raise InputError(f"the network takes {item.text()}: give --size HEIGHT WIDTH")
    if height not in (None, wanted[0]) or width not in (None, wanted[1]):
        raise InputError(f"--size {wanted[0]} {wanted[1]} does not fit the network, which takes {item.text()}")
    colours = pixels.channels or ("gray" if channels == 1 else "rgb")
    count = 1 if colours == "gray" else 3
    if channels not in (None, count):
        raise InputError(f"--channels {colours} does not fit the network, which takes {item.text()}")
    for name, values in (("--mean", pixels.mean), ("--std", pixels.std)):
        if len(values) not in (1, count):
            raise InputError(f"{name} takes one number or {count}, not {len(values)}")
    return _Layout(colours, *wanted, last, item.dtype)


def _decode(path: Path, layout: _Layout, pixels: Pixels) -> NDArray[Any]:
    """Read one image: float [C, H, W], or [H, W, C]."""
    from PIL import Image

    try:
        with Image.open(path) as stored:
            image = in_eight_bits(stored).convert("L" if layout.colours == "gray" else "RGB")
    except InputError as error:
        raise InputError(f"{path} {error}") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on broken files.
        raise InputError(f"{path} is not a readable image ({type(error).__name__}): repair or remove it") from error
    values = np.asarray(_fitted(image, layout, pixels), np.float32)
    values = values.reshape(layout.height, layout.width, -1)
    if layout.colours == "bgr":
        values = values[:, :, ::-1]
    mean, std = np.asarray(pixels.mean, np.float32), np.asarray(pixels.std, np.float32)
    values = (values * np.float32(pixels.scale) - mean) / std
    return np.ascontiguousarray(values if layout.last else values.transpose(2, 0, 1), layout.dtype)


def _fitted(image: Any, layout: _Layout, pixels: Pixels) -> Any:
    from PIL import Image

    size = (layout.width, layout.height)
    if pixels.fit == "stretch":
        return image.resize(size, Image.Resampling.BILINEAR)
    across, down = layout.width / image.width, layout.height / image.height
    factor = max(across, down) if pixels.fit == "crop" else min(across, down)
    if pixels.fit == "crop":
        factor = max(factor, (pixels.resize or 0) / min(image.size))
        # Cut first: a long strip would grow beyond all bounds.
        width, height = layout.width / factor, layout.height / factor
        left, top = (image.width - width) / 2, (image.height - height) / 2
        return image.resize(size, Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))
    width, height = max(round(image.width * factor), 1), max(round(image.height * factor), 1)
    fill = pixels.fill if layout.colours == "gray" else (pixels.fill,) * 3
    canvas = Image.new(image.mode, size, fill)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    canvas.paste(resized, ((layout.width - width) // 2, (layout.height - height) // 2))
    return canvas
