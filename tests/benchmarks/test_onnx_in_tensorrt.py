"""The ONNX files in TensorRT, over ONNX Runtime in its place: what is trained, compared and shown."""

import onnx
import pytest
import torch

from benchmarks.hardware import answer_table, race_table
from benchmarks.onnx_in_tensorrt import NETWORKS, Answer, Race, answers, files, make_model, train
from calib.table import CalibrationTable
from calib.tracing import trace
from common.config import DataConfig
from common.errors import InputError
from data import open_splits
from engines.onnxruntime.engine import open_session
from models import LeNet


class InPlace:
    seconds, layers = 0.25, 12

    def __init__(self, model: bytes) -> None:
        self.session, _ = open_session(onnx.load_model_from_string(model), 1, optimize=False)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.session.run(None, {"data": images.numpy()})[0])


def test_a_network_is_trained_and_its_engine_compared_with_the_simulation():
    asked = []

    def build(model, batch, **options):
        asked.append((batch, options))
        if len(asked) == 2:
            raise InputError("TensorRT does not build the network, for the reason above")
        return InPlace(model)

    digits = open_splits(DataConfig(dataset="digits"), 1)
    found, failed = answers(["lenet", "small_resnet"], digits, 0.2, build)
    assert asked[0] == (100, {"int8": True, "level": 0, "timings": 1})
    assert (found.network, found.built, found.layers) == ("lenet", 0.25, 12)
    assert found.agrees > 90
    assert found.off < found.moved
    assert failed == "small_resnet: TensorRT does not build the network, for the reason above"


def test_training_moves_the_weights():
    torch.manual_seed(0)
    model = LeNet()
    before = model.conv1.weight.detach().clone()
    train(model, open_splits(DataConfig(dataset="digits"), 1).train, 28, 0.05, 1e-3)
    assert not torch.equal(model.conv1.weight, before)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3", "squeezenet1_1"])
def test_networks_that_are_made_otherwise_have_one_output_of_ten_scores(name):
    model = make_model(name).train()
    scores = model(torch.rand(2, 3, NETWORKS[name], NETWORKS[name]))
    assert scores.shape == (2, 10)
    assert scores.std() > 0


def test_the_files_that_are_timed():
    network = trace(LeNet().eval(), "LeNet", (1, 28, 28))
    made = files(network, "10.6.0")
    table = CalibrationTable.loads(made["implicit"][1].decode(), "here")
    assert table.header == "TRT-100600-EntropyCalibration2"
    assert {"data", "conv1", "conv2", "ip1"} <= table.scales.keys()
    assert made["FP32"] == (made["implicit"][0], b"")
    operators = [node.op_type for node in onnx.load_model_from_string(made["file"][0]).graph.node]
    assert operators.count("QuantizeLinear") == 4


def test_the_tables():
    one = Answer("lenet", 1.25, 12, 99.9, 2.3e-5, 0.01234, 99.8, 98.0, 97.9)
    assert answer_table([one, "alexnet: no"]).splitlines()[2:] == [
        "| lenet | 1.2 s | 12 | 99.9 % | 2.3e-05 | 0.012 | 99.8 % | 98.0 % | 97.9 % |",
        "",
        "- alexnet: no",
    ]
    race = Race("LeNet", 1, {"FP32": [0.02, 0.03], "implicit": [0.04, 0.06], "file": [0.05, 0.04]})
    line = "| LeNet, batch 1 | 0.0250 (0.0200 0.0300) | 0.0500 (0.0400 0.0600) | 0.0450 (0.0500 0.0400) | 0.90 |"
    assert race_table([race]).splitlines()[2] == line
