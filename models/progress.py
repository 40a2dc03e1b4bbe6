"""Progress on stderr: a bar on a terminal, a line for each epoch everywhere."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)


class EpochProgress(ProgressBar):
    """A bar over the epoch's steps where stderr is a terminal, and one log line when the epoch ends."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._start: float | None = None
        self._finished: str | None = None
        self._shown = True

    def disable(self) -> None:
        self._shown = False

    def enable(self) -> None:
        self._shown = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        logger.info(" ".join(map(str, args)))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._shown and sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("", total=None)
            self._bar.start()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer, trainer.current_epoch)
        self._start = time.perf_counter()
        if self._bar is not None:
            description = f"epoch {_of_all(trainer, trainer.current_epoch + 1)}"
            self._bar.reset(self._task, description=description, total=self.total_train_batches)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self._bar is not None:
            self._bar.advance(self._task)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finished = f"{time.perf_counter() - self._start:.1f} s" if self._start else None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer, trainer.current_epoch)
        self._close()

    def _report(self, trainer: Trainer, epochs: int) -> None:
        """Log the epoch that ended last; its training metrics are known only after every ``on_train_epoch_end``."""
        if not self._shown or self._finished is None:
            return
        figures = trainer.callback_metrics
        known = [
            f"{title} {float(figures[key]) * factor:.{digits}f}{unit}"
            for key, title, factor, digits, unit in (
                ("train_loss", "loss", 1, 4, ""),
                ("val_loss", "validation loss", 1, 4, ""),
                ("val_top1", "validation top-1", 100, 2, " %"),
                ("val_top5", "top-5", 100, 2, " %"),
            )
            if key in figures
        ]
        logger.info("epoch %s: %s; %s", _of_all(trainer, epochs), ", ".join(known), self._finished)
        self._finished = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _of_all(trainer: Trainer, epochs: int) -> str:
    last = trainer.max_epochs
    return f"{epochs}/{last}" if last and last > 0 else str(epochs)
