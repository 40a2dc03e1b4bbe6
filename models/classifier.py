"""The LightningModule that trains any classifier."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from common.config import OptimizerConfig
from common.errors import InputError
from data.loaders import Batch
from models.network import logits_of
from models.schedule import learning_rate_factor

_GENERATORS = "random_generators"
_LOOK_EVERY = 50
"""Steps between looks at the loss where nothing is logged by steps."""


def parameter_groups(network: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """A network's parameters for an optimiser: the biases have their own weight decay."""
    decay = config.weight_decay if config.bias_weight_decay is None else config.bias_weight_decay
    parameters = list(network.named_parameters())
    return [
        {"params": [value for name, value in parameters if not name.endswith("bias")]},
        {"params": [value for name, value in parameters if name.endswith("bias")], "weight_decay": decay},
    ]


class Classifier(LightningModule):
    """Trains a network with cross entropy; top-1 and top-5 of training, validation and test.

    The loss of single steps, and with it NaN, is looked at every ``trainer.log_every_n_steps`` steps; training metrics
    are updated then for all the batches since, so that they cost next to nothing.

    Attributes:
        seconds: What the training took, validation included; of a resumed one, since it went on.

    Args:
        network: Gives scores from its ``logits`` method or, without one, as its output.
        optimizer: How it is trained.
        num_classes: Number of classes.
        record: What determines the training, as JSON values: the hyperparameters in logs and checkpoints, compared
            when training resumes.
    """

    def __init__(
        self, network: nn.Module, optimizer: OptimizerConfig, num_classes: int, record: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        # The CPU's convolutions and poolings are faster so, also for LeNet; checkpoints are not affected.
        self.network = network
        for part in network.modules():
            if isinstance(part, nn.Conv2d):
                part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.config = optimizer
        self.save_hyperparameters(record or {})
        metrics = MetricCollection(
            {
                f"top{k}": MulticlassAccuracy(
                    num_classes, top_k=min(k, num_classes), average="micro", validate_args=False
                )
                for k in (1, 5)
            },
            compute_groups=False,
        )
        self.train_metrics = metrics.clone("train_")
        self.train_loss = MeanMetric()
        self.val_metrics = metrics.clone("val_")
        self.test_metrics = metrics.clone("test_")
        self.val_loss = MeanMetric()
        self.test_loss = MeanMetric()
        self.seconds = 0.0
        self._start = 0.0
        self._generators: list[Tensor] = []
        self._recent: list[tuple[Tensor, Tensor, Tensor]] = []

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning notes the running hook here some forty times a step; nn.Module's own way takes a while each time.
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def forward(self, images: Tensor) -> Tensor:
        """What the network gives for float32 images [B, C, H, W]."""
        output: Tensor = self.network(images)
        return output

    def on_train_start(self) -> None:
        if self._generators:
            torch.set_rng_state(self._generators[0])
        if len(self._generators) > 1 and self.device.type == "cuda":
            torch.cuda.set_rng_state(self._generators[1], self.device)
        self._start = time.perf_counter()

    def on_train_end(self) -> None:
        self.seconds = time.perf_counter() - self._start

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        logits = logits_of(self.network)(images)
        if not isinstance(logits, Tensor):
            raise InputError(
                f"{type(self.network).__name__} gives a {type(logits).__name__} while it trains, not one tensor of "
                "scores: turn its auxiliary outputs off (model.init_args)"
            )
        loss = F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
        self._recent.append((logits.detach(), labels, loss.detach()))
        # Set by a connector of the Trainer, where the type checker does not see it.
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        # At the very steps that Lightning logs.
        if (self.global_step + 1) % (every or _LOOK_EVERY) == 0:
            self.log_dict({"loss": self._look_at_recent(), "lr": self.trainer.optimizers[0].param_groups[0]["lr"]})
        return loss

    def _look_at_recent(self) -> float:
        """Update the training metrics with the steps since the last look; returns their mean loss.

        Raises:
            InputError: it is NaN or infinite.
        """
        logits, labels, losses = zip(*self._recent, strict=True)
        self._recent.clear()
        mean = torch.stack(losses).float().mean()
        loss = float(mean)
        if not math.isfinite(loss):
            raise InputError(
                f"the training loss became {loss} by step {self.global_step}: lower --optimizer.lr, or look for "
                "NaN in the images"
            )
        self.train_loss.update(mean, len(losses))
        self.train_metrics.update(torch.cat(logits), torch.cat(labels))
        return loss

    def on_validation_epoch_start(self) -> None:
        # Before the checkpoints that follow a validation are written.
        if self._recent:
            self._look_at_recent()

    def on_train_epoch_end(self) -> None:
        if self._recent:
            self._look_at_recent()
        # A training that resumes at the end of an epoch has seen none of its batches.
        if self.train_loss.update_called:
            self.log("train_loss", self.train_loss)
            self.log_dict(self.train_metrics)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("val_loss", self.val_loss, self.val_metrics, batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("test_loss", self.test_loss, self.test_metrics, batch)

    def _evaluate(self, name: str, loss: MeanMetric, metrics: MetricCollection, batch: Batch) -> None:
        images, labels = batch
        logits = logits_of(self.network)(images).float()
        metrics.update(logits, labels)
        # Weighted by the images, so that neither batches nor processes of unequal size shift the mean.
        loss.update(F.cross_entropy(logits, labels), len(labels))
        self.log(name, loss, batch_size=len(labels))
        self.log_dict(metrics, batch_size=len(labels))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimiser and its schedule.

        Raises:
            InputError: the schedule needs an end that the training does not have.
        """
        total = self.trainer.estimated_stepping_batches
        if math.isinf(total) and self.config.schedule in ("onecycle", "cosine"):
            raise InputError(
                f"optimizer.schedule {self.config.schedule} needs an end: set trainer.max_epochs or trainer.max_steps"
            )
        optimizer = self._optimizer()
        steps = None if math.isinf(total) else int(total)
        scheduler = LambdaLR(optimizer, lambda iteration: learning_rate_factor(self.config, iteration, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _optimizer(self) -> Optimizer:
        config = self.config
        parameters = parameter_groups(self.network, config)
        # One kernel for all parameters, where the device has it. Under a gradient scaler it could not be clipped.
        fused = (self.device.type in ("cpu", "cuda") and self.trainer.precision != "16-mixed") or None
        if config.name == "adamw":
            return AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=fused)
        return SGD(
            parameters,
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov and config.momentum > 0,
            weight_decay=config.weight_decay,
            fused=fused,
        )

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as Lightning does, which refuses fused optimisers also for bfloat16, where nothing is scaled."""
        if self.trainer.precision != "bf16-mixed" or gradient_clip_val is None:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_algorithm == "value":
            clip_grad_value_(self.network.parameters(), gradient_clip_val)
        else:
            clip_grad_norm_(self.network.parameters(), gradient_clip_val)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the states of the random generators, from which dropout draws."""
        cuda = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        checkpoint[_GENERATORS] = [torch.get_rng_state(), *cuda]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the generators' states, and refuse to go on with another training than the checkpoint's.

        Raises:
            InputError: model, data, optimiser, seed or length differ; the message names what.
        """
        then, now = checkpoint.get("hyper_parameters") or {}, dict(self.hparams)
        if then != now:
            raise InputError(
                f"cannot resume: {_difference(then, now)} since the interrupted training; start anew "
                "without --resume, or go back to its configuration"
            )
        self._generators = checkpoint.get(_GENERATORS, [])


def _difference(then: Any, now: dict[str, Any]) -> str:
    """Which entries differ, for people."""
    if not isinstance(then, dict):
        return "the checkpoint is not of this project or everything changed"
    changed = [
        f"{section}.{key} was {(then.get(section) or {}).get(key)!r} and is {value!r}"
        for section, values in now.items()
        for key, value in values.items()
        if not isinstance(then.get(section), dict) or then[section].get(key) != value
    ]
    return ", ".join(changed[:3]) or "its options changed"
