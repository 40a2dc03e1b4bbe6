"""Tables and legacy thresholds that TensorRT 10.6.0 wrote on an H100 (``tensorrt/seeded``, see the README there)."""

import gzip
import json

import numpy as np
import pytest

from calib.__main__ import main
from calib.table import CalibrationTable
from calib.threshold import threshold
from tests.calib.seeded_networks import HERE, write
from tests.calib.test_tensorrt_thresholds import histograms  # noqa: F401

# Too slow here, and most of efficientnet_b0's values are tiny: their tables are compared in the README alone.
LEFT_OUT = {"densenet121", "efficientnet_b0"}
TABLES = sorted(path.name for path in (HERE / "tables").glob("*.cache") if path.name.split(".")[0] not in LEFT_OUT)

# Table: entry -> (TensorRT's scale, the scale found here), where they differ by more than 1e-4.
# Near-ties: the last bits of a convolution decide between two candidates whose divergences are within 1e-5.
NEAR_TIES = {
    "attention.entropy2": {
        "/o/MatMul_output_0": (0.0052412814, 0.0052558766),
        "matmul_1": (0.0077166781, 0.0084721232),
    },
    "mixed.entropy2": {"b.0": (0.010698951, 0.010365943)},
    "shuffles.entropy2": {
        "a.2": (0.015709313, 0.01483057),
        "/DepthToSpace_output": (0.015709313, 0.01483057),
        "pixel_shuffle": (0.015709313, 0.01483057),
    },
    "shufflenet_v2_x0_5.entropy2": {"cat_5/getitem_33": (0.0016452292, 0.0015427227)},
    "unary.entropy2": {"sin": (0.0078720786, 0.0078682341)},
}
# Means of normalized values, zero but for rounding; and a softmax of them, all 0.1, where a rounding doubles the range.
ROUNDING = {
    "preact.entropy2": {
        "adaptive_avg_pool2d": (5.799855e-10, 8.0629929e-09),
        "adaptive_avg_pool2d/flatten": (5.799855e-10, 8.0629929e-09),
        "fc": (6.7322437e-10, 2.7357352e-09),
        "prob": (0.00078759383, 0.0015751879),
        "/prob/Softmax_output": (0.00078759383, 0.0015751879),
    },
    "preact.minmax": {
        "adaptive_avg_pool2d": (1.3493178e-09, 7.8612423e-09),
        "adaptive_avg_pool2d/flatten": (1.3493178e-09, 7.8612423e-09),
        "fc": (6.2564004e-10, 4.3485739e-09),
    },
}
# Not explained. The scales of mobilenet_v3_small are those of values near 1e-4, which may be rounding too.
UNEXPLAINED = {
    "mobilenet_v3_small.entropy2": {
        "features.10.block.2.avgpool": (2.2230727e-06, 2.3731093e-06),
        "features.11.block.2.activation": (3.9221404e-06, 7.8442781e-06),
        "features.11.block.2.fc1": (5.1409716e-06, 5.1397151e-06),
        "features.11.block.3.0": (5.1706116e-05, 5.2627405e-05),
    },
    "poolmix.entropy": {
        "avg_pool2d": (0.025355995, 0.023788257),
        "adaptive_max_pool2d/flatten": (0.004340298, 0.0052524335),
    },
    "slices.entropy": {"stem.2/getitem": (0.038869221, 0.038637757)},
}
# Names of what the parser adds around operators whose parts are not known here: in TensorRT's tables alone, and, with
# another number, in ours alone. The constants that they name are those of their entries without "ONNXTRT_Broadcast".
CELU = {f"/Celu{number}_output" for number in ("", "_7", "_8", "_9", "_10", "_11")}
MISSING = {
    "actsmore": CELU
    | {f"tmp_weight{number}_output" for number in ("", "_1", "_2")}
    | {f"ONNXTRT_Broadcast_{number}_output" for number in (4, 6, 14)},
    "attention": {f"ONNXTRT_Broadcast_{number}_output" for number in (*range(34, 41, 2), *range(44, 59, 2))},
    "mixed": {"(Unnamed Layer* 54) [Constant]_output"},
    "mobilenet_v3_small": {"ONNXTRT_Broadcast_23_output"},
    "poolwhole": {"ONNXTRT_Broadcast_3_output"},
    "preact": {"ONNXTRT_Broadcast_6_output"},
    "shuffles": {"ONNXTRT_Broadcast_132_output"},
}
# Elementwise operations that are fused with others, and concatenations that are written in place.
EXTRA_AFTER_FUSION = {
    "multi": {"add_2", "maximum", "minimum", "mul", "mul_1"},
    "se": {"se.scale_activation"},
    "slices": {"/Slice_2_output_0", "cat"},
}
# Near-ties that another CPU may have besides.
TIES = 2


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_tensorrt(name, tmp_path):
    network, algorithm, _ = name.split(".")
    key = f"{network}.{algorithm}"
    onnx_file, batches = write(network, tmp_path)
    wanted = CalibrationTable.read(HERE / "tables" / name)
    output = tmp_path / "made.cache"
    arguments = ["--images", batches, "--output", output, "--algorithm", algorithm, "--tensorrt-version", "10.6.0"]
    assert main(["calibrate", *map(str, [onnx_file, *arguments])]) == 0
    found = CalibrationTable.read(output)
    assert found.header == wanted.header

    fused = algorithm == "entropy"
    assert wanted.scales.keys() - found.scales.keys() == (set() if fused else MISSING.get(network, set()))
    extra = found.scales.keys() - wanted.scales.keys()
    if fused:
        assert extra == EXTRA_AFTER_FUSION.get(network, set())
    else:
        assert all(tensor.startswith("ONNXTRT_Broadcast") for tensor in extra)

    listed = NEAR_TIES.get(key, {}) | ROUNDING.get(key, {}) | UNEXPLAINED.get(key, {})
    for tensor, (scale, _) in listed.items():
        assert wanted.scales[tensor] == pytest.approx(scale, rel=1e-6, abs=0)
    differ = {
        tensor
        for tensor in wanted.scales.keys() & found.scales.keys()
        if found.scales[tensor] != pytest.approx(wanted.scales[tensor], rel=1e-4, abs=0)
    }
    if network == "actsmore":
        # TensorRT's first broadcast constant is one of Celu's, and ours the bias.
        differ.remove("ONNXTRT_Broadcast_output")
    assert len(differ - listed.keys()) <= (0 if algorithm == "minmax" else TIES), differ


def _legacy():
    return json.loads(gzip.decompress((HERE / "legacy.json.gz").read_bytes()))


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.99, 1.0])
def test_legacy_at_other_quantiles(histograms, quantile):  # noqa: F811
    (case,) = [
        case
        for case in _legacy()
        if (case["distributions"], case["quantile"], case["cutoff"]) == ("distributions", quantile, 1)
    ]
    assert len(case["scales"]) == 296
    found = {
        name: np.float32(threshold(histograms[name], "legacy", quantile=quantile).value / 127).view(np.uint32)
        for name in case["scales"]
    }
    assert found == {name: int(digits, 16) for name, digits in case["scales"].items()}
