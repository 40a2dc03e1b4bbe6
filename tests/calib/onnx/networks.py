"""Small ONNX networks that tests make."""

import tarfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from calib.__main__ import main
from calib.table import CalibrationTable


def node(kind, inputs, outputs, **attributes):
    return helper.make_node(kind, inputs, outputs, name=f"/{outputs[0]}/{kind}", **attributes)


def model(nodes, inputs, outputs, weights, opset=17, **kinds):
    """A model; shapes are lists, or None (not known), and ``kinds`` gives other element types than float."""

    def value(name, shape):
        return helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), shape)

    graph = helper.make_graph(
        nodes,
        "network",
        [value(*item) for item in inputs.items()],
        [value(*item) for item in outputs.items()],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    made.ir_version = min(made.ir_version, 10)
    return made


def weight(generator, *shape):
    return (generator.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def classifier(opset=17, size=16):
    """Convolution, ReLU, pooling, Gemm, softmax."""
    generator = np.random.default_rng(0)
    nodes = [
        node("Conv", ["data", "c.weight", "c.bias"], ["c"], pads=[1, 1, 1, 1]),
        node("Relu", ["c"], ["relu"]),
        node("MaxPool", ["relu"], ["pool"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Flatten", ["pool"], ["flat"]),
        node("Gemm", ["flat", "fc.weight", "fc.bias"], ["fc"], transB=1),
        node("Softmax", ["fc"], ["prob"]),
    ]
    weights = {
        "c.weight": weight(generator, 8, 3, 3, 3),
        "c.bias": weight(generator, 8, 1)[:, 0],
        "fc.weight": weight(generator, 5, 8 * (size // 2) ** 2),
        "fc.bias": weight(generator, 5, 1)[:, 0],
    }
    return model(nodes, {"data": ["batch", 3, size, size]}, {"prob": ["batch", 5]}, weights, opset)


def detector():
    """A backbone with SiLU, a pyramid with resize and concatenation, and three heads, as YOLO has them."""
    generator = np.random.default_rng(1)
    weights, nodes = {"sizes": np.array([1, 1, 2, 2], np.float32)}, []

    def convolution(name, source, channels, before, stride=1, kernel=3):
        weights[f"{name}.weight"] = weight(generator, channels, before, kernel, kernel)
        weights[f"{name}.bias"] = weight(generator, channels, 1)[:, 0]
        inputs = [source, f"{name}.weight", f"{name}.bias"]
        pads = [kernel // 2] * 4
        nodes.append(node("Conv", inputs, [name], strides=[stride, stride], pads=pads))

    def block(name, source, channels, before, stride=1):
        convolution(name, source, channels, before, stride)
        nodes.append(node("Sigmoid", [name], [f"{name}/sigmoid"]))
        nodes.append(node("Mul", [name, f"{name}/sigmoid"], [f"{name}/silu"]))
        return f"{name}/silu"

    p3 = block("p3", block("stem", "images", 8, 3, 2), 8, 8, 2)
    p4 = block("p4", p3, 8, 8, 2)
    nodes.append(node("Add", [p4, block("inner", p4, 8, 8)], ["shortcut"]))
    p5 = block("p5", "shortcut", 8, 8, 2)
    nodes.append(node("MaxPool", [p5], ["sppf"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]))
    nodes.append(node("Concat", [p5, "sppf"], ["neck"], axis=1))
    nodes.append(node("Resize", ["neck", "", "sizes"], ["up"], mode="nearest"))
    nodes.append(node("Concat", ["up", "shortcut"], ["joined"], axis=1))
    for name, source, before in (("out3", p3, 8), ("out4", "joined", 24), ("out5", "neck", 16)):
        convolution(name, source, 6, before, kernel=1)
    outputs = {f"out{level}": ["batch", 6, "h", "w"] for level in (3, 4, 5)}
    return model(nodes, {"images": ["batch", 3, "height", "width"]}, outputs, weights)


def two_inputs():
    """An image and a vector of features."""
    generator = np.random.default_rng(2)
    nodes = [
        node("Conv", ["image", "c.weight"], ["c"]),
        node("GlobalAveragePool", ["c"], ["mean"]),
        node("Flatten", ["mean"], ["flat"]),
        node("Concat", ["flat", "features"], ["joined"], axis=1),
        node("MatMul", ["joined", "fc.weight"], ["scores"]),
    ]
    weights = {"c.weight": weight(generator, 4, 3, 3, 3), "fc.weight": weight(generator, 10, 3)}
    return model(nodes, {"image": ["N", 3, 8, 8], "features": ["N", 6]}, {"scores": ["N", 3]}, weights)


def save(made, path):
    onnx.save(made, path)
    return path


def table_of(network, images, folder, *arguments):
    """The table that ``python -m calib calibrate`` makes, in ``folder/made.cache``."""
    output = folder / "made.cache"
    line = ["calibrate", network, "--images", images, "--output", output, *arguments]
    assert main([str(argument) for argument in line]) == 0
    return CalibrationTable.read(output)


def stored_models(archive: Path) -> dict[str, onnx.ModelProto]:
    """The models of a ``.tar.xz`` of ONNX files, by name."""
    with tarfile.open(archive) as files:
        return {
            member.name.removesuffix(".onnx"): onnx.load_from_string(files.extractfile(member).read())
            for member in files.getmembers()
        }
