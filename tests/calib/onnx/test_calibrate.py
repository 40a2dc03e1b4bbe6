"""``python -m calib calibrate``: TensorRT's tables for ONNX networks, kinds of sources, and bad input."""

import json
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from calib.__main__ import main
from calib.onnx import observe, session
from calib.onnx.graph import Graph
from calib.onnx.model import read_float_model
from calib.table import CalibrationTable
from common.errors import InputError
from tests.calib.onnx.networks import classifier, detector, model, node, save, table_of, two_inputs, weight

TENSORRT = Path(__file__).parents[1] / "tensorrt"
TABLES = sorted(path.name for path in (TENSORRT / "tables").glob("*.cache"))
# Divergences within 1e-6 of each other, which the last bits of a convolution decide.
TIES = 2


def run(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_tensorrt(name, tmp_path):
    network, algorithm, _ = name.split(".")
    wanted = CalibrationTable.read(TENSORRT / "tables" / name)
    source = TENSORRT / "nets" / "images.npy"
    version = ["--algorithm", algorithm, "--tensorrt-version", "10.6.0"]
    found = table_of(TENSORRT / "nets" / f"{network}.onnx", source, tmp_path, *version)
    assert found.header == wanted.header
    assert wanted.scales.keys() <= found.scales.keys()
    assert not found.scales.keys() - wanted.scales.keys() - {"cat"}
    differ = {
        tensor for tensor, scale in wanted.scales.items() if found.scales[tensor] != pytest.approx(scale, rel=1e-4)
    }
    assert len(differ) <= (0 if algorithm in ("minmax", "legacy") else TIES), differ


@pytest.mark.parametrize("name", TABLES)
def test_check_knows_the_names_of_tensorrt(name, capsys):
    network = TENSORRT / "nets" / f"{name.split('.')[0]}.onnx"
    assert run("check", TENSORRT / "tables" / name, "--onnx", network) == 0
    assert "warning" not in capsys.readouterr().out


def test_check_asks_for_a_product_and_knows_a_shared_constant(tmp_path, images, capsys):
    # PyTorch's exporter lets a weight that two layers share pass an Identity, which gives its entry the name.
    nodes = [
        node("Identity", ["slope"], ["shared"]),
        node("PRelu", ["data", "slope"], ["a"]),
        node("PRelu", ["a", "shared"], ["b"]),
        node("GlobalAveragePool", ["b"], ["pool"]),
        node("Flatten", ["pool"], ["flat"]),
        node("Gemm", ["flat", "w", "bias"], ["fc"], transB=1),
    ]
    weights = {"slope": np.full((3, 1, 1), 0.25), "w": np.eye(3), "bias": np.ones(3)}
    weights = {name: array.astype(np.float32) for name, array in weights.items()}
    network = save(model(nodes, {"data": ["N", 3, 16, 16]}, {"fc": ["N", 3]}, weights), tmp_path / "network.onnx")
    np.save(tmp_path / "images.npy", images)
    assert "shared" in table_of(network, tmp_path / "images.npy", tmp_path).scales
    assert run("check", tmp_path / "made.cache", "--onnx", network) == 0
    assert "warning" not in capsys.readouterr().out
    assert run("remove", tmp_path / "made.cache", "/fc/Gemm_output") == 0
    assert run("check", tmp_path / "made.cache", "--onnx", network) == 0
    assert "without a scale for tensor '/fc/Gemm_output'" in capsys.readouterr().out


@pytest.fixture
def images():
    return np.random.default_rng(3).random((40, 3, 16, 16), dtype=np.float32)


@pytest.fixture
def source(images, tmp_path):
    np.save(tmp_path / "images.npy", images)
    return tmp_path / "images.npy"


@pytest.fixture
def network(tmp_path):
    return save(classifier(), tmp_path / "network.onnx")


def test_parts_of_a_batch_count_a_concatenation_from_its_beginning(tmp_path, monkeypatch):
    monkeypatch.setattr(observe, "_BUDGET", 1)
    monkeypatch.setattr(observe, "_BUDGET_OF_A_CORE", 0)
    wanted = CalibrationTable.read(TENSORRT / "tables" / "concat.entropy.cache")
    network, images = TENSORRT / "nets" / "concat.onnx", TENSORRT / "nets" / "images.npy"
    found = table_of(network, images, tmp_path, "--algorithm", "entropy")
    assert found.scales["mul"] == pytest.approx(wanted.scales["mul"], rel=1e-4)


@pytest.mark.parametrize("budget", [1, 300_000], ids=["the first batch runs twice", "its values are kept"])
def test_a_batch_in_parts_gives_the_same_table(images, tmp_path, monkeypatch, network, budget):
    images[7] *= 3
    np.save(tmp_path / "images.npy", images)
    whole = table_of(network, tmp_path / "images.npy", tmp_path, "--batch-size", "20")
    monkeypatch.setattr(observe, "_BUDGET", budget)
    monkeypatch.setattr(observe, "_BUDGET_OF_A_CORE", 0)
    parts = table_of(network, tmp_path / "images.npy", tmp_path, "--batch-size", "20")
    assert dict(parts.scales) == pytest.approx(dict(whole.scales), rel=1e-5)


def test_torch_has_its_threads_again(tmp_path, source, network):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        table_of(network, source, tmp_path)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_an_array_with_batches_is_that_of_its_images(images, tmp_path, network):
    np.save(tmp_path / "flat.npy", images)
    np.save(tmp_path / "batches.npy", images.reshape(4, 10, 3, 16, 16))
    np.savez(tmp_path / "named.npz", data=images)
    flat = table_of(network, tmp_path / "flat.npy", tmp_path, "--batch-size", "10")
    assert table_of(network, tmp_path / "batches.npy", tmp_path) == flat
    assert table_of(network, tmp_path / "named.npz", tmp_path, "--batch-size", "10") == flat
    assert table_of(network, tmp_path / "batches.npy", tmp_path, "--batches", "2") != flat


def test_a_detector_with_three_outputs(tmp_path, capsys):
    network = save(detector(), tmp_path / "detector.onnx")
    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(4)
    for number in range(5):
        Image.fromarray(generator.integers(0, 256, (40 + number, 60, 3), np.uint8)).save(folder / f"{number}.png")
    arguments = ["--size", "64", "--fit", "letterbox", "--batch-size", "2"]
    table = table_of(network, folder, tmp_path, *arguments, "--json")
    summary = json.loads(capsys.readouterr().out)
    assert (summary["images"], summary["batches"]) == (5, 3)
    names = {name for item in read_float_model(network).graph.node for name in item.output}
    assert names | {"images"} <= table.scales.keys()
    assert table.scales["sppf"] == table.scales["p5/silu"]
    assert run("check", tmp_path / "made.cache", "--onnx", network) == 0
    assert "warning" not in capsys.readouterr().out


def test_a_network_with_two_inputs(tmp_path):
    network = save(two_inputs(), tmp_path / "network.onnx")
    generator = np.random.default_rng(5)
    arrays = {
        "image": generator.random((6, 3, 8, 8), dtype=np.float32),
        "features": generator.random((6, 6), dtype=np.float32),
    }
    np.savez(tmp_path / "inputs.npz", **arrays)
    table = table_of(network, tmp_path / "inputs.npz", tmp_path, "--algorithm", "minmax")
    for name, array in arrays.items():
        assert table.scales[name] == pytest.approx(array.max() / 127)
    np.savez(tmp_path / "one.npz", image=arrays["image"])
    with pytest.raises(InputError, match="no array 'features'"):
        table_of(network, tmp_path / "one.npz", tmp_path)
    np.savez(tmp_path / "uneven.npz", image=arrays["image"], features=arrays["features"][:3])
    with pytest.raises(InputError, match="different numbers of images"):
        table_of(network, tmp_path / "uneven.npz", tmp_path)
    np.save(tmp_path / "image.npy", arrays["image"])
    for source in (tmp_path / "image.npy", tmp_path):
        with pytest.raises(InputError, match=r"inputs 'image', 'features': give a .npz"):
            table_of(network, source, tmp_path)


def test_integers_as_inputs_have_no_entry(tmp_path):
    generator = np.random.default_rng(8)
    nodes = [node("Gather", ["words", "ids"], ["rows"]), node("MatMul", ["rows", "w"], ["out"])]
    weights = {"words": weight(generator, 30, 8), "w": weight(generator, 8, 4)}
    made = model(nodes, {"ids": ["N", 5]}, {"out": ["N", 5, 4]}, weights, ids=TensorProto.INT64)
    np.savez(tmp_path / "ids.npz", ids=generator.integers(0, 30, (20, 5)))
    network = save(made, tmp_path / "network.onnx")
    table = table_of(network, tmp_path / "ids.npz", tmp_path, "--algorithm", "minmax")
    assert "ids" not in table.scales
    assert {"rows", "out"} <= table.scales.keys()


@pytest.mark.parametrize("opset", [11, 13, 17, 21])
def test_operator_sets_and_fixed_batches(images, tmp_path, capsys, opset):
    made = classifier(opset)
    for value in (*made.graph.input, *made.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 4
    network = save(made, tmp_path / "network.onnx")
    np.save(tmp_path / "images.npy", images[:10])
    assert len(table_of(network, tmp_path / "images.npy", tmp_path).scales) == 12
    assert "the last 2 images are left out" in capsys.readouterr().err
    with pytest.raises(InputError, match="batches of 4: --batch-size 6 is no multiple"):
        table_of(network, tmp_path / "images.npy", tmp_path, "--batch-size", "6")
    np.save(tmp_path / "few.npy", images[:3])
    with pytest.raises(InputError, match="3 images, and the network takes batches of 4"):
        table_of(network, tmp_path / "few.npy", tmp_path)


def test_sizes_of_minus_one_are_free_and_double_is_a_float(tmp_path, source):
    nodes = [node("Cast", ["data"], ["wide"], to=TensorProto.DOUBLE), node("Mul", ["wide", "two"], ["twice"])]
    nodes += [node("Cast", ["twice"], ["c"], to=TensorProto.FLOAT), node("Conv", ["c", "w"], ["out"])]
    weights = {"w": weight(np.random.default_rng(0), 4, 3, 3, 3), "two": np.float64(2)}
    made = model(nodes, {"data": [-1, 3, -1, -1]}, {"out": ["N", 4, "H", "W"]}, weights, opset=9)
    network = save(made, tmp_path / "network.onnx")
    assert not Graph(read_float_model(network)).fixed
    table = table_of(network, source, tmp_path, "--qdq", tmp_path / "int8.onnx", "--algorithm", "minmax")
    assert table.scales["twice"] == 2 * table.scales["data"]


def test_a_float16_network_takes_float32_images(images, tmp_path):
    nodes = [node("Conv", ["data", "w"], ["c"]), node("Relu", ["c"], ["out"])]
    kinds = dict.fromkeys(("data", "out"), TensorProto.FLOAT16)
    weights = {"w": weight(np.random.default_rng(0), 4, 3, 3, 3).astype(np.float16)}
    made = model(nodes, {"data": ["N", 3, 16, 16]}, {"out": ["N", 4, 14, 14]}, weights, **kinds)
    network, tables = save(made, tmp_path / "network.onnx"), []
    for kind in (np.float32, np.float16):
        np.save(tmp_path / "images.npy", images.astype(kind))
        tables.append(table_of(network, tmp_path / "images.npy", tmp_path))
    assert tables[0] == tables[1]


def test_files_that_tensorrt_takes_and_onnx_runtime_does_not(tmp_path, source):
    # Nodes in any order, two of one name, a sparse weight.
    nodes = [node("Relu", ["c"], ["relu"]), node("Conv", ["data", "w"], ["c"]), node("Conv", ["relu", "v"], ["out"])]
    generator = np.random.default_rng(0)
    weights = {"w": weight(generator, 4, 3, 3, 3), "v": weight(generator, 2, 4, 1, 1)}
    made = model(nodes, {"data": ["N", 3, 16, 16]}, {"out": ["N", 2, 14, 14]}, weights)
    expected = table_of(save(made, tmp_path / "network.onnx"), source, tmp_path)
    dense = weights["v"].reshape(-1)
    for indices in (np.arange(8), np.stack(np.unravel_index(np.arange(8), (2, 4, 1, 1)), axis=1)):
        made = model(nodes, {"data": ["N", 3, 16, 16]}, {"out": ["N", 2, 14, 14]}, {"w": weights["w"]})
        values, places = numpy_helper.from_array(dense, "v"), numpy_helper.from_array(indices)
        made.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [2, 4, 1, 1]))
        for item in made.graph.node:
            item.name = "same"
        int8 = tmp_path / "int8.onnx"
        assert table_of(save(made, tmp_path / "network.onnx"), source, tmp_path, "--qdq", int8) == expected
        assert read_float_model(tmp_path / "network.onnx").graph.node[0].op_type == "Conv"


def test_a_name_that_the_table_cannot_hold_has_no_entry(tmp_path, source, capsys):
    nodes = [node("Conv", ["data", "w"], ["two\nlines: 1"]), node("Relu", ["two\nlines: 1"], ["out"])]
    weights = {"w": weight(np.random.default_rng(0), 4, 3, 3, 3)}
    made = model(nodes, {"data": ["N", 3, 16, 16]}, {"out": ["N", 4, 14, 14]}, weights)
    table = table_of(save(made, tmp_path / "network.onnx"), source, tmp_path)
    assert list(table.scales) == ["data", "out"]
    assert "cannot hold such a name: tensor 'two\\nlines: 1'" in capsys.readouterr().err


def test_external_weights(tmp_path, source):
    inside = table_of(save(classifier(), tmp_path / "network.onnx"), source, tmp_path)
    network = tmp_path / "external.onnx"
    onnx.save(classifier(), network, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert table_of(network, source, tmp_path) == inside
    content = (tmp_path / "weights.bin").read_bytes()
    (tmp_path / "weights.bin").write_bytes(content[:100])
    with pytest.raises(InputError, match=r"weights.bin, which holds weights of external.onnx, is cut short"):
        table_of(network, source, tmp_path)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(InputError, match=r"weights.bin, which holds weights of external.onnx, is missing"):
        table_of(network, source, tmp_path)
    (tmp_path / "weights.bin").write_bytes(content)
    made = onnx.load(network, load_external_data=False)
    next(item for item in made.graph.initializer[0].external_data if item.key == "offset").value = "here"
    with pytest.raises(InputError, match=r"where weight .* lies in .*weights.bin is no number"):
        table_of(save(made, network), source, tmp_path)


def test_nothing_that_is_read_is_overwritten(tmp_path, source, network):
    before = network.read_bytes()
    new = tmp_path / "new"
    for outputs in ([network], [source], [new, "--qdq", network], [new, "--qdq", new]):
        with pytest.raises(InputError, match="give the result another name"):
            run("calibrate", network, "--images", source, "--output", *outputs)
    assert network.read_bytes() == before


def test_a_network_above_2_gib(tmp_path, capsys):
    """A table of embeddings in a sparse file, of which a few rows are read."""
    rows = 2**31 // 256 + 1000
    with (tmp_path / "table.bin").open("wb") as file:
        file.write(np.random.default_rng(0).standard_normal((4096, 64), dtype=np.float32).tobytes())
        file.truncate(rows * 256)
    table = TensorProto(name="table", data_type=TensorProto.FLOAT, dims=[rows, 64])
    table.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "table.bin"), ("offset", "0"), ("length", str(rows * 256))):
        table.external_data.add(key=key, value=value)
    nodes = [
        node("Cast", ["x"], ["index"], to=TensorProto.INT64),
        node("Gather", ["table", "index"], ["embedding"]),
        node("MatMul", ["embedding", "w"], ["y"]),
    ]
    weights = {"w": weight(np.random.default_rng(1), 64, 8)}
    made = model(nodes, {"x": ["N", 4]}, {"y": ["N", 4, 8]}, weights)
    made.graph.initializer.append(table)
    np.save(tmp_path / "x.npy", np.random.default_rng(2).integers(0, 4096, (32, 4)).astype(np.float32))
    network = save(made, tmp_path / "network.onnx")
    found = table_of(network, tmp_path / "x.npy", tmp_path, "--qdq", tmp_path / "int8.onnx")
    assert {"x", "embedding", "y"} <= found.scales.keys()
    assert "operators in INT8: 1 MatMul" in capsys.readouterr().out


def test_what_subgraphs_hold_stays_in_float(tmp_path, capsys, source):
    branches = {}
    for name, kind in (("then_branch", "Relu"), ("else_branch", "Neg")):
        output = helper.make_tensor_value_info(f"{name}/out", TensorProto.FLOAT, None)
        branches[name] = helper.make_graph([helper.make_node(kind, ["c"], [f"{name}/out"])], name, [], [output])
    nodes = [
        node("Conv", ["data", "w"], ["c"]),
        node("ReduceSum", ["c"], ["total"], keepdims=0),
        node("Greater", ["total", "zero"], ["positive"]),
        node("If", ["positive"], ["chosen"], **branches),
        node("Sigmoid", ["chosen"], ["prob"]),
    ]
    weights = {"w": weight(np.random.default_rng(6), 4, 3, 3, 3), "zero": np.float32(0).reshape(())}
    made = model(nodes, {"data": ["N", 3, 16, 16]}, {"prob": ["N", 4, 14, 14]}, weights)
    table = table_of(save(made, tmp_path / "network.onnx"), source, tmp_path)
    assert {"data", "c", "prob"} <= table.scales.keys()
    assert not any("branch" in name or name == "positive" for name in table.scales)
    assert "warning: what If, Loop and Scan hold stays in float: /chosen/If" in capsys.readouterr().err


def test_custom_operators_are_named_in_one_line(tmp_path, source):
    made = classifier()
    made.graph.node.append(helper.make_node("EfficientNMS_TRT", ["prob"], ["boxes"], domain="plugins"))
    made.graph.output[0].name = "boxes"
    made.opset_import.append(helper.make_opsetid("plugins", 1))
    with pytest.raises(InputError, match=r"does not have: EfficientNMS_TRT \(domain plugins\)") as error:
        table_of(save(made, tmp_path / "network.onnx"), source, tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_gpu_that_cannot_be_had_is_told(tmp_path, capsys, source, network, monkeypatch):
    monkeypatch.setattr(session, "has_cuda", lambda: True)
    table_of(network, source, tmp_path)
    told = capsys.readouterr()
    assert "warning: ONNX Runtime's CUDA provider does not start" in told.err
    assert "with CPUExecutionProvider" in told.out


def test_dead_and_infinite_values_are_named(tmp_path, capsys, source):
    nodes = [
        node("Sub", ["data", "data"], ["dead"]),
        node("Log", ["dead"], ["infinite"]),
        node("Exp", ["infinite"], ["back"]),
        node("Add", ["back", "data"], ["prob"]),
    ]
    made = model(nodes, {"data": ["N", 3, 16, 16]}, {"prob": ["N", 3, 16, 16]}, {})
    table = table_of(save(made, tmp_path / "network.onnx"), source, tmp_path)
    captured = capsys.readouterr().err
    assert "all values were zero: tensors 'dead', 'back'" in captured
    assert "values were infinite: tensor 'infinite'" in captured
    assert "infinite" not in table.scales
    assert table.scales["dead"] == 0.0


# images


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "folder"
    (path / "inner").mkdir(parents=True)
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20], pixels[:, 20:] = (255, 0, 0), (0, 51, 0)
    Image.fromarray(pixels).save(path / "inner" / "a.png")
    return path


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], 1.0),
        (["--scale", "1"], 255.0),
        (["--mean", "0.5", "--std", "0.25"], 2.0),
        (["--mean", "0", "0", "0", "--std", "1", "0.01", "1"], 20.0),
        (["--mean", "0", "0", "0", "--std", "0.01", "1", "1", "--channels", "bgr"], 1.0),
        (["--fit", "letterbox", "--mean", "0", "0", "0", "--std", "1", "1", "0.01"], 100 * 114 / 255),
        (["--fit", "stretch"], 1.0),
        (["--resize", "32"], 1.0),
    ],
)
def test_how_an_image_becomes_the_input(folder, tmp_path, arguments, expected, network):
    table = table_of(network, folder, tmp_path, "--algorithm", "minmax", *arguments)
    assert table.dynamic_ranges["data"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--size", "8"], "--size 8 8 does not fit"),
        (["--size", "8", "8", "8"], "not 3 numbers"),
        (["--channels", "gray"], "--channels gray does not fit"),
        (["--mean", "1", "2"], "--mean takes one number or 3"),
        (["--std", "0"], "none that is 0"),
        (["--fill", "256"], "--fill"),
        (["--tensorrt-version", "9.0.0"], "TensorRT 9"),
        (["--algorithm", "legacy", "--quantile", "2"], "--quantile"),
    ],
)
def test_options_that_do_not_fit(folder, tmp_path, arguments, complaint, network):
    with pytest.raises(InputError, match=complaint):
        table_of(network, folder, tmp_path, *arguments)


# bad input


@pytest.fixture
def refused(tmp_path):
    """Asserts that calibration ends with one line, and that an existing table survives."""
    output = tmp_path / "made.cache"
    CalibrationTable({"x": 1.0}).write(output)
    before = output.read_bytes()

    def refused(network, source, complaint, *arguments):
        with pytest.raises(InputError, match=complaint) as error:
            table_of(network, source, tmp_path, *arguments)
        assert "\n" not in str(error.value)
        assert output.read_bytes() == before

    return refused


def test_what_is_clipped_much_is_named(images, tmp_path, capsys):
    nodes = [
        node("MaxPool", ["data"], ["pool"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", ["pool", "w"], ["out"]),
    ]
    made = model(nodes, {"data": ["N", 3, 16, 16]}, {"out": ["N", 2, 8, 8]}, {"w": np.ones((2, 3, 1, 1), np.float32)})
    network = save(made, tmp_path / "network.onnx")
    np.save(tmp_path / "images.npy", images)
    line = ["calibrate", network, "--images", tmp_path / "images.npy", "--output", tmp_path / "table", "--json"]
    assert run(*line, "--algorithm", "percentile", "--percentile", "80") == 0
    found = capsys.readouterr()
    assert json.loads(found.out)["clipped"] == {"pool": pytest.approx(0.2, abs=0.01)}
    assert "warning: percentile clips 20" in found.err
    assert run(*line, "--algorithm", "minmax") == 0
    assert "clips" not in capsys.readouterr().err


def test_a_convolution_of_a_value_whose_rank_nothing_says(source, tmp_path):
    nodes = [
        node("Conv", ["data", "w"], ["c"]),
        node("SequenceConstruct", ["c"], ["list"]),
        node("Optional", ["list"], ["given"]),
        node("OptionalGetElement", ["given"], ["lists"]),
        node("SequenceAt", ["lists", "first"], ["value"]),
        node("Conv", ["value", "w"], ["again"]),
        node("Relu", ["again"], ["out"]),
    ]
    generator = np.random.default_rng(6)
    weights = {"w": weight(generator, 3, 3, 3, 3), "first": np.array(0)}
    made = model(nodes, {"data": ["N", 3, 16, 16]}, {"out": None}, weights)
    table = table_of(save(made, tmp_path / "network.onnx"), source, tmp_path)
    assert list(table.scales) == ["data", "c", "value", "again", "out"]


def test_outputs_that_cannot_be_written_are_found_before_the_work(source, tmp_path, network, monkeypatch):
    monkeypatch.setattr("calib.onnx.calibrate.calibrate_onnx", None)
    (tmp_path / "file").touch()
    for outputs, complaint in (
        (["--output", tmp_path], "is a folder"),
        (["--output", tmp_path / "table", "--qdq", tmp_path], "is a folder"),
        (["--output", tmp_path / "file" / "table"], "cannot write table into .*file: "),
        (["--output", tmp_path / "table", "--qdq", tmp_path / "file" / "int8.onnx"], "cannot write int8.onnx into"),
    ):
        with pytest.raises(InputError, match=complaint):
            run("calibrate", network, "--images", source, *outputs)


def test_arrays_that_do_not_fit(images, tmp_path, refused, network):
    path = tmp_path / "images.npy"
    nan, infinite = images.copy(), images.copy()
    nan[3, 0, 0, 0], infinite[3, 0, 0, 0] = np.nan, np.inf
    for array, complaint in (
        (images.astype(np.float64), r"is float64, and the network takes float32 \[N, 3, 16, 16\]"),
        ((images * 255).astype(np.uint8), "is uint8"),
        (images[:, :1], r"is \[40, 1, 16, 16\], and the network takes"),
        (images[0], r"is \[3, 16, 16\]"),
        (images[:0], "is empty"),
        (nan, "batch 1, input data: the values hold NaN"),
        (infinite, "batch 1, input data: the values hold NaN or infinity"),
        (np.zeros_like(images), "is zero in all calibration batches"),
        (np.array([{"x": 1}], dtype=object), "neither a folder"),
    ):
        np.save(path, array)
        refused(network, path, complaint)
    np.save(path, images)
    content = path.read_bytes()
    for length in (0, 5, 60, len(content) // 2):
        path.write_bytes(content[:length])
        refused(network, path, "neither a folder of images nor")
    np.savez(tmp_path / "images.npz", data=images)
    content = (tmp_path / "images.npz").read_bytes()
    for length in (50, len(content) // 2, len(content) - 30):
        (tmp_path / "images.npz").write_bytes(content[:length])
        refused(network, tmp_path / "images.npz", "neither a folder of images nor")
    refused(network, tmp_path / "missing", "cannot read")
    with zipfile.ZipFile(tmp_path / "images.npz", "w") as archive:
        archive.writestr("data", "text")
    refused(network, tmp_path / "images.npz", "'data' is no array: write the file with numpy.savez")


def test_the_order_of_bytes_and_values_does_not_matter(images, tmp_path, network):
    tables = []
    for array in (images, images.astype(">f4"), np.asfortranarray(images)):
        np.savez(tmp_path / "images.npz", data=array, unused=np.ones(3))
        tables.append(table_of(network, tmp_path / "images.npz", tmp_path))
    assert tables[0] == tables[1] == tables[2]


def test_a_single_number_as_input(images, tmp_path, refused):
    nodes = [node("Mul", ["data", "factor"], ["out"])]
    made = model(nodes, {"data": ["N", 3, 16, 16], "factor": []}, {"out": ["N", 3, 16, 16]}, {})
    np.savez(tmp_path / "inputs.npz", data=images, factor=np.float32(2))
    refused(save(made, tmp_path / "network.onnx"), tmp_path / "inputs.npz", "input 'factor' of the network is a single")


def test_networks_of_integers_or_of_types_that_onnx_runtime_does_not_compute(images, tmp_path, refused):
    made = model([node("Neg", ["data"], ["out"])], {"data": ["N", 3]}, {"out": ["N", 3]}, {}, data=6, out=6)
    np.savez(tmp_path / "integers.npz", data=np.arange(12, dtype=np.int32).reshape(4, 3))
    refused(save(made, tmp_path / "network.onnx"), tmp_path / "integers.npz", "computes with integers alone")
    made = model([node("Neg", ["one"], ["out"])], {}, {"out": [1]}, {"one": np.ones(1, np.float32)})
    refused(save(made, tmp_path / "network.onnx"), tmp_path / "integers.npz", "has no input")
    wide = weight(np.random.default_rng(0), 4, 3, 3, 3).astype(np.float64)
    nodes = [node("Cast", ["data"], ["wide"], to=TensorProto.DOUBLE), node("Conv", ["wide", "w"], ["out"])]
    made = model(nodes, {"data": ["N", 3, 16, 16]}, {"out": ["N", 4, 14, 14]}, {"w": wide}, out=TensorProto.DOUBLE)
    np.save(tmp_path / "images.npy", images)
    refused(save(made, tmp_path / "network.onnx"), tmp_path / "images.npy", "take .*onnx: Could not find an implement")


def test_text_as_input(images, tmp_path, refused):
    made = classifier()
    made.graph.input.append(onnx.helper.make_tensor_value_info("text", TensorProto.STRING, ["N"]))
    np.savez(tmp_path / "inputs.npz", data=images, text=np.array(["a"] * len(images)))
    refused(save(made, tmp_path / "network.onnx"), tmp_path / "inputs.npz", "input 'text' of the network is text")


def test_folders_that_do_not_fit(folder, tmp_path, refused, network):
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(network, empty, "holds no image")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    refused(network, folder, "broken.jpg is not a readable image")


def test_broken_networks(tmp_path, refused, source, network):
    content = network.read_bytes()
    for length in {0, 1, 10, len(content) // 2, len(content) - 1, *range(100, len(content), 997)}:
        network.write_bytes(content[:length])
        refused(network, source, r"network\.onnx")
    made = classifier()
    made.graph.node[0].input[0] = "nowhere"
    refused(save(made, network), source, "ONNX Runtime does not take")
    made = model([node("QuantizeLinear", ["data", "s"], ["q"])], {"data": [1]}, {"q": [1]}, {"s": np.float32(1)})
    refused(save(made, network), source, "takes no table")
    refused(tmp_path / "missing.onnx", source, "cannot read")
