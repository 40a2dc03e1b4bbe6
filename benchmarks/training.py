"""Training throughput: this project's run against a bare PyTorch loop and against the usual torchvision pipeline."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from torchvision.datasets import MNIST, VisionDataset
from torchvision.transforms import ToTensor

from benchmarks import kernels
from benchmarks.results import Entry, Findings, Table, Target
from benchmarks.setting import Setting
from benchmarks.timing import in_turns, ratio, spread, timed
from common.errors import first_line
from data.base import ImageSet
from data.module import ImageData
from models import fit
from models.classifier import Classifier, parameter_groups
from models.network import logits_of
from models.precision import measure_precision
from models.schedule import learning_rate_factor

OURS = "this project: train.py's Lightning run"
BARE = "bare PyTorch loop over the same tensor"
USUAL = "torchvision Dataset, transforms, DataLoader with 2 workers, under the same Lightning run"
BATCH_SIZES = (64, 256)
IMAGES = 12800
WORKERS = 2
ACCURACY_EPOCHS = 5
BARE_PRODUCT = 1024
"""Rows and columns of the matrices whose product shows what the CPU can do."""

METHOD = (
    f"LeNet's training on {IMAGES:,} images a turn, without augmentation, from the first step to the last, validation "
    "left out, in one precision and without torch.compile for all three. The Lightning runs log to CSV and "
    "TensorBoard, keep metrics and write their checkpoints; the usual one gets the same images from torchvision's "
    "MNIST class (a PIL image each, ToTensor). The bare loop has the same optimiser, schedule, clipping and memory "
    "format, shuffles, and does nothing else."
)


def run(setting: Setting) -> Findings:
    """See the module."""
    fit.quiet()
    default = _precision(setting)
    precisions = [default] if default == "32-true" else [default, "32-true"]
    tables: list[Table] = []
    targets: list[Target] = []
    for precision in precisions:
        for batch in BATCH_SIZES[: 1 if setting.quick else None]:
            steps = setting.images(IMAGES) // batch
            rates = _race(setting, batch, steps, precision, setting.rounds(4))
            name = f"batch {batch}, {precision}"
            tables.append(
                Table(
                    name,
                    "images/s",
                    [Entry(one, spread(rates[one]), ratio(rates[one], rates[OURS])) for one in rates],
                    OURS,
                )
            )
            targets += [
                Target(
                    f"training, {name}: times as fast as the usual pipeline",
                    "at least",
                    1.5,
                    "",
                    ratio(rates[OURS], rates[USUAL]),
                ),
                Target(
                    f"training, {name}: share of the bare loop's images per second",
                    "at least",
                    0.9,
                    "",
                    ratio(rates[OURS], rates[BARE]),
                ),
            ]
    apart = [_step(setting, precision) for precision in precisions]
    return Findings(METHOD, [*tables, *apart, _options(setting), _accuracy(setting, default)], targets)


def _precision(setting: Setting) -> str:
    """What train.py trains in here."""
    options = fit.check_trainer(setting.config.trainer)
    if not options.measure_precision:
        return str(options.values.trainer["precision"])
    info = setting.data.info
    network, shape = setting.new_network(), info.preprocessing.shape
    return measure_precision(network, shape, len(info.classes), setting.config.data.batch_size).precision


def _options(setting: Setting) -> Table:
    """What precision, memory format and compilation give, in the bare loop."""
    # One small step in a trial: bfloat16 is slow where the CPU lacks instructions for it.
    batch = 8 if setting.quick else max(BATCH_SIZES)
    steps = 1 if setting.quick else IMAGES // batch
    images = setting.data.train
    variants = {
        "32-true": _Variant("32-true", channels_last=False),
        "32-true, channels-last": _Variant("32-true"),
        "32-true, channels-last, torch.compile": _Variant("32-true", compiled=True),
        "bf16-mixed": _Variant("bf16-mixed", channels_last=False),
        "bf16-mixed, channels-last": _Variant("bf16-mixed"),
        "bf16-mixed, channels-last, torch.compile": _Variant("bf16-mixed", compiled=True),
    }
    note = (
        "train.py uses channels-last throughout, and bf16-mixed where it measures at the start that it is faster; it "
        "does not compile. Compiling itself is not in these figures."
    )
    if setting.quick:
        # Compiling takes a minute: one is enough to see that it works.
        del variants["bf16-mixed, channels-last, torch.compile"]
    if fault := _compile_fault():
        variants = {name: variant for name, variant in variants.items() if not variant.compiled}
        note += f" torch.compile was not run: {fault}."
    seconds = in_turns(
        {name: partial(_bare, setting, images, batch, steps, variant) for name, variant in variants.items()},
        setting.rounds(4),
        {name: setting.rounds(2) for name, variant in variants.items() if variant.compiled},
        warm_up=not setting.quick,
    )
    rates = {name: [steps * batch / figure for figure in figures] for name, figures in seconds.items()}
    reference = "32-true"
    entries = [Entry(name, spread(rates[name]), ratio(rates[name], rates[reference])) for name in rates]
    return Table(f"what the options give, bare loop, batch {batch}", "images/s", entries, reference, [note])


def _compile_fault() -> str | None:
    """Why torch.compile makes no kernels for a CPU here (it needs a C++ compiler and PyTorch's headers), or None."""
    try:
        torch.compile(torch.sin)(torch.ones(16))
    except RuntimeError as error:  # what all of its exceptions are
        return first_line(error)
    return None


def _step(setting: Setting, precision: str) -> Table:
    """Where the time of a step goes, and what the CPU's bare matrix products would need for the same arithmetic."""
    batch = setting.config.data.batch_size
    images = torch.rand(batch, *setting.data.info.preprocessing.shape, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(batch) % len(setting.data.info.classes)
    network = setting.new_network().train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = SGD(network.parameters(), lr=1e-3, momentum=0.9, nesterov=True, fused=True)
    mixed = precision == "bf16-mixed"

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = F.cross_entropy(logits_of(network)(images), labels)
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(network.parameters(), setting.config.trainer["gradient_clip_val"])
        optimizer.step()

    matrix = torch.rand(BARE_PRODUCT, BARE_PRODUCT).to(torch.bfloat16 if mixed else torch.float32)
    rounds = setting.rounds(30)
    seconds = in_turns(
        {"step": timed(step), "product": timed(lambda: matrix @ matrix)}, rounds, warm_up=not setting.quick
    )
    whole, bare = (statistics.median(seconds[name]) for name in ("step", "product"))
    rate = 2 * BARE_PRODUCT**3 / bare / 1e9
    parts = kernels.training_parts(step, rounds)
    entries = [
        Entry(name, figures=_share(1e3 * part.seconds, part.operations / 1e9, rate)) for name, part in parts.items()
    ]
    total = sum(part.operations for part in parts.values()) / 1e9
    entries.append(Entry("the step as a whole, without the profiler", figures=_share(1e3 * whole, total, rate)))
    note = f"A product of two matrices of {BARE_PRODUCT} x {BARE_PRODUCT} runs at {rate:.0f} GFLOP/s in this precision."
    return Table(f"where the time of a step goes, batch {batch}, {precision}", "", entries, notes=[note])


def _share(milliseconds: float, operations: float, rate: float) -> dict[str, float | str]:
    bare = 1e3 * operations / rate
    shown: float | str = bare if operations else "-"
    return {"ms": milliseconds, "GFLOP": operations if operations else "-", "ms at the bare product's rate": shown}


def _accuracy(setting: Setting, default: str) -> Table:
    """Test top-1 of train.py, with the precision that it chooses and with float32."""
    epochs = 1 if setting.quick else ACCURACY_EPOCHS
    entries = []
    for precision in dict.fromkeys([default, "32-true"]):
        with tempfile.TemporaryDirectory() as folder:
            arguments = ["--artifacts", folder, "--epochs", str(epochs), "--trainer.precision", precision, "--json"]
            summary = json.loads(setting.command("train.py", *arguments).stdout)
        figures = {"test top-1, %": 100 * summary["metrics"]["test_top1"], "training, s": round(summary["seconds"], 1)}
        entries.append(Entry(precision, figures=figures))
    return Table(f"accuracy after {epochs} epoch{'s' if epochs > 1 else ''} of train.py, by precision", "", entries)


def _race(setting: Setting, batch: int, steps: int, precision: str, rounds: int) -> dict[str, list[float]]:
    """Images per second of the three, by round."""
    splits = setting.data
    module = ImageData(splits, batch_size=batch, augment=None, seed=setting.config.seed)
    usual: DataLoader[Any] = DataLoader(
        UsualMNIST(splits.train_file), batch_size=batch, shuffle=True, num_workers=WORKERS, drop_last=True
    )

    def lightning(**data: Any) -> float:
        with tempfile.TemporaryDirectory() as folder:
            return _lightning(setting, Path(folder), steps, precision, **data)

    contestants: dict[str, Callable[[], float]] = {
        OURS: lambda: lightning(datamodule=module),
        BARE: lambda: _bare(setting, splits.train, batch, steps, _Variant(precision)),
        USUAL: lambda: lightning(train_dataloaders=usual, val_dataloaders=module.val_dataloader()),
    }
    seconds = in_turns(contestants, rounds, warm_up=not setting.quick)
    return {name: [steps * batch / figure for figure in figures] for name, figures in seconds.items()}


class UsualMNIST(MNIST):  # type: ignore[misc]
    """torchvision's MNIST, which makes a PIL image of each, over images that are in memory already."""

    def __init__(self, source: ImageSet) -> None:
        VisionDataset.__init__(self, root="", transform=ToTensor())
        images = source.images(slice(0, len(source)))
        self.data = (images[:, 0] / source.preprocessing.scale).round().to(torch.uint8)
        self.targets = source.labels


class Clock(Callback):
    """Seconds of an epoch without its validation; writing the checkpoints counts."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds -= time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds += time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds -= time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds += time.perf_counter()


def _lightning(setting: Setting, folder: Path, steps: int, precision: str, **data: Any) -> float:
    """Seconds of so many steps of a Lightning run as train.py makes it, with ``data`` as Trainer.fit takes it."""
    options = fit.check_trainer(
        {
            "max_epochs": 1,
            "precision": precision,
            "gradient_clip_val": setting.config.trainer["gradient_clip_val"],
            "limit_train_batches": steps,
            "limit_val_batches": 2,
            "num_sanity_val_steps": 0,
        }
    )
    trainer = fit.make_trainer(options, folder, average=0.0, resume=False).trainer
    clock = Clock()
    # Before the callback that writes the checkpoints, so that these count.
    trainer.callbacks.insert(0, clock)  # type: ignore[attr-defined]
    classifier = Classifier(setting.new_network(), setting.config.optimizer, len(setting.data.info.classes))
    trainer.fit(classifier, **data)
    return clock.seconds


@dataclass(frozen=True)
class _Variant:
    """How the bare loop computes."""

    precision: str
    channels_last: bool = True
    compiled: bool = False


def _bare(setting: Setting, images: ImageSet, batch: int, steps: int, variant: _Variant) -> float:
    """Seconds of so many steps of the loop that one would write by hand."""
    config = setting.config.optimizer
    network = setting.new_network().train()
    if variant.channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    scores_of = logits_of(network)
    mixed = variant.precision == "bf16-mixed"
    if variant.compiled:
        torch._dynamo.reset()  # after eight networks it would go on uncompiled
        scores_of = torch.compile(scores_of)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            scores_of(images.images(torch.arange(batch))).sum().backward()
    optimizer = SGD(
        parameter_groups(network, config),
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        fused=True,
    )
    schedule = LambdaLR(optimizer, lambda step: learning_rate_factor(config, step, steps))
    begin = time.perf_counter()
    for index in torch.randperm(len(images))[: batch * steps].split(batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            scores = scores_of(images.images(index))
            loss = F.cross_entropy(scores, images.labels[index], label_smoothing=config.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(network.parameters(), setting.config.trainer["gradient_clip_val"])
        optimizer.step()
        schedule.step()
    return time.perf_counter() - begin
