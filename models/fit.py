"""A Lightning Trainer for a run: its arguments checked, its checkpoints atomic, its logs in the run's folder."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union, get_args

import torch
from jsonargparse import ArgumentParser, Namespace
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from common.config import Config
from common.decode import plain
from common.errors import InputError
from data.base import DatasetInfo
from models.archive import load_archive
from models.checkpoint import write_torch
from models.precision import BFLOAT16, FLOAT32
from models.progress import EpochProgress

logger = logging.getLogger(__name__)

EPOCHS = 10
"""How long a configuration trains that does not say."""
_DECISIVE = (
    "max_epochs",
    "max_steps",
    "precision",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "limit_train_batches",
    "overfit_batches",
)
"""Arguments of the Trainer that decide the result."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that are old or new, never torn, and that run no code when they are read."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        write_torch(Path(path), checkpoint)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        try:
            content = load_archive(Path(path))
        except InputError as error:
            raise InputError(f"cannot resume: {error}; start anew without --resume") from error
        if not isinstance(content, dict) or "state_dict" not in content:
            raise InputError(f"{path} is not a training checkpoint: start anew without --resume")
        return content


@dataclass(frozen=True)
class TrainerOptions:
    """Arguments of ``lightning.Trainer``, checked against its signature.

    Attributes:
        parser: Of these arguments.
        values: The arguments, under ``trainer``.
        measure_precision: Whether ``precision`` is a stand-in for what is faster on this CPU.
    """

    parser: ArgumentParser
    values: Namespace
    measure_precision: bool = False

    def with_precision(self, precision: str) -> TrainerOptions:
        """The same options in a precision that was found."""
        values = self.values.clone()
        values.trainer["precision"] = precision
        return TrainerOptions(self.parser, values)


def trainer_parser() -> ArgumentParser:
    """A parser of ``lightning.Trainer``'s arguments, under ``trainer``; its help lists them."""
    parser = ArgumentParser(prog="train.py", exit_on_error=False, usage="train.py [--trainer.ARGUMENT VALUE] ...")
    parser.add_class_arguments(Trainer, "trainer", instantiate=False)
    for action in parser._actions:
        # Typing's cache gives Optional[Union[int, float]] in either order, and 1 batch is not 1.0, all of them.
        types = get_args(getattr(action, "_typehint", None))
        if float in types and int in types:
            action._typehint = Union[(int, *(each for each in types if each is not int))]  # type: ignore[attr-defined]
    return parser


def check_trainer(options: Mapping[str, Any]) -> TrainerOptions:
    """Check ``trainer`` of the configuration by name and type.

    ``precision: auto`` is ``32-true`` on a GPU, and to be measured on a CPU (:mod:`models.precision`). Several
    processes, which must all take the same one, take ``bf16-mixed`` where the CPU has matrix instructions for it.

    Raises:
        InputError: an argument that ``lightning.Trainer`` does not have, a wrong type, or a strategy whose processes
            do not begin with this command.
    """
    values = dict(options)
    measure = False
    if values.get("precision") == "auto":
        on_cpu, alone = _cpu_training(values), _one_process(values)
        measure = on_cpu and alone
        values["precision"] = BFLOAT16 if on_cpu and not alone and has_amx() else FLOAT32
    if values.get("max_epochs") is None and not values.keys() & {"max_steps", "max_time"}:
        values["max_epochs"] = EPOCHS
    parser = trainer_parser()
    names = {action.dest.partition(".")[2] for action in parser._actions}
    for name in values:
        if name.partition(".")[0] not in names:
            raise InputError(f"lightning.Trainer has no argument {name!r}: train.py --trainer.help lists them")
    try:
        checked = TrainerOptions(parser, parser.parse_object({"trainer": values}), measure)
    except Exception as error:
        raise InputError(f"trainer: {_short(str(error))}") from error
    _check_strategy(checked.values.trainer.strategy)
    return checked


def _check_strategy(strategy: Any) -> None:
    """Refuse strategies whose training happens in forks alone, where this process would not see its result."""
    if isinstance(strategy, str):
        name, forks = strategy, any(start in strategy for start in ("spawn", "fork", "notebook"))
    else:
        name = strategy.class_path.rpartition(".")[2]
        forks = strategy.get("init_args", {}).get("start_method", "popen") != "popen"
    if forks:
        raise InputError(f"trainer.strategy {name} keeps the trained weights in processes of its own: take ddp")


def _short(message: str) -> str:
    """A report of jsonargparse on several lines, without the list of every type that was tried."""
    lines = [line.strip() for line in message.splitlines()]
    kept = " ".join(line for line in lines if line and not line.startswith(("- Expected", "Errors:", "Subtypes:")))
    return f"{kept:.300}"


def _cpu_training(values: Mapping[str, Any]) -> bool:
    accelerator = values.get("accelerator", "auto")
    return accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available())


def _one_process(values: Mapping[str, Any]) -> bool:
    started = os.environ.get("WORLD_SIZE", "1") == "1"
    return started and values.get("devices", "auto") in ("auto", 1, "1") and values.get("num_nodes", 1) in (1, "1")


def has_amx() -> bool:
    """Whether this CPU has matrix instructions for bfloat16 (Intel AMX), as Linux reports it."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False


class Checkpoints(Checkpoint):
    """After every validation, ``last.ckpt``, and ``best.ckpt`` where validation top-1 is the best so far.

    Of several epochs that tie, the latest is best: its learning rate is lowest.

    Args:
        folder: Where to write.
        earlier: Files and folders of an earlier training, which go when this one has something in their place.

    Attributes:
        best: Path of the best epoch's checkpoint.
        last: Path of the checkpoint to resume from.
        best_score: Validation top-1 in ``best``; None before the first validation.
    """

    state_key = "checkpoints"

    def __init__(self, folder: Path, earlier: Sequence[Path] = ()) -> None:
        self.best = folder / "best.ckpt"
        self.last = folder / "last.ckpt"
        self.earlier = earlier
        self.best_score: float | None = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or is_trial(trainer) or trainer.state.fn != TrainerFn.FITTING:
            return
        self.remove_earlier(trainer)
        # The same in every process: the metric is synchronised.
        score = float(trainer.callback_metrics["val_top1"])
        if self.best_score is None or score >= self.best_score:
            self.best_score = score
            trainer.save_checkpoint(self.best)
        trainer.save_checkpoint(self.last)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Also of a training without validation.
        if not is_trial(trainer):
            self.remove_earlier(trainer)

    def remove_earlier(self, trainer: Trainer) -> None:
        """Remove the earlier training, so that its checkpoints and logs are not mixed up with this one's."""
        if trainer.is_global_zero:
            for path in self.earlier:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        self.earlier = ()

    def state_dict(self) -> dict[str, Any]:
        return {"best_score": self.best_score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_score = state_dict["best_score"]


class NoProfiler(PassThroughProfiler):
    """No profiling, without a new context manager for each of the forty hooks that Lightning calls in a step."""

    _nothing = nullcontext()

    def profile(self, action_name: str) -> AbstractContextManager[None]:  # type: ignore[override]
        return self._nothing


@dataclass(frozen=True)
class Fitting:
    """A trainer with the checkpoints that it keeps."""

    trainer: Trainer
    checkpoints: Checkpoints


def make_trainer(options: TrainerOptions, folder: Path, average: float, resume: bool) -> Fitting:
    """A Trainer that writes ``checkpoints/best.ckpt``, ``checkpoints/last.ckpt`` and ``logs/`` in ``folder``.

    Without ``resume``, those of an earlier training go when the first checkpoint is written: a training that ends
    before has changed nothing. Whatever ``options`` set (loggers, callbacks, plugins) comes on top.

    Args:
        options: From :func:`check_trainer`.
        folder: The run's, for checkpoints and logs.
        average: Decay of the exponential moving average of the weights; 0 for none.
        resume: Keep the logs so far, and begin another version beside them.

    Raises:
        InputError: Lightning refuses a value.
    """
    # last.ckpt goes first, so that no part of it can be resumed.
    earlier = (last_checkpoint(folder), folder / "checkpoints", *(folder / "logs").glob("*"))
    checkpoints = Checkpoints(folder / "checkpoints", () if resume else earlier)
    callbacks: list[Callback] = [checkpoints]
    arguments = vars(options.parser.instantiate(options.values).trainer)
    if arguments["enable_progress_bar"] is not False:
        callbacks.append(EpochProgress())
    if average:
        callbacks.append(EMAWeightAveraging(decay=average))
    given = arguments.pop("callbacks") or []
    plugins = arguments.pop("plugins") or []
    loggers = arguments.pop("logger")
    if loggers in (None, True):
        loggers = run_loggers(folder)
    if arguments["enable_model_summary"] is None:
        arguments["enable_model_summary"] = False
    if arguments["profiler"] is None:
        arguments["profiler"] = NoProfiler()
    try:
        trainer = Trainer(
            **arguments,
            callbacks=[*callbacks, *(given if isinstance(given, list) else [given])],
            plugins=[AtomicCheckpointIO(), *(plugins if isinstance(plugins, list) else [plugins])],
            logger=loggers,
        )
    except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"trainer: {error}") from error
    return Fitting(trainer, checkpoints)


def run_loggers(folder: Path) -> list[Logger]:
    """CSV and TensorBoard logs in ``folder/logs/version_<n>``, beside those that are there."""
    found = [path.name.removeprefix("version_") for path in (folder / "logs").glob("version_*")]
    version = max((int(number) + 1 for number in found if number.isdecimal()), default=0)
    board = TensorBoardLogger(folder, name="logs", version=version, default_hp_metric=False)
    return [CSVLogger(folder, name="logs", version=version), board]


def last_checkpoint(folder: Path) -> Path:
    """Where a run keeps the checkpoint to resume from."""
    return folder / "checkpoints" / "last.ckpt"


def checkpoint_to_resume(folder: Path) -> Path:
    """The checkpoint to go on from.

    Raises:
        InputError: there is none.
    """
    last = last_checkpoint(folder)
    if not last.is_file():
        raise InputError(f"there is no checkpoint to resume from in {last.parent}: train without --resume")
    return last


def precision_of(checkpoint: Path) -> str | None:
    """The precision of the training that a checkpoint is of; None where it does not say."""
    hyperparameters = AtomicCheckpointIO().load_checkpoint(checkpoint).get("hyper_parameters") or {}
    precision = (hyperparameters.get("trainer") or {}).get("precision") if isinstance(hyperparameters, dict) else None
    return precision if precision in (BFLOAT16, FLOAT32) else None


def load_best(fitting: Fitting, module: LightningModule) -> int:
    """Put the weights of the best epoch into ``module``; returns how many epochs they have seen.

    Where nothing was validated, as in a training shorter than an epoch, the weights stay as they are.
    """
    if fitting.checkpoints.best_score is None:
        return fitting.trainer.current_epoch
    content = AtomicCheckpointIO().load_checkpoint(fitting.checkpoints.best)
    module.load_state_dict(content["state_dict"])
    return int(content["epoch"]) + 1


def training_record(config: Config, info: DatasetInfo, options: TrainerOptions) -> dict[str, Any]:
    """What determines a training's result, as JSON values: two trainings with equal records give equal weights."""
    trainer = options.values.trainer
    sections = {
        "run": {"seed": config.seed},
        "data": {
            "fingerprint": info.fingerprint,
            **{name: getattr(config.data, name) for name in ("batch_size", "validation", "augment", "image_size")},
            **({"transform": config.data.transform} if config.data.transform else {}),
        },
        "model": dataclasses.asdict(config.model),
        "optimizer": dataclasses.asdict(config.optimizer),
        "trainer": {name: trainer[name] for name in _DECISIVE},
    }
    record: dict[str, Any] = plain(sections)
    return record


def quiet() -> None:
    """Keep Lightning's advice, which does not apply here, off the terminal."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*")
    warnings.filterwarnings("ignore", module=r"torch\.utils\.data")


def interruptible(step: Callable[[], Any]) -> None:
    """Run a Trainer's method so that Ctrl-C ends in KeyboardInterrupt, which Lightning turns into exit code 1.

    A signal stays one where Lightning, stopped while it took its loops down, fails as it does so a second time.
    """
    try:
        step()
    except SystemExit as stop:
        if stop.code == 1:
            raise KeyboardInterrupt from None
        raise
    except Exception as error:
        signalled = error.__context__
        while isinstance(signalled, Exception):
            signalled = signalled.__context__
        if signalled is None:
            raise
        if isinstance(signalled, SystemExit) and signalled.code == 1:
            raise KeyboardInterrupt from None
        raise signalled from None


def is_trial(trainer: Trainer) -> bool:
    """Whether this is a run of a few batches under ``fast_dev_run``, which writes nothing."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined] # set by a connector


def lost_another_process(error: RuntimeError) -> bool:
    """Whether a collective operation (of gloo or NCCL) failed because another process has ended."""
    return any(sign in str(error) for sign in ("closed by peer", "reset by peer", "Broken pipe", "ncclRemoteError"))
