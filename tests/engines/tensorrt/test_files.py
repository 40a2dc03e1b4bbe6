"""Names of built engines; when one may be used again: test_engine."""

from engines.tensorrt.files import engine_file


def test_engine_file_says_what_it_is():
    name = engine_file("LeNet", "int8-implicit", 32, "NVIDIA H200", "10.12.0.36")
    assert name == "LeNet_int8-implicit_b32_NVIDIA-H200_trt10.12.0.36.ts"


def test_engine_file_stays_in_its_folder():
    name = engine_file("../Le Net", "fp32", 1, "NVIDIA GeForce RTX 4090 / D", "10.12.0.36")
    assert "/" not in name
    assert " " not in name
    assert not name.startswith(".")
