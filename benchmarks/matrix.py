"""The table of networks in docs/networks.md: ``python -m benchmarks.matrix --page docs/networks.md``.

Each network runs in a process of its own with limits of time and memory (:mod:`benchmarks.one_network`); what becomes
of it is one JSON line in a file, from which a run that was interrupted goes on, and from which ``--no-run --page``
makes the page on any machine. timm and transformers take part where they are installed.

    python -m benchmarks.matrix torchvision:resnet18 timm:vit_tiny_patch16_224 --size 224
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import logging
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Final

from benchmarks.one_network import NetworkRow
from common.cli import ROOT
from common.command import run_command
from common.console import start_logging
from common.errors import ExitCode, InputError
from common.files import write_text
from common.versions import installed_versions

logger = logging.getLogger("benchmarks")

SIZE: Final = 64
"""Height and width of the images of networks that take any: the shares hardly depend on it, the time does."""

SIZES: Final = {
    **dict.fromkeys(("torchvision:alexnet", "torchvision:inception_v3"), 96),
    **dict.fromkeys(("torchvision:maxvit_t", "torchvision:swin_t", "torchvision:swin_v2_t"), 224),
    **dict.fromkeys(("timm:coatnet_pico_rw_224", "timm:levit_128s", "timm:swin_tiny_patch4_window7_224"), 224),
    "torchvision:vit_h_14": 56,
    "timm:efficientformer_l1": 224,
    "transformers:swin": 128,
}
"""Networks that take no images of 64 pixels, or fail on them."""

SMALL: Final = (
    "torchvision:shufflenet_v2_x0_5",
    "torchvision:mobilenet_v2",
    "timm:tf_efficientnet_lite0",
    "transformers:convnext",
)
"""What CI runs of them, where installed."""

TIMM: Final = (
    *("resnetv2_50", "eca_nfnet_l0", "tf_efficientnet_lite0", "mobilenetv3_small_100", "mobilevit_xxs"),
    *("convnextv2_atto", "vit_tiny_patch16_224", "mixer_s16_224", "resmlp_12_224", "gmlp_ti16_224"),
    *("edgenext_xx_small", "ghostnet_050", "levit_128s", "poolformer_s12", "repvgg_a0", "rexnet_100"),
    *("coatnet_pico_rw_224", "cait_xxs24_224", "swin_tiny_patch4_window7_224", "selecsls42", "tresnet_m"),
    *("visformer_tiny", "xcit_nano_12_p16_224", "pit_ti_224", "efficientformer_l1", "dla34", "dpn48b"),
    *("deit_tiny_distilled_patch16_224", "hrnet_w18_small", "nf_resnet50"),
)
TRANSFORMERS: Final = ("resnet", "vit", "convnext", "swin", "deit", "beit", "convnextv2", "regnet", "mobilenet_v2")

_PAGE: Final = """\
# Networks

What becomes of other people's networks: traced, calibrated, exported and executed by
`python -m benchmarks.matrix --page docs/networks.md`, which made this page. Each in a process of its own, with at most
{seconds} s and {memory} GiB.

**Weights are random**: trained ones would have to be downloaded. So these figures say which networks go through, how
much of them computes in INT8, and whether every form of the network computes the same; they say nothing about the
accuracy that INT8 costs. Rounding grows from layer to layer in a network that was not trained, and its largest outputs
lie close together: agreement with FP32 is smaller than that of a trained network, and the verdict of `evaluate.py`,
which asks for 90 %, is not meant for it. Calibrated on {calibration} images and judged on {images}, smooth random ones.

- **INT8, file**: percent of the multiply-accumulates in INT8 in `*_int8.onnx`; **executed**: as ONNX Runtime's kernels
  compute `*_int8_cpu.onnx` on this CPU.
- **SQNR**: of the integer simulation to FP32, dB; **as FP32**: images with the same largest output, percent.
- **file =, kernels =**: images on which the file, run as it is written, and ONNX Runtime's integer kernels give the
  largest output of their simulation, percent. **stirred =**: on which the simulation gives that of its own where the
  images change by a millionth of their values. A file that is run as it is written computes in float32: a value that
  lies between two codes can be rounded to the other one, and a network that was not trained lets that grow, as it does
  a change of the images. So where **stirred =** is low, a low **file =** says little about the file; the one is no
  bound of the other, since a file rounds in every layer. The integer kernels are simulated as they sum and round
  convolutions, matrix products and sums; what they compute in float between the layers (LayerNorm, softmax, SiLU)
  rounds otherwise than in PyTorch, and that grows likewise. Agreement is counted over few images: one is {one} %.
- **export**: seconds for the three files; **all**: for everything, PyTorch's import apart. One thread, beside whatever
  else runs on the machine: they tell minutes from seconds.

{setting}

"""


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.matrix",
        description="Trace, calibrate, export and execute many networks, and write down what becomes of each.",
    )
    result.add_argument("networks", nargs="*", metavar="SOURCE:NAME", help="such as timm:dla34 (default: all known)")
    result.add_argument("--small", action="store_true", help="a few small networks instead of all")
    result.add_argument("--size", type=int, help=f"height and width of the images (default: {SIZE}, or the smallest)")
    result.add_argument("--seconds", type=int, default=600, help="limit for one network (default: %(default)s)")
    result.add_argument("--jobs", type=int, default=1, help="networks at the same time (default: %(default)s)")
    result.add_argument("--memory", type=int, default=16, help="limit for one network, GiB (default: %(default)s)")
    result.add_argument("--results", type=Path, default=Path("artifacts/networks.jsonl"), help="a JSON line for each")
    result.add_argument("--again", action="store_true", help="run those that failed once more")
    result.add_argument("--no-run", action="store_true", help="run nothing: show the results that there are")
    result.add_argument("--page", type=Path, help="write them as a page of Markdown")
    result.add_argument("--json", action="store_true", help="print the results as JSON instead of a table")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; a network that fails is a result."""
    options = parser().parse_args(argv)
    start_logging()
    wanted = options.networks or list(SMALL if options.small else known())
    here, rows = read(options.results, None if options.no_run else setting())
    if not options.networks and not options.small:
        wanted += [name for name in rows if name not in wanted]
    if not options.no_run:
        pending = [name for name in wanted if name not in rows or (options.again and rows[name].failed)]
        _run_all(pending, rows, here, options)
    shown = [rows[name] for name in wanted if name in rows]
    if options.page:
        missing = [name for name in wanted if name not in rows]
        write_text(options.page, page(shown, missing, here, options.seconds, options.memory))
        logger.info("wrote %s", options.page)
    if options.json:
        print(json.dumps({"setting": here, "networks": [dataclasses.asdict(row) for row in shown]}, indent=1))
    else:
        print(table(shown))
    return ExitCode.PASSED


def _run_all(
    pending: Sequence[str], rows: dict[str, NetworkRow], here: dict[str, Any], options: argparse.Namespace
) -> None:
    """Run networks, some at the same time, and keep each result as soon as it is there."""

    def run(name: str) -> NetworkRow:
        return run_one(name, options.size or SIZES.get(name, SIZE), options.seconds, options.memory)

    begin = time.perf_counter()
    with ThreadPoolExecutor(options.jobs) as pool:
        started = {pool.submit(run, name): name for name in pending}
        try:
            for number, done in enumerate(as_completed(started), 1):
                name = started[done]
                row = rows[name] = done.result()
                append(options.results, here, row)
                logger.info(
                    "%d of %d, %.0f s: %s: %s",
                    *(number, len(pending), time.perf_counter() - begin),
                    *(name, row.failed or f"{_share(row)} % in INT8"),
                )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def known() -> list[str]:
    """All networks of the page whose package is installed, torchvision's classifiers the smallest first."""
    from torchvision import models

    names = models.list_models(module=models)
    weights = {name: models.get_model_weights(name).DEFAULT.meta["num_params"] for name in names}
    found = [f"torchvision:{name}" for name in sorted(names, key=lambda name: int(weights[name]))]
    for source, listed in (("timm", TIMM), ("transformers", TRANSFORMERS)):
        if importlib.util.find_spec(source):
            found += [f"{source}:{name}" for name in listed]
    return found


def setting() -> dict[str, Any]:
    """The processor and the versions that results hold for."""
    from evaluation.environment import environment

    here = environment()
    versions = {**here.versions, **installed_versions("timm", "transformers")}
    return {"processor": here.processor, "instructions": here.instructions, "versions": versions}


def read(path: Path, here: dict[str, Any] | None) -> tuple[dict[str, Any], dict[str, NetworkRow]]:
    """The setting of the results so far, and network -> what became of it; a line that was cut off is left out.

    Args:
        path: The file.
        here: The setting that new results will have; None where there will be none.

    Raises:
        InputError: they are of another processor or other versions, or the file is something else.
    """
    try:
        first, *lines = path.read_text(encoding="utf-8").splitlines() or [""]
    except FileNotFoundError:
        return here or setting(), {}
    try:
        there = json.loads(first)["setting"]
        if here is not None and there != here:
            raise InputError(f"{path} has results of another processor or other versions: remove it, or use --results")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} holds no results of this command: remove it, or use --results") from error
    rows = {}
    for line in lines:
        try:
            row = NetworkRow(**json.loads(line))
        except (ValueError, TypeError):
            continue
        rows[row.network] = row
    return there, rows


def append(path: Path, here: dict[str, Any], row: NetworkRow) -> None:
    """Add a result to the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with path.open("a", encoding="utf-8") as file:
        if fresh:
            file.write(json.dumps({"setting": here}) + "\n")
        file.write(json.dumps(dataclasses.asdict(row)) + "\n")


def run_one(network: str, size: int, seconds: int, memory: int) -> NetworkRow:
    """Run a network in a process of its own; what goes wrong with the process is in the row as well."""
    line = [sys.executable, "-m", "benchmarks.one_network", network, str(size)]
    row = NetworkRow(network, size)
    try:
        done = subprocess.run(
            line,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
            preexec_fn=_limit(memory << 30),
        )
    except subprocess.TimeoutExpired:
        row.failed = f"not done after {seconds} s"
        return row
    try:
        return NetworkRow(**json.loads(done.stdout.splitlines()[-1]))
    except (ValueError, TypeError, IndexError):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        row.failed = f"ended with exit code {done.returncode}: {last}"
        return row


def _limit(memory: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))


_COLUMNS: Final = (
    *("network", "pixels", "M weights", "traced by", "G MACs", "INT8, file", "executed", "SQNR", "as FP32"),
    *("stirred =", "file =", "kernels =", "export", "all"),
)


def table(rows: Iterable[NetworkRow]) -> str:
    """The rows as a table of Markdown, those that failed with their reason."""
    lines = ["| " + " | ".join(_COLUMNS) + " |", "| --- |" + " ---: |" * (len(_COLUMNS) - 1)]
    for row in rows:
        if row.failed:
            reason = row.failed.replace("|", "\\|").replace("<", "\\<")
            lines.append(f"| {row.network} | {row.size} | {reason} |" + " |" * (len(_COLUMNS) - 3))
            continue
        cells = (
            *(row.network, row.size, f"{row.parameters:.1f}", row.traced_by, f"{row.gmacs:.2f}"),
            *(_number(row.file_share), _number(row.executed_share), _number(row.sqnr), _number(row.fp32_agreement)),
            *(_number(row.stirred_agreement), _number(row.file_agreement), _number(row.cpu_agreement)),
            *(_number(row.seconds["export"]), _number(sum(row.seconds.values()))),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def page(rows: Sequence[NetworkRow], missing: Sequence[str], here: dict[str, Any], seconds: int, memory: int) -> str:
    """The page of Markdown."""
    from benchmarks.one_network import IMAGES

    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
    instructions = ", ".join(here["instructions"])
    text = _PAGE.format(
        seconds=seconds,
        memory=memory,
        images=IMAGES,
        calibration=IMAGES // 2,
        one=_number(100 / IMAGES),
        setting=f"{here['processor']} ({instructions}); {versions}.",
    )
    through = [row for row in rows if not row.failed]
    for limit in (95, 90):
        count = sum((row.executed_share or 0) >= limit for row in through)
        text += f"- {count} of {len(rows)} networks execute at least {limit} % of their multiply-accumulates in INT8.\n"
    failed = len(rows) - len(through)
    text += f"- {f'{failed} of them fail, each with its reason' if failed else 'None of them fails'}.\n\n{table(rows)}"
    below = [row for row in through if (row.executed_share or 0) < 95]
    if below:
        text += "\nBelow 95 % as executed, with the largest layers in float:\n\n"
        text += "".join(
            f"- {row.network}: {_number(row.executed_share)} %; {', '.join(row.in_float)}\n" for row in below
        )
    if missing:
        text += f"\nNot run for this page: {', '.join(missing)}.\n"
    return text


def _share(row: NetworkRow) -> str:
    return _number(row.executed_share)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


if __name__ == "__main__":
    run_command(main)
