"""Weights whose type the file chooses while it is loaded: by the sums that the CPU at hand gives."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from engines.onnx.int8 import int8_model
from engines.onnxruntime.engine import open_session, sums_are_exact
from tests.networks import images, make_network, make_plan

INT8, UINT8 = onnx.TensorProto.INT8, onnx.TensorProto.UINT8


def stored(model: onnx.ModelProto) -> list[np.ndarray]:
    """The codes of the weights, in the order of their layers."""
    codes = {value.name: value for value in model.graph.initializer if value.data_type in (INT8, UINT8)}
    read = [codes[name] for node in model.graph.node for name in node.input if name in codes]
    return [numpy_helper.to_array(value) for value in read if len(value.dims) > 1]


def loaded(model: onnx.ModelProto) -> list[np.ndarray]:
    """The same of what ONNX Runtime makes of a file on this CPU, where no choice may be left."""
    _, optimized = open_session(model, threads=1)
    assert "If" not in {node.op_type for node in optimized.graph.node}
    return stored(optimized)


@pytest.fixture(scope="module")
def lenet() -> onnx.ModelProto:
    return int8_model(make_plan(make_network("lenet")), for_cpu=True)


def test_weights_are_int8_where_their_sums_are_exact_and_behind_a_relu(lenet):
    """conv1, conv2 and ip1 read values of both signs, ip2 what a ReLU gives."""
    open_to_choice = np.int8 if sums_are_exact(np.int8) else np.uint8
    assert [codes.dtype for codes in loaded(lenet)] == [open_to_choice] * 3 + [np.int8]


def if_sums_were(model: onnx.ModelProto, exact: bool) -> onnx.ModelProto:
    """A file as it is on a CPU whose sums with int8 weights are exact, or are not, whatever this one's are."""
    forced = onnx.ModelProto()
    forced.CopyFrom(model)
    (wanted,) = (value for value in forced.graph.initializer if value.name == "probe_exact_sum")
    (compared,) = (node for node in forced.graph.node if wanted.name in node.input)
    given = numpy_helper.to_array(wanted) + (0 if exact else 1)
    forced.graph.initializer.append(numpy_helper.from_array(given, "given_sum"))
    compared.input[0] = "given_sum"
    return forced


def test_both_types_hold_the_same_codes(lenet):
    signed, unsigned = (loaded(if_sums_were(lenet, exact)) for exact in (True, False))
    assert [codes.dtype for codes in signed] == [np.int8] * 4
    assert [codes.dtype for codes in unsigned] == [np.uint8] * 3 + [np.int8]
    for codes, others in zip(signed, unsigned, strict=True):
        np.testing.assert_array_equal(codes, others.astype(int) - 128 * (others.dtype == np.uint8))


def test_the_numbers_are_the_same_whichever_type_is_taken(lenet):
    batch = images("lenet", 8).numpy()
    taken, unsigned = (
        open_session(model, threads=1)[0].run(None, {"data": batch})[0]
        for model in (lenet, if_sums_were(lenet, exact=False))
    )
    np.testing.assert_array_equal(taken, unsigned)
