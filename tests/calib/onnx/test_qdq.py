"""``calibrate --qdq`` and ``from-qdq``: where the pairs are, what they hold, and the way back."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper

from calib.__main__ import main
from calib.onnx.model import read_float_model
from calib.onnx.qdq import quantize
from calib.table import CalibrationTable
from common.errors import InputError
from tests.calib.onnx.networks import classifier, detector, model, node, save, weight

TENSORRT = Path(__file__).parents[1] / "tensorrt"


def run(*arguments):
    return main([str(argument) for argument in arguments])


def outputs(path, feed):
    return onnxruntime.InferenceSession(str(path)).run(None, feed)


def constants(made):
    return {item.name: numpy_helper.to_array(item) for item in made.graph.initializer}


def pairs(made):
    """Value that is quantized -> (its scale, operators that read it dequantized)."""
    weights = constants(made)
    found = {}
    for quantizer in made.graph.node:
        if quantizer.op_type == "QuantizeLinear":
            (back,) = [item for item in made.graph.node if quantizer.output[0] in item.input]
            assert back.op_type == "DequantizeLinear"
            assert weights[quantizer.input[2]] == 0
            assert weights[quantizer.input[2]].dtype == np.int8
            readers = [item.op_type for item in made.graph.node if back.output[0] in item.input]
            found[quantizer.input[0]] = (float(weights[quantizer.input[1]]), readers)
    return found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("residual", {"data": ["Conv"], "stem.2": ["Conv", "Add"], "a.2": ["Conv"], "relu": ["GlobalAveragePool"]}),
        ("pools", {"data": ["Conv"], "a.2": ["AveragePool"], "avg": ["Conv"], "b.2": ["MaxPool"], "max": ["Conv"]}),
        ("concat", {"data": ["Conv"], "stem.2": ["Conv", "Conv"], "cat": ["Conv"], "mean": ["Gemm"]}),
        ("updown", {"data": ["Conv"], "pad": ["MaxPool"], "max_pool2d": ["Conv"], "b.2": ["ConvTranspose"]}),
    ],
)
def test_pairs_are_where_tensorrt_fuses(name, expected):
    path = TENSORRT / "nets" / f"{name}.onnx"
    table = CalibrationTable.read(TENSORRT / "tables" / f"{name}.entropy2.cache")
    made = quantize(read_float_model(path), table, path)
    onnx.checker.check_model(made.model, full_check=True)
    found = pairs(made.model)
    assert {value: readers for value, (_, readers) in found.items() if value in expected} == expected
    for value, (scale, _) in found.items():
        assert scale == table.scales[value]
    # No pair follows a convolution whose activation or sum comes next, and none the last layer.
    producers = {item.output[0]: item.op_type for item in made.model.graph.node}
    assert not [value for value in found if producers.get(value) == "Conv"]
    assert "fc" not in found


def test_weights_are_int8_per_output_channel():
    path = TENSORRT / "nets" / "updown.onnx"
    table = CalibrationTable.read(TENSORRT / "tables" / "updown.entropy2.cache")
    source, made = constants(read_float_model(path)), constants(quantize(read_float_model(path), table, path).model)
    for name, axis in (("a.0.weight", 0), ("b.0.weight", 0), ("d.weight", 1), ("fc.weight", 0)):
        weight, codes, scale = source[name], made[f"{name}_quantized"], made[f"{name}_scale"]
        others = tuple(other for other in range(weight.ndim) if other != axis)
        np.testing.assert_allclose(scale, np.abs(weight).max(axis=others) / 127, rtol=1e-6)
        assert codes.dtype == np.int8
        assert codes.min() >= -127
        back = codes * np.expand_dims(scale, others)
        assert (np.abs(back - weight) <= np.expand_dims(scale, others) * 0.50001).all()
        assert name not in made
        assert name.replace("weight", "bias") in made


def test_a_layer_without_a_scale_stays_in_float():
    path = TENSORRT / "nets" / "residual.onnx"
    table = CalibrationTable.read(TENSORRT / "tables" / "residual.entropy2.cache")
    rest = {name: scale if name != "a.2" else float("inf") for name, scale in table.scales.items()}
    made = quantize(read_float_model(path), table.replaced(rest), path)
    assert made.missing == {"/b.0/Conv": "a.2"}
    assert (made.int8["Conv"], made.floats["Conv"], made.floats["Add"]) == (3, 1, 1)
    with pytest.raises(InputError, match="nothing in"):
        quantize(read_float_model(path), CalibrationTable({"prob": 1.0}), path)


@pytest.fixture
def images(tmp_path):
    np.save(tmp_path / "images.npy", np.random.default_rng(3).random((20, 3, 16, 16), dtype=np.float32))
    return tmp_path / "images.npy"


def calibrated(network, source, tmp_path, capsys, *arguments):
    table, int8 = tmp_path / "made.cache", tmp_path / "int8.onnx"
    capsys.readouterr()
    line = ["calibrate", network, "--images", source, "--output", table, "--qdq", int8, "--json", *arguments]
    assert run(*line) == 0
    return json.loads(capsys.readouterr().out)["qdq"], CalibrationTable.read(table), int8


@pytest.mark.parametrize("opset", [11, 13, 17, 21])
def test_the_file_runs_and_comes_close(images, tmp_path, capsys, opset):
    network = save(classifier(opset), tmp_path / "network.onnx")
    found, _, int8 = calibrated(network, images, tmp_path, capsys, "--algorithm", "minmax")
    assert found["sqnr_db"]["prob"] > 25
    assert found["int8"] == {"Conv": 2, "MaxPool": 1}
    assert found["float"] == {"Relu": 1, "Softmax": 1}
    assert found["missing"] == {}
    onnx.checker.check_model(str(int8), full_check=True)
    feed = {"data": np.load(images)}
    # Without the setting that keeps sums of products from saturating on old CPUs it is the same network.
    assert outputs(int8, feed)[0].shape == outputs(network, feed)[0].shape


def test_each_output_of_a_detector_has_its_figure(tmp_path, capsys):
    np.save(tmp_path / "images.npy", np.random.default_rng(5).random((4, 3, 64, 64), dtype=np.float32))
    network = save(detector(), tmp_path / "network.onnx")
    found, *_ = calibrated(network, tmp_path / "images.npy", tmp_path, capsys, "--algorithm", "minmax")
    assert list(found["sqnr_db"]) == ["out3", "out4", "out5"]
    assert min(found["sqnr_db"].values()) > 20
    assert found["int8"]["Conv"] == 8
    assert found["float"]["Sigmoid"] == 5


@pytest.mark.parametrize("moved", [False, True])
def test_layers_that_share_a_weight(images, tmp_path, capsys, moved):
    """ONNX Runtime fails on a shared one; behind a Transpose, as exporters leave them, it is a weight all the same."""
    generator = np.random.default_rng(4)
    name = "turned" if moved else "w"
    nodes = [node("Flatten", ["data"], ["flat"]), node("MatMul", ["flat", "v"], ["a"]), node("Relu", ["a"], ["r"])]
    nodes += [node("MatMul", ["r", name], ["b"]), node("MatMul", ["b", name], ["out"])]
    nodes = [node("Transpose", ["w"], ["turned"], perm=[1, 0]), *nodes] if moved else nodes
    weights = {"v": generator.standard_normal((768, 8), np.float32), "w": generator.standard_normal((8, 8), np.float32)}
    made = model(nodes, {"data": ["N", 3, 16, 16]}, {"out": ["N", 8]}, weights)
    found, _, written = calibrated(save(made, tmp_path / "network.onnx"), images, tmp_path, capsys)
    assert found["int8"] == {"MatMul": 3}
    assert found["sqnr_db"]["out"] > 20
    stored = onnx.load(written)
    assert "Transpose" not in {item.op_type for item in stored.graph.node}
    assert not {"v", "w"} & constants(stored).keys()


def test_external_weights(images, tmp_path, capsys):
    network = tmp_path / "external.onnx"
    onnx.save(classifier(), network, save_as_external_data=True, location="weights.bin", size_threshold=0)
    _, _, int8 = calibrated(network, images, tmp_path, capsys)
    feed = {"data": np.load(images)}
    before = outputs(int8, feed)[0]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    line = ["calibrate", network, "--images", images, "--output", elsewhere / "table", "--qdq", elsewhere / "int8.onnx"]
    assert run(*line) == 0
    np.testing.assert_array_equal(outputs(elsewhere / "int8.onnx", feed)[0], before)


def test_a_file_of_the_old_format(images, tmp_path, capsys):
    # Its weights are inputs as well, which ONNX Runtime would not take for constants in a newer one.
    made = classifier(11)
    made.ir_version = 3
    for item in made.graph.initializer:
        made.graph.input.append(onnx.helper.make_tensor_value_info(item.name, item.data_type, item.dims))
    found, _, int8 = calibrated(save(made, tmp_path / "network.onnx"), images, tmp_path, capsys)
    written = onnx.load(int8)
    onnx.checker.check_model(written, full_check=True)
    assert [item.name for item in written.graph.input] == ["data"]
    assert found["macs"] == {"total": 57856, "int8": 57856}


def test_an_old_upsampling_keeps_its_name(images, tmp_path, capsys):
    # In operator set 13 it is a Resize, behind a value of another name.
    generator = np.random.default_rng(0)
    nodes = [
        node("Upsample", ["data", "sizes"], ["up"], mode="nearest"),
        node("Conv", ["up", "w"], ["out"]),
    ]
    weights = {"sizes": np.array([1, 1, 2, 2], np.float32), "w": weight(generator, 4, 3, 3, 3)}
    made = model(nodes, {"data": ["N", 3, 16, 16]}, {"out": ["N", 4, 30, 30]}, weights, opset=9)
    made.ir_version = 3  # older than a file in which weights are no inputs
    found, table, int8 = calibrated(save(made, tmp_path / "network.onnx"), images, tmp_path, capsys)
    assert found["int8"] == {"Conv": 1}
    assert pairs(onnx.load(int8)) == {"up": (table.scales["up"], ["Conv"])}


def test_a_float16_network_has_pairs_in_float16(images, tmp_path, capsys):
    generator = np.random.default_rng(0)
    nodes = [
        node("Cast", ["data"], ["half"], to=TensorProto.FLOAT16),
        node("Conv", ["half", "w", "b"], ["c"]),
        node("Relu", ["c"], ["relu"]),
        node("Flatten", ["relu"], ["flat"]),
        node("Gemm", ["flat", "fc"], ["scores"], transB=1),
        node("Cast", ["scores"], ["out"], to=TensorProto.FLOAT),
    ]
    convolution = weight(generator, 4, 3, 3, 3) * np.array([1, 1e-3, 1, 0]).reshape(4, 1, 1, 1)
    weights = {"w": convolution, "b": weight(generator, 4, 1)[:, 0], "fc": weight(generator, 5, 4 * 14 * 14)}
    halves = {name: array.astype(np.float16) for name, array in weights.items()}
    made = model(nodes, {"data": ["N", 3, 16, 16]}, {"out": ["N", 5]}, halves)
    found, table, int8 = calibrated(save(made, tmp_path / "network.onnx"), images, tmp_path, capsys)
    assert found["int8"] == {"Conv": 2}
    assert found["sqnr_db"]["out"] > 20
    written = onnx.load(int8)
    onnx.checker.check_model(written, full_check=True)
    stored = constants(written)
    assert {name: array.dtype for name, array in stored.items() if name.endswith("_scale")} == {
        "w_scale": np.float16,
        "fc_convolution_scale": np.float16,
        "half_scale": np.float16,
        "relu_scale": np.float16,
    }
    assert stored["half_scale"] == pytest.approx(table.scales["half"], rel=2**-11)
    assert (stored["w_scale"] > 0).all()
    back, plain = tmp_path / "back.cache", tmp_path / "plain.onnx"
    assert run("from-qdq", int8, "--output", back, "--onnx", plain) == 0
    onnx.checker.check_model(onnx.load(plain), full_check=True)
    assert CalibrationTable.read(back).scales["relu"] == pytest.approx(table.scales["relu"], rel=2**-11)


def test_float16_weights_of_a_float32_network_are_quantized(images, tmp_path, capsys):
    nodes = [node("Cast", ["stored"], ["w"], to=TensorProto.FLOAT), node("Conv", ["data", "w"], ["out"])]
    weights = {"stored": weight(np.random.default_rng(0), 4, 3, 3, 3).astype(np.float16)}
    made = model(nodes, {"data": ["N", 3, 16, 16]}, {"out": ["N", 4, 14, 14]}, weights)
    found, *_ = calibrated(save(made, tmp_path / "network.onnx"), images, tmp_path, capsys)
    assert found["int8"] == {"Conv": 1}


def test_a_fixed_batch_counts_for_one_image(images, tmp_path, capsys):
    made = classifier()
    for value in (made.graph.input[0], made.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 4
    found, *_ = calibrated(save(made, tmp_path / "network.onnx"), images, tmp_path, capsys)
    assert found["macs"] == {"total": 57856, "int8": 57856}


def test_products_of_values_stay_in_float_and_are_warned_of(images, tmp_path, capsys):
    nodes = [
        node("MatMul", ["data", "w"], ["query"]),
        node("Transpose", ["data"], ["key"], perm=[0, 1, 3, 2]),
        node("MatMul", ["query", "key"], ["out"]),
    ]
    weights = {"w": np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32)}
    made = save(model(nodes, {"data": ["N", 3, 16, 16]}, {"out": ["N", 3, 16, 16]}, weights), tmp_path / "network.onnx")
    line = ["calibrate", made, "--images", images, "--output", tmp_path / "table", "--qdq", tmp_path / "int8.onnx"]
    assert run(*line) == 0
    assert "only 50.0 % of the multiply-accumulates are in INT8" in capsys.readouterr().err


def test_a_network_with_nothing_to_quantize_has_its_table(images, tmp_path):
    made = model([node("Relu", ["data"], ["out"])], {"data": ["N", 3, 16, 16]}, {"out": ["N", 3, 16, 16]}, {})
    network, table = save(made, tmp_path / "network.onnx"), tmp_path / "table"
    with pytest.raises(InputError, match="no convolution and no matrix product with float32 weights"):
        run("calibrate", network, "--images", images, "--output", table, "--qdq", tmp_path / "int8.onnx")
    assert CalibrationTable.read(table).scales.keys() == {"data", "out"}
    assert not (tmp_path / "int8.onnx").exists()


def test_the_summary_for_people(images, tmp_path, capsys):
    network = save(classifier(), tmp_path / "network.onnx")
    int8 = tmp_path / "int8.onnx"
    assert run("calibrate", network, "--images", images, "--output", tmp_path / "table", "--qdq", int8) == 0
    out = capsys.readouterr().out
    assert "SQNR of prob: " in out
    assert "operators in INT8: 2 Conv, 1 MaxPool\noperators in float: 1 Relu, 1 Softmax\n" in out
    assert "INT8: 100.0 % of 57.9 k multiply-accumulates\n" in out


def test_a_weight_that_is_computed(tmp_path, capsys):
    # As weight norm leaves it where the exporter does not fold constants.
    nodes = [
        node("ReduceL2", ["v"], ["norm"], axes=[1, 2, 3]),
        node("Div", ["v", "norm"], ["direction"]),
        node("Mul", ["direction", "g"], ["w"]),
        node("Conv", ["data", "w"], ["out"]),
    ]
    generator = np.random.default_rng(8)
    weights = {"v": weight(generator, 4, 3, 3, 3), "g": weight(generator, 4, 1, 1, 1)}
    network = save(model(nodes, {"data": [2, 3, 6, 6]}, {"out": [2, 4, 4, 4]}, weights), tmp_path / "network.onnx")
    np.save(tmp_path / "images.npy", generator.random((8, 3, 6, 6), dtype=np.float32))
    found, _, int8 = calibrated(network, tmp_path / "images.npy", tmp_path, capsys)
    assert (found["int8"], found["float"]) == ({"Conv": 1}, {})
    assert found["sqnr_db"]["out"] > 30
    assert [item.op_type for item in onnx.load(int8).graph.node if "Linear" not in item.op_type] == ["Conv"]


def test_an_output_whose_size_depends_on_the_values(tmp_path, capsys):
    nodes = [
        node("Conv", ["data", "w"], ["c"]),
        node("Greater", ["c", "zero"], ["positive"]),
        node("Reshape", ["c", "flat"], ["values"]),
        node("Reshape", ["positive", "flat"], ["mask"]),
        node("Compress", ["values", "mask"], ["kept"]),
    ]
    generator = np.random.default_rng(9)
    weights = {"w": weight(generator, 4, 3, 3, 3), "zero": np.float32(0), "flat": np.array([-1])}
    made = model(nodes, {"data": ["N", 3, 16, 16]}, {"kept": [None], "c": ["N", 4, 14, 14]}, weights)
    np.save(tmp_path / "images.npy", generator.standard_normal((8, 3, 16, 16), np.float32))
    network = save(made, tmp_path / "network.onnx")
    found, _, _ = calibrated(network, tmp_path / "images.npy", tmp_path, capsys)
    assert (list(found["sqnr_db"]), found["not_compared"]) == (["c"], ["kept"])


# from-qdq


def test_there_and_back(images, tmp_path, capsys):
    network = save(classifier(), tmp_path / "network.onnx")
    _, table, int8 = calibrated(network, images, tmp_path, capsys)
    back, plain = tmp_path / "back.cache", tmp_path / "plain.onnx"
    version = ["--tensorrt-version", "8.5.2", "--algorithm", "minmax"]
    assert run("from-qdq", int8, "--output", back, "--onnx", plain, *version) == 0
    out = capsys.readouterr().out
    assert "no scale, since no pair says one: tensors 'fc_map', 'fc', 'prob'" in out
    found = CalibrationTable.read(back)
    assert found.header == "TRT-8502-MinMaxCalibration"
    assert list(found.scales) == ["data", "c", "relu", "pool"]
    assert all(found.scales[name] == table.scales[name] for name in ("data", "relu", "pool"))
    # A ReLU alone reads the convolution, which so never needs more than it.
    assert found.scales["c"] == found.scales["relu"]
    assert not {"QuantizeLinear", "DequantizeLinear"} & {item.op_type for item in onnx.load(plain).graph.node}
    feed = {"data": np.load(images)}
    np.testing.assert_allclose(outputs(plain, feed)[0], outputs(network, feed)[0], atol=0.02)
    assert run("check", back, "--onnx", plain) == 1
    assert "no tensor" not in capsys.readouterr().out


def trained(zero, scale=0.02, kind=np.uint8, **weights):
    """A convolution as quantization-aware training exports it: pairs around its input and its float weight."""
    nodes = [
        node("QuantizeLinear", ["data", "s", "z"], ["q"]),
        node("DequantizeLinear", ["q", "s", "z"], ["dq"]),
        node("QuantizeLinear", ["w", "ws", "wz"], ["wq"], axis=0),
        node("DequantizeLinear", ["wq", "ws", "wz"], ["wdq"], axis=0),
        node("Conv", ["dq", "wdq"], ["out"]),
    ]
    generator = np.random.default_rng(7)
    weights = {
        "s": np.array(scale, np.float32),
        "z": np.array(zero, kind),
        "w": generator.standard_normal((2, 3, 1, 1)).astype(np.float32),
        "ws": np.array([0.01, 0.03], np.float32),
        "wz": np.zeros(2, np.int8),
        **weights,
    }
    return model(nodes, {"data": ["N", 3, 4, 4]}, {"out": ["N", 2, 4, 4]}, weights)


def test_pairs_of_training(tmp_path, capsys):
    path, plain = save(trained(128), tmp_path / "qat.onnx"), tmp_path / "plain.onnx"
    assert run("from-qdq", path, "--output", tmp_path / "table", "--onnx", plain) == 0
    assert CalibrationTable.read(tmp_path / "table").scales == pytest.approx({"data": 0.02})
    assert capsys.readouterr().err == ""
    weight = constants(trained(128))["w"]
    codes = np.clip(np.rint(weight / np.array([0.01, 0.03]).reshape(2, 1, 1, 1)), -128, 127)
    expected = codes * np.array([0.01, 0.03]).reshape(2, 1, 1, 1)
    np.testing.assert_allclose(constants(onnx.load(plain))["wdq"], expected, rtol=1e-5)


def test_an_asymmetric_range_is_covered(tmp_path, capsys):
    path = save(trained(0), tmp_path / "qat.onnx")
    assert run("from-qdq", path, "--output", tmp_path / "table") == 0
    assert "covers the asymmetric one: tensor 'data'" in capsys.readouterr().err
    assert run("from-qdq", path, "--output", tmp_path / "table", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["asymmetric"], found["unknown"], found["onnx"]) == (["data"], ["out"], None)
    assert CalibrationTable.read(tmp_path / "table").dynamic_ranges["data"] == pytest.approx(255 * 0.02)


def clipped(zero, lowest, highest):
    """As Brevitas and PyTorch write fewer than 256 codes: a Clip between the two of a pair."""
    made = trained(zero, kind=np.asarray(lowest).dtype.type, lo=lowest, hi=highest)
    made.graph.node.insert(1, node("Clip", ["q", "lo", "hi"], ["clipped"]))
    made.graph.node[2].input[0] = "clipped"
    return made


@pytest.mark.parametrize(
    ("made", "largest"),
    [
        (clipped(0, np.int8(-127), np.int8(127)), 127),
        (clipped(0, np.uint8(0), np.uint8(127)), 127),
        (clipped(0, np.int8(-8), np.int8(7)), 7),
        (clipped(3, np.int8(-8), np.int8(7)), 10),
    ],
)
def test_codes_that_are_clipped(tmp_path, capsys, made, largest):
    path, plain = save(made, tmp_path / "qat.onnx"), tmp_path / "plain.onnx"
    assert run("from-qdq", path, "--output", tmp_path / "table", "--onnx", plain) == 0
    assert CalibrationTable.read(tmp_path / "table").dynamic_ranges == pytest.approx({"data": largest * 0.02})
    assert capsys.readouterr().err == ""
    assert [item.op_type for item in onnx.load(plain).graph.node] == ["Conv"]


def test_the_type_of_codes_without_a_zero_point(tmp_path, capsys):
    made = trained(0)
    del made.graph.node[0].input[2], made.graph.node[1].input[2]
    made.graph.node[0].attribute.append(onnx.helper.make_attribute("output_dtype", onnx.TensorProto.INT8))
    made.opset_import[0].version = 21
    assert run("from-qdq", save(made, tmp_path / "qat.onnx"), "--output", tmp_path / "table") == 0
    assert CalibrationTable.read(tmp_path / "table").scales == pytest.approx({"data": 0.02})
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("activation", "kept"),
    [
        (("Identity", {}), ["Conv", "Identity", "Relu"]),
        (("Relu", {}), ["Conv", "Relu"]),
        (("LeakyRelu", {"alpha": 0.0}), ["Conv", "LeakyRelu"]),
        (("LeakyRelu", {"alpha": 0.5}), ["Conv", "LeakyRelu", "Relu"]),
    ],
)
def test_codes_from_zero_up_are_a_relu(tmp_path, activation, kept):
    # ONNX Runtime's quantizer leaves out the ReLU behind the convolution, whose codes clamp; pooling needs none.
    nodes = [
        node("Conv", ["data", "w"], ["c"]),
        node(activation[0], ["c"], ["relu"], **activation[1]),
        node("QuantizeLinear", ["relu", "s", "z"], ["q"]),
        node("DequantizeLinear", ["q", "s", "z"], ["dq"]),
        node("MaxPool", ["dq"], ["pool"], kernel_shape=[2, 2]),
        node("QuantizeLinear", ["pool", "s", "z"], ["pool_q"]),
        node("DequantizeLinear", ["pool_q", "s", "z"], ["out"]),
    ]
    generator = np.random.default_rng(5)
    weights = {"w": weight(generator, 2, 3, 3, 3), "s": np.float32(0.02), "z": np.uint8(0)}
    made = model(nodes, {"data": [2, 3, 6, 6]}, {"out": [2, 2, 3, 3]}, weights)
    path, table, plain = save(made, tmp_path / "qat.onnx"), tmp_path / "table", tmp_path / "plain.onnx"
    assert run("from-qdq", path, "--output", table, "--onnx", plain) == 0
    assert [item.op_type for item in onnx.load(plain).graph.node] == [*kept, "MaxPool"]
    scales = CalibrationTable.read(table).scales
    assert scales.keys() == {"c", "relu", "out"} | ({"relu_before_relu"} if len(kept) > 2 else set())
    assert list(scales.values()) == pytest.approx([0.02 * 255 / 127] * len(scales))
    feed = {"data": generator.standard_normal((2, 3, 6, 6)).astype(np.float32)}
    np.testing.assert_allclose(outputs(plain, feed)[0], outputs(path, feed)[0], atol=0.0101)


def test_codes_that_the_network_puts_out_become_values(tmp_path):
    made = trained(128)
    made.graph.node.append(node("QuantizeLinear", ["out", "s", "z"], ["codes"]))
    del made.graph.output[:]
    made.graph.output.append(onnx.helper.make_tensor_value_info("codes", TensorProto.UINT8, ["N", 2, 4, 4]))
    path, table, plain = save(made, tmp_path / "qat.onnx"), tmp_path / "table", tmp_path / "plain.onnx"
    assert run("from-qdq", path, "--output", table, "--onnx", plain) == 0
    assert CalibrationTable.read(table).scales == pytest.approx(dict.fromkeys(["data", "out", "codes"], 0.02))
    feed = {"data": np.random.default_rng(4).random((1, 3, 4, 4), np.float32)}
    values = (outputs(path, feed)[0].astype(np.float32) - 128) * 0.02
    np.testing.assert_allclose(outputs(plain, feed)[0], values, atol=0.05)


def test_a_dequantized_value_that_a_branch_reads(tmp_path):
    value = onnx.helper.make_tensor_value_info("inside", TensorProto.FLOAT, None)
    branch = onnx.helper.make_graph([node("Relu", ["dq"], ["inside"])], "branch", [], [value])
    made = trained(128)
    made.graph.node.append(node("If", ["flag"], ["chosen"], then_branch=branch, else_branch=branch))
    made.graph.input.append(onnx.helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
    made.graph.output.append(onnx.helper.make_tensor_value_info("chosen", TensorProto.FLOAT, None))
    path, plain = save(made, tmp_path / "qat.onnx"), tmp_path / "plain.onnx"
    assert run("from-qdq", path, "--output", tmp_path / "table", "--onnx", plain) == 0
    feed = {"data": np.random.default_rng(4).random((1, 3, 4, 4), np.float32), "flag": np.array(True)}
    for quantized, value in zip(outputs(path, feed), outputs(plain, feed), strict=True):
        np.testing.assert_allclose(value, quantized, atol=0.05)


@pytest.mark.parametrize(
    ("made", "complaint"),
    [
        (classifier(), "has no quantize/dequantize operators"),
        (
            model([node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"])], {"x": [1]}, {"q": [1]}, {}),
            r"on integers \(DynamicQuantizeLinear\): quantize it in the Q/DQ format",
        ),
        (trained(np.zeros(3), [0.1, 0.2, 0.3], np.int8), "'data' is quantized per channel"),
        (trained(0, kind=np.uint16), "quantized to uint16"),
        (
            model([node("DequantizeLinear", ["x", "s"], ["out"])], {"x": [1]}, {"out": [1]}, {"s": np.float32(1)}, x=2),
            "'x' is dequantized, and is neither a weight nor quantized before: give the network float inputs",
        ),
    ],
)
def test_networks_that_give_no_table(tmp_path, made, complaint):
    CalibrationTable({"x": 1.0}).write(tmp_path / "table")
    before = (tmp_path / "table").read_bytes()
    with pytest.raises(InputError, match=complaint) as error:
        run("from-qdq", save(made, tmp_path / "qat.onnx"), "--output", tmp_path / "table")
    assert "\n" not in str(error.value)
    assert (tmp_path / "table").read_bytes() == before
