from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.macs import ENOUGH, LayerMacs, MacCount, amount, percent

COUNT = MacCount(
    "as exported",
    [
        LayerMacs("conv1", "Conv", 900_000, True),
        LayerMacs("fc", "Gemm", 1_000, False, "the value pool is not quantized"),
        LayerMacs("attention", "MatMul", 2_000, False, "the value q is not quantized"),
    ],
)


SUMMARY = "INT8: 99.7 % of 903.0 k multiply-accumulates; in float: attention (2.0 k), fc (1.0 k)"


@pytest.mark.parametrize(
    ("count", "summary"),
    [
        (COUNT, SUMMARY),
        (replace(COUNT, uncounted=["loop"]), f"{SUMMARY}; not counted: loop"),
        (MacCount("", []), "INT8: the network has no convolution and no matrix product"),
    ],
)
def test_the_summary_names_the_largest_layers_in_float_first(count: MacCount, summary: str) -> None:
    assert count.summary() == summary
    assert count.warning() is None


def test_a_small_share_is_a_warning_with_its_reasons_the_costliest_first() -> None:
    layers = [LayerMacs(f"conv{index}", "Conv", 10, False, "the weight is not quantized") for index in range(5)]
    warning = MacCount(
        "", [LayerMacs("fc", "Gemm", 50, True), *layers, LayerMacs("x", "Conv", 1, False, "kept in float as asked")]
    ).warning()

    assert warning == (
        "only 49.5 % of the multiply-accumulates are in INT8; in float: 49.5 % in conv0, conv1, conv2 and 2 more "
        "layers (the weight is not quantized), 1.0 % in x (kept in float as asked)"
    )


@pytest.mark.parametrize(
    ("layers", "warning"),
    [
        (1, "in float: 100.0 % in q0 (no scale for v0 in the table)"),
        (4, "25.0 % in q2 (no scale for v2 in the table) and 1 more part"),
        (5, "20.0 % in q2 (no scale for v2 in the table) and 2 more parts"),
    ],
)
def test_the_warning_names_the_first_few_reasons(layers: int, warning: str) -> None:
    kept = [LayerMacs(f"q{at}", "MatMul", 10, False, f"no scale for v{at} in the table") for at in range(layers)]

    assert str(MacCount("", kept).warning()).endswith(warning)


@pytest.mark.parametrize(("int8", "warned"), [(900, False), (899, True), (0, True), (1000, False)])
def test_the_warning_comes_below_enough(int8: int, warned: bool) -> None:
    layers = [LayerMacs("a", "Conv", int8, True), LayerMacs("b", "Conv", 1000 - int8, False, "c")]

    assert ENOUGH == 90
    assert (MacCount("", layers).warning() is not None) is warned


@given(st.integers(0, 10**12), st.integers(1, 10**12))
def test_all_and_nothing_are_only_said_of_all_and_nothing(part: int, rest: int) -> None:
    text = percent(100 * part / (part + rest))

    assert text != "100.0"
    assert (text == "0.0") is (part == 0)


def test_amounts() -> None:
    assert [amount(value) for value in (0, 999, 1_000, 4_089_184_256)] == ["0", "999", "1.0 k", "4.1 G"]
