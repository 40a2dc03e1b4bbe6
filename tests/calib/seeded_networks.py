"""The networks and batches of ``tensorrt/seeded``: ONNX files whose weights are left out, and come from seeds."""

import hashlib
import json
import lzma
import zlib
from pathlib import Path

import numpy as np
import onnx

HERE = Path(__file__).parent / "tensorrt" / "seeded"
NETWORKS = json.loads((HERE / "networks.json").read_text())


def _generator(name):
    return np.random.default_rng(zlib.crc32(name.encode()))


def write(name, folder):
    """Write NAME.onnx and NAME.npy (float32 [batches, N, C, H, W]) into a folder, as TensorRT was given them."""
    description = NETWORKS[name]
    model = onnx.load_from_string(lzma.decompress((HERE / f"{name}.onnx.xz").read_bytes()))
    scales = np.load(HERE / "weight_scales.npz")
    digest = hashlib.sha256()
    for initializer in model.graph.initializer:
        if initializer.name in description["weights"]:
            parameter, layout, shape = description["weights"][initializer.name]
            steps = _generator(f"weight {name} {parameter}").integers(-127, 128, shape).astype(np.float32)
            array = steps * scales[f"{name}/{initializer.name}"].reshape(-1, *[1] * (steps.ndim - 1))
            array = np.ascontiguousarray(array.T if layout == "T" else array)
            initializer.raw_data = array.tobytes()
        else:
            array = onnx.numpy_helper.to_array(initializer)
        digest.update(initializer.name.encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    assert digest.hexdigest() == description["weights_sha256"], "NumPy's generator gives other weights now"
    batches = _images(name, *description["images"])
    assert hashlib.sha256(batches.tobytes()).hexdigest() == description["images_sha256"], "and other images"
    onnx.save(model, folder / f"{name}.onnx")
    np.save(folder / f"{name}.npy", batches)
    return folder / f"{name}.onnx", folder / f"{name}.npy"


def _images(name, batches, n, c, h, w):
    generator = _generator(f"images {name}")
    low = generator.integers(0, 256, (batches, n, c, h // 8, w // 8))
    noise = [generator.integers(-limit, limit + 1, (batches, n, c, h, w)) for limit in (40, 25)]
    pixels = np.clip(low.repeat(8, 3).repeat(8, 4) + noise[0] + noise[1], 0, 255)
    return (pixels.astype(np.float32) / np.float32(255) - np.float32(0.45)) / np.float32(0.25)
