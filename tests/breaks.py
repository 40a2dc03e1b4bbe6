"""Break central rules on purpose, one at a time, and see that a test fails: ``python tests/breaks.py [NAME ...]``.

Each break is made in a temporary copy of the checkout. The tests named with it must pass before and fail after.
"""

import importlib
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Break:
    """A rule, and what breaks it.

    Attributes:
        name: Short.
        rule: What the code must do.
        file: Where it does so.
        old: What stands there, once.
        new: What breaks it.
        test: What must fail then.
    """

    name: str
    rule: str
    file: str
    old: str
    new: str
    test: str


BREAKS = (
    Break(
        "doubling",
        "the range doubles until a later batch fits",
        "calib/histogram/base.py",
        "limit *= 2",
        "limit = largest",
        "tests/calib/histogram/test_base.py::test_range_doubles_and_bins_merge_in_pairs",
    ),
    Break(
        "float32 bins",
        "a bin is trunc(abs(x) * (2048 / range)), in float32",
        "calib/histogram/base.py",
        "np.multiply(exact, factor, out",
        "np.multiply(exact.astype(np.float64), BINS / limit, out",
        "tests/calib/histogram/test_base.py::test_a_value_just_below_an_edge_can_count_above_it",
    ),
    Break(
        "zeros",
        "the first bin counts like the second one",
        "calib/algorithms/search.py",
        "np.concatenate([histogram.counts[1:2], histogram.counts[1:]])",
        "histogram.counts",
        "tests/calib/test_algorithms.py::test_zeros_do_not_move_the_entropy2_threshold",
    ),
    Break(
        "first candidate",
        "the search begins with 128 bins",
        "calib/algorithms/search.py",
        "_CANDIDATES = np.arange(MERGED_LEVELS, BINS + 1)",
        "_CANDIDATES = np.arange(MERGED_LEVELS + 1, BINS + 1)",
        "tests/calib/test_algorithms.py::test_adversarial_histograms",
    ),
    Break(
        "ties",
        "of equal divergences the largest candidate wins",
        "calib/algorithms/search.py",
        "_CANDIDATES[divergences <= divergences.min() + TIE][-1]",
        "_CANDIDATES[divergences <= divergences.min() + TIE][0]",
        "tests/calib/test_algorithms.py::test_largest_of_equal_divergences_wins",
    ),
    Break(
        "passed over",
        "a candidate that leaves values beyond it needs a filled last bin, and a second one",
        "calib/algorithms/search.py",
        "usable = (counts[_CANDIDATES - 1] > 0) & (filled[_CANDIDATES] > 1)",
        "usable = filled[_CANDIDATES] > 0",
        "tests/calib/test_algorithms.py::test_candidates_that_leave_values_beyond_need_a_filled_last_bin_and_a_second_one",
    ),
    Break(
        "threshold",
        "threshold = (bins kept + 0.5) * bin width",
        "calib/algorithms/search.py",
        "(kept + 0.5) * histogram.range",
        "kept * histogram.range",
        "tests/calib/test_tensorrt_thresholds.py",
    ),
    Break(
        "scale",
        "scale = threshold / 127",
        "calib/table/text.py",
        "LEVELS = 127",
        "LEVELS = 128",
        "tests/calib/test_calibrator.py::test_a_threshold_lies_half_a_bin_above_the_kept_bins",
    ),
    Break(
        "version",
        "from TensorRT 10 on, line 1 has major * 10000 + minor * 100 + patch",
        "calib/table/version.py",
        "return major * 10000 + minor * 100 + patch",
        "return major * 1000 + minor * 100 + patch",
        "tests/calib/table/test_text.py::test_versions",
    ),
    Break(
        "byte order",
        "a scale is written most significant digit first",
        "calib/table/text.py",
        'return struct.pack(">f", scale).hex()',
        'return struct.pack("<f", scale).hex()',
        "tests/calib/table/test_text.py::test_reads_what_tensorrt_writes",
    ),
    Break(
        "pooling",
        "pooling over a window takes its input's scale",
        "calib/scales.py",
        "source[tensor] = source[own[node.all_input_nodes[0].name]]",
        "source[tensor] = tensor",
        "tests/calib/test_scales.py::test_pooling_windows_share_the_scale_of_their_input_and_nothing_else_shares",
    ),
    Break(
        "weights",
        "weights have one scale for each output channel",
        "calib/int8.py",
        "weight.detach().flatten(1).abs().amax(dim=1)",
        "weight.detach().abs().amax().expand(len(weight))",
        "tests/calib/test_int8.py::test_weights_are_scaled_by_their_channels_maximum",
    ),
    Break(
        "rounding",
        "codes round half to even",
        "calib/int8.py",
        "(values / scale).round_()",
        "(values / scale).add_(0.5).floor_()",
        "tests/calib/test_int8.py::test_ties_round_to_even_and_codes_saturate",
    ),
    Break(
        "exact sums",
        "sums of codes are exact, whatever their number",
        "engines/integer.py",
        "_EXACT_FLOAT32 = 2**24",
        "_EXACT_FLOAT32 = 2**30",
        "tests/engines/test_integer.py::test_matrix_products_are_exact",
    ),
    Break(
        "either type",
        "the file for a CPU holds the same codes in both types of a weight",
        "engines/onnxruntime/weights.py",
        "np.array(MIDDLE, np.int32)",
        "np.array(MIDDLE - 1, np.int32)",
        "tests/engines/onnxruntime/test_weights.py::test_both_types_hold_the_same_codes",
    ),
    Break(
        "atomic",
        "a file is old or new, never torn",
        "common/files.py",
        "                yield temporary\n",
        "                yield path\n                temporary.write_bytes(path.read_bytes())\n",
        "tests/common/test_files.py::test_a_failing_writer_leaves_the_old_file_and_nothing_else",
    ),
    Break(
        "stale",
        "a table of other weights or images is made again",
        "common/side_file.py",
        "if old != after[name]}",
        'if old != after[name] and name not in ("weights", "data")}',
        "tests/calib/test_cache.py::test_every_change_calibrates_again_and_is_named",
    ),
    Break(
        "one way",
        "data flows one way: no package imports one that is after it",
        "data/targets.py",
        "from common.files import read_text",
        "from calib.table.formats import read_text",
        "tests/test_house.py::test_a_package_imports_what_it_may_alone",
    ),
    Break(
        "one door",
        "one file imports TensorRT",
        "engines/tensorrt/match.py",
        "from calib.table import CalibrationTable",
        "import tensorrt",
        "tests/test_house.py::test_one_file_imports_tensorrt",
    ),
)


def run_tests(folder: Path, tests: list[str]) -> tuple[int, str]:
    """Run tests of a checkout until the first one fails; returns pytest's exit code and what it printed.

    In a fork of this process, which has imported the libraries, and nothing of the checkout.
    """
    output = folder / "output.txt"
    process = os.fork()
    if process == 0:
        with open(output, "w", encoding="utf-8") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
            os.chdir(folder)
            sys.path[0] = str(folder)
            code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status), output.read_text(encoding="utf-8")


def warm() -> None:
    """Import the libraries that tests need, once for all."""
    for library in ("hypothesis", "lightning.pytorch", "onnx", "onnxruntime", "sklearn.datasets", "torchvision"):
        importlib.import_module(library)


def copy_checkout(folder: Path) -> Path:
    """What tests need of the checkout, without environments and results."""
    left = shutil.ignore_patterns(".*", "artifacts", "site", "build", "__pycache__", "*.egg-info")
    return Path(shutil.copytree(ROOT, folder / "checkout", ignore=left))


def main(names: list[str]) -> int:
    chosen = [one for one in BREAKS if not names or one.name in names]
    warm()
    unseen = []
    with tempfile.TemporaryDirectory() as name:
        checkout = copy_checkout(Path(name))
        code, printed = run_tests(checkout, [one.test for one in chosen])
        if code != 0:
            print(printed, file=sys.stderr)
            raise SystemExit("error: these tests fail without a break, too")
        for one in chosen:
            path = checkout / one.file
            whole = path.read_text(encoding="utf-8")
            assert whole.count(one.old) == 1, (one.name, one.file)
            path.write_text(whole.replace(one.old, one.new), encoding="utf-8")
            code, printed = run_tests(checkout, [one.test])
            path.write_text(whole, encoding="utf-8")
            # 1: tests ran, and one failed; an error while they were collected is another code.
            seen = code == 1 and any(line.startswith("FAILED ") for line in printed.splitlines())
            print(f"{'seen' if seen else 'NOT SEEN'}: {one.name}: {one.rule}; {one.test}", flush=True)
            if not seen:
                print(printed, file=sys.stderr)
                unseen.append(one.name)
    return 1 if unseen else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
