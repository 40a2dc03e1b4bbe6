import csv
import dataclasses
import inspect
import json
import sys

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import nn

from common.cli import config_parser, parse
from common.config import OptimizerConfig
from common.errors import InputError
from models import Classifier, fit
from models.archive import load_archive
from tests.models.small import Auxiliary, Lively, Scores, ToNaN

OPTIMIZER = OptimizerConfig(lr=0.05, schedule="onecycle", label_smoothing=0.0)
DDP = "lightning.pytorch.strategies.DDPStrategy"
QUICK = {"max_epochs": 3, "accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 5}


@pytest.fixture
def run(tmp_path, blobs):
    """Trains a small network in ``tmp_path/<name>`` and gives (classifier, fitting)."""

    def train(
        name: str = "run",
        *,
        optimizer: OptimizerConfig = OPTIMIZER,
        network: type[nn.Module] = Scores,
        resume: bool = False,
        seed: int = 1,
        record: dict | None = None,
        callbacks: tuple[Callback, ...] = (),
        **trainer,
    ):
        options = fit.check_trainer({**QUICK, **trainer})
        seed_everything(seed, workers=True, verbose=False)
        data = blobs(seed)
        classifier = Classifier(network(), optimizer, 3, record)
        folder = tmp_path / name
        fitting = fit.make_trainer(options, folder, optimizer.average, resume)
        fitting.trainer.callbacks[:0] = callbacks
        last = fit.checkpoint_to_resume(folder) if resume else None
        fit.interruptible(lambda: fitting.trainer.fit(classifier, datamodule=data, ckpt_path=last))
        return classifier, fitting

    fit.quiet()
    return train


def test_a_network_may_hold_weights_of_any_rank():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv3d(2, 2, 1))
    Classifier(network, OPTIMIZER, 3)
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("signalled", "ended"), [(SystemExit(143), SystemExit), (SystemExit(1), KeyboardInterrupt)], ids=["term", "int"]
)
def test_a_signal_stays_one_where_lightning_fails_to_take_its_loops_down(signalled, ended):
    """As its Trainer does: it takes them down again, which fails where they are half down."""

    def step():
        try:
            raise signalled
        except SystemExit:
            raise RuntimeError("Please call `iter(combined_loader)` first.")  # noqa: B904

    def stopped():
        raise signalled

    for stop in (step, stopped):
        with pytest.raises(ended):
            fit.interruptible(stop)
    with pytest.raises(ZeroDivisionError):
        fit.interruptible(lambda: 1 // 0)


def weights(classifier) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in classifier.network.state_dict().items()}


def assert_same(one, two) -> None:
    assert_equal(weights(one), weights(two))


def assert_equal(one, two) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


class Steps(Callback):
    """Keeps the weights before each step, its gradients, and the weights after it."""

    def __init__(self) -> None:
        self.steps: list[tuple[dict[str, torch.Tensor], ...]] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        gradients = {name: value.grad.clone() for name, value in pl_module.network.named_parameters()}
        self.steps.append((weights(pl_module), gradients))

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        self.steps[-1] += (weights(pl_module),)


def test_the_configuration_of_caffes_solver_steps_as_caffe_does(run, root):
    """V <- mu V - lr (g + wd W), W <- W + V: equal to PyTorch's update while the rate stays."""
    config, _ = parse(config_parser("train.py", "", {}), ["--config", str(root / "configs" / "lenet_caffe.yaml")])
    steps = Steps()
    run(max_steps=6, optimizer=dataclasses.replace(config.optimizer, schedule="constant"), callbacks=(steps,))
    assert len(steps.steps) == 6
    velocity = dict.fromkeys(steps.steps[0][0], 0.0)
    for before, gradients, after in steps.steps:
        for name, weight in before.items():
            velocity[name] = 0.9 * velocity[name] - 0.01 * (gradients[name] + 5e-4 * weight)
            torch.testing.assert_close(after[name], weight + velocity[name])


class StopAt(Callback):
    """Ends the training as a crash does, after so many steps."""

    def __init__(self, step: int, error: BaseException) -> None:
        self.step = step
        self.error = error

    def on_train_batch_end(self, trainer, *_) -> None:
        if trainer.global_step == self.step:
            raise self.error


class Seen(Callback):
    """Keeps the training batches."""

    def __init__(self) -> None:
        self.batches = []

    def on_train_batch_start(self, trainer, module, batch, *_) -> None:
        self.batches.append(batch)


class CrashError(Exception):
    pass


def test_learns_and_leaves_its_files(run, tmp_path):
    seen = Seen()
    _, fitting = run(record={"run": {"seed": 1}}, callbacks=(seen,))
    assert not torch.equal(seen.batches[0][1], seen.batches[12][1])  # each epoch has its own order
    folder = tmp_path / "run"
    assert fitting.checkpoints.best_score > 0.9
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    logs = folder / "logs" / "version_0"
    assert list(logs.glob("events.out.tfevents.*"))
    assert "seed: 1" in (logs / "hparams.yaml").read_text()
    with open(logs / "metrics.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    found = {key for row in rows for key, value in row.items() if value}
    assert found >= {"loss", "lr", "train_loss", "train_top1", "train_top5", "val_loss", "val_top1", "val_top5"}
    assert [float(row["lr"]) > 0 for row in rows if row["lr"]] == [True] * 7


def test_metrics_are_those_of_the_whole_set(run, blobs):
    classifier, fitting = run(max_epochs=2)
    fitting.trainer.test(classifier, datamodule=blobs(), verbose=False)
    test = blobs().test
    with torch.no_grad():
        logits = classifier.eval()(test.images(slice(None)))
    figures = fitting.trainer.callback_metrics
    assert float(figures["test_top1"]) == pytest.approx((logits.argmax(1) == test.labels).float().mean().item())
    assert float(figures["test_loss"]) == pytest.approx(nn.functional.cross_entropy(logits, test.labels).item())
    assert float(figures["test_top5"]) == 1.0


def test_training_metrics_count_every_batch(run):
    """Also those after the last look at the loss."""
    seen = Seen()
    frozen = dataclasses.replace(OPTIMIZER, lr=1e-30, schedule="constant", weight_decay=0.0)
    classifier, fitting = run(optimizer=frozen, max_epochs=1, callbacks=(seen,))
    images = torch.cat([batch[0] for batch in seen.batches])
    labels = torch.cat([batch[1] for batch in seen.batches])
    assert len(labels) == 192
    logits = classifier(images)
    figures = fitting.trainer.callback_metrics
    assert float(figures["train_top1"]) == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert float(figures["train_loss"]) == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-4)


@pytest.mark.parametrize("average", [0.0, 0.9])
@pytest.mark.parametrize("step", [13, 24, 25, 35])
def test_resuming_equals_not_having_stopped(run, average, step):
    """12 steps are an epoch: in the middle, at its end, at the beginning of the next, before the last."""
    optimizer = dataclasses.replace(OPTIMIZER, average=average)
    whole, _ = run("whole", network=Lively, optimizer=optimizer)
    with pytest.raises(CrashError):
        run("stopped", network=Lively, optimizer=optimizer, callbacks=(StopAt(step, CrashError()),))
    resumed, fitting = run("stopped", network=Lively, optimizer=optimizer, resume=True)
    assert_same(whole, resumed)
    assert fitting.trainer.global_step == 36


def test_resuming_between_the_validations_of_an_epoch(run):
    """As in Caffe's configuration, which validates every 500 steps."""
    often = {"val_check_interval": 5, "check_val_every_n_epoch": None, "max_epochs": -1, "max_steps": 30}
    often["network"] = Lively
    optimizer = OptimizerConfig(lr=0.05, schedule="inv")
    whole, _ = run("whole", optimizer=optimizer, **often)
    with pytest.raises(CrashError):
        run("stopped", optimizer=optimizer, callbacks=(StopAt(18, CrashError()),), **often)
    seen = Seen()
    resumed, fitting = run("stopped", optimizer=optimizer, resume=True, callbacks=(seen,), **often)
    assert fitting.trainer.global_step == 30
    assert len(seen.batches) == 15
    assert_same(whole, resumed)


def test_resuming_what_is_done_changes_nothing(run):
    whole, _ = run()
    epochs = {}
    for name in ("first", "second"):
        resumed, fitting = run(resume=True)
        epochs[name] = fit.load_best(fitting, resumed)
    assert epochs["first"] == epochs["second"]


def test_resuming_another_training_is_refused(run):
    run(record={"run": {"seed": 1}, "optimizer": {"lr": 0.1}})
    with pytest.raises(InputError, match=r"cannot resume: optimizer\.lr was 0\.1 and is 0\.2"):
        run(resume=True, record={"run": {"seed": 1}, "optimizer": {"lr": 0.2}})


def test_resuming_from_a_damaged_or_foreign_file(run, tmp_path):
    with pytest.raises(InputError, match="there is no checkpoint to resume from"):
        run(resume=True)
    run()
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot resume: .* damaged"):
        run(resume=True)
    torch.save({"a": 1}, last)
    with pytest.raises(InputError, match="not a training checkpoint"):
        run(resume=True)


def test_starting_anew_removes_the_earlier_training(run, tmp_path):
    run()
    stale = tmp_path / "run" / "checkpoints" / "stale"
    stale.touch()
    (tmp_path / "run" / "model.ckpt").touch()
    run(max_epochs=1)
    assert not stale.exists()
    assert (tmp_path / "run" / "model.ckpt").exists()
    assert [path.name for path in (tmp_path / "run" / "logs").iterdir()] == ["version_1"]


@pytest.mark.parametrize("trainer", [{"limit_val_batches": 0}, {"max_epochs": 0}])
def test_starting_anew_without_validation_removes_the_earlier_training(run, tmp_path, trainer):
    run(max_epochs=1)
    run(**trainer)
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not (tmp_path / "run" / "logs" / "version_0").exists()


@pytest.mark.parametrize("trainer", [{"network": ToNaN, "log_every_n_steps": 1}, {"network": Auxiliary}])
def test_the_earlier_training_stays_until_the_first_checkpoint(run, tmp_path, trainer):
    run()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert len(before) > 3
    with pytest.raises(InputError):
        run(**trainer)
    assert {path: path.read_bytes() for path in before} == before


def test_logs_of_a_resumed_training_come_beside(run, tmp_path):
    with pytest.raises(CrashError):
        run(callbacks=(StopAt(20, CrashError()),))
    run(resume=True)
    assert {path.name for path in (tmp_path / "run" / "logs").iterdir()} == {"version_0", "version_1"}


class Forgetful(Scores):
    """Right for a share of the 40 images that depends on how often it was evaluated on them."""

    shares = (0.5, 0.75, 0.75, 0.25)
    evaluated = 0

    def forward(self, images):
        scores = super().forward(images)
        if self.training:
            return scores
        # The made-up classes are bright in rows of their own.
        known = torch.stack([images[:, 0, 2 * label : 2 * label + 2].sum((1, 2)) for label in range(3)], 1)
        wrong = torch.arange(len(images)) % 4 >= 4 * self.shares[self.evaluated // 40]
        self.evaluated += len(images)
        return torch.where(wrong[:, None], -known, known) + 0 * scores


def test_best_epoch_is_loaded_and_the_latest_of_equals(run, tmp_path):
    steps = Steps()
    classifier, fitting = run(network=Forgetful, max_epochs=4, num_sanity_val_steps=0, callbacks=(steps,))
    assert fit.load_best(fitting, classifier) == 3
    assert_equal(weights(classifier), steps.steps[35][2])
    assert load_archive(tmp_path / "run" / "checkpoints" / "last.ckpt")["epoch"] == 3


def test_without_validation_the_last_weights_stay(run):
    classifier, fitting = run(limit_val_batches=0, max_epochs=1)
    before = weights(classifier)
    assert fit.load_best(fitting, classifier) == 1
    assert_equal(weights(classifier), before)


def test_averaged_weights_are_kept(run, tmp_path):
    """Those of the exponential moving average, not the last ones."""
    steps = Steps()
    classifier, fitting = run(optimizer=dataclasses.replace(OPTIMIZER, average=0.9), callbacks=(steps,), max_epochs=1)
    fit.load_best(fitting, classifier)
    _, _, last = steps.steps[-1]
    assert not torch.equal(weights(classifier)["1.weight"], last["1.weight"])


@pytest.mark.parametrize("when", ["between looks", "at a look"])
def test_loss_that_is_not_finite(run, tmp_path, when):
    interval = 50 if when == "between looks" else 5
    with pytest.raises(InputError, match=r"the training loss became nan by step \d+: lower --optimizer.lr"):
        run(network=ToNaN, log_every_n_steps=interval)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_auxiliary_outputs_are_refused(run):
    with pytest.raises(InputError, match="gives a tuple while it trains"):
        run(network=Auxiliary, num_sanity_val_steps=0)


def test_biases_have_their_own_weight_decay(run):
    plain = OptimizerConfig(
        lr=0.5, schedule="constant", momentum=0.0, nesterov=False, weight_decay=0.1, bias_weight_decay=0.4
    )
    steps = Steps()
    run(optimizer=plain, callbacks=(steps,), limit_train_batches=1, max_epochs=1)
    ((before, gradients, after),) = steps.steps
    for name, weight in before.items():
        decay = 0.4 if name.endswith("bias") else 0.1
        torch.testing.assert_close(after[name], weight - 0.5 * (gradients[name] + decay * weight))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_are_clipped(run, precision, algorithm):
    """With a fused optimiser in either precision: a step moves the weights by the rate times the clip, no more."""
    plain = OptimizerConfig(lr=1.0, schedule="constant", momentum=0.0, weight_decay=0.0, label_smoothing=0.0)
    clip = {"gradient_clip_val": 0.001, "gradient_clip_algorithm": algorithm, "precision": precision}
    steps = Steps()
    run(optimizer=plain, callbacks=(steps,), limit_train_batches=1, max_epochs=1, **clip)
    ((before, _, after),) = steps.steps
    moved = torch.cat([(after[name] - before[name]).flatten() for name in before])
    size = moved.norm() if algorithm == "norm" else moved.abs().max()
    assert 0.0009 < size < 0.0011


@pytest.mark.parametrize("schedule", ["onecycle", "cosine"])
def test_schedules_that_need_an_end(run, schedule):
    with pytest.raises(InputError, match=f"{schedule} needs an end"):
        run(optimizer=OptimizerConfig(schedule=schedule), max_epochs=-1)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("schedule", ["onecycle", "inv", "cosine", "constant"])
def test_every_optimizer_with_every_schedule(run, name, schedule):
    lr = 0.05 if name == "sgd" else 0.005
    _, fitting = run(optimizer=OptimizerConfig(name=name, lr=lr, momentum=0.0, schedule=schedule), max_epochs=2)
    rate = fitting.trainer.optimizers[0].param_groups[0]["lr"]
    end = {"onecycle": 0.0, "cosine": 0.0, "inv": (1 + 1e-4 * 24) ** -0.75, "constant": 1.0}[schedule]
    assert rate == pytest.approx(lr * end, abs=1e-9)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_epoch": 3}, "lightning.Trainer has no argument 'max_epoch'"),
        ({"max_epochs": "many"}, "trainer: .*max_epochs.*many"),
        ({"precision": "int3"}, "trainer: .*precision"),
        ({"accelerator": "abacus"}, "trainer: .*abacus"),
        ({"devices": 0}, "trainer: .*devices"),
        ({"strategy": "hope"}, "trainer: .*hope"),
        ({"strategy": "ddp_spawn"}, r"trainer\.strategy ddp_spawn .*: take ddp"),
        ({"strategy": "ddp_fork_find_unused_parameters_true"}, "take ddp"),
        ({"strategy": "ddp_notebook"}, "take ddp"),
        (
            {"strategy": {"class_path": DDP, "init_args": {"start_method": "spawn"}}},
            "strategy DDPStrategy .*: take ddp",
        ),
        ({"max_steps": -5}, "trainer: .*max_steps"),
        ({"limit_train_batches": 1.5}, "trainer: .*limit_train_batches"),
        ({"callbacks": [{"class_path": "no.such.Callback"}]}, "trainer: .*no.such.Callback"),
    ],
)
def test_wrong_trainer_arguments(tmp_path, wrong, message):
    with pytest.raises(InputError, match=message) as caught:
        fit.make_trainer(fit.check_trainer({"accelerator": "cpu", **wrong}), tmp_path, 0.0, resume=False)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("strategy", ["ddp", {"class_path": DDP}])
def test_strategies_whose_processes_begin_with_the_command(strategy):
    assert fit.check_trainer({"strategy": strategy}).values.trainer.strategy


def test_trainer_defaults():
    values = fit.check_trainer({}).values.trainer
    assert values.max_epochs == fit.EPOCHS
    assert fit.check_trainer({"max_steps": 5}).values.trainer.max_epochs is None


def test_one_batch_stays_one_where_typing_takes_float_before_int(monkeypatch):
    types = inspect.unwrap(Trainer.__init__).__annotations__
    monkeypatch.setitem(types, "limit_train_batches", float | int | None)
    options = fit.check_trainer({"limit_train_batches": 1})
    assert type(options.parser.instantiate(options.values).trainer.limit_train_batches) is int


def test_precision_is_measured_on_a_cpu():
    options = fit.check_trainer({"precision": "auto", "accelerator": "cpu"})
    assert options.measure_precision
    assert options.with_precision("bf16-mixed").values.trainer.precision == "bf16-mixed"
    assert options.values.trainer.precision == "32-true"
    for given in ({"accelerator": "gpu"}, {"accelerator": "cpu", "devices": 2}, {"precision": "16-mixed"}):
        assert not fit.check_trainer({"precision": "auto", **given}).measure_precision


@pytest.mark.parametrize("amx", [True, False])
def test_several_processes_take_the_precision_that_the_instructions_say(monkeypatch, amx):
    monkeypatch.setattr(fit, "has_amx", lambda: amx)
    for given in ({"devices": 2}, {"num_nodes": 2}):
        found = fit.check_trainer({"precision": "auto", "accelerator": "cpu", **given})
        assert found.values.trainer.precision == ("bf16-mixed" if amx else "32-true")


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_a_checkpoint_knows_its_precision(run, precision):
    _, fitting = run(max_epochs=1, record={"trainer": {"precision": precision}})
    assert fit.precision_of(fitting.checkpoints.last) == precision


def test_users_callbacks_and_loggers_come_on_top(tmp_path):
    timer = {"class_path": "lightning.pytorch.callbacks.Timer"}
    given = {"accelerator": "cpu", "callbacks": [timer], "logger": False, "profiler": "simple"}
    trainer = fit.make_trainer(fit.check_trainer(given), tmp_path, 0.0, resume=False).trainer
    names = [type(callback).__name__ for callback in trainer.callbacks]
    assert {"Timer", "EpochProgress", "Checkpoints"} <= set(names)
    assert trainer.loggers == []
    assert type(trainer.profiler).__name__ == "SimpleProfiler"


def test_record_tells_what_decides_the_result(info):
    config, _ = parse(config_parser("train.py", "", {}), ["--seed=7", "--optimizer.lr=0.05"])
    record = fit.training_record(config, info, fit.check_trainer({"max_epochs": 3}))
    assert json.loads(json.dumps(record)) == record
    assert record["run"] == {"seed": 7}
    assert record["data"]["fingerprint"] == "f" * 64
    assert record["trainer"]["max_epochs"] == 3
    assert record["optimizer"]["lr"] == 0.05


def test_progress_bar_on_a_terminal(run, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run(max_epochs=2, enable_progress_bar=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "epoch 2/2" in shown.err
    assert "12/12" in shown.err


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        ("[gloo/transport/tcp/pair.cc:544] Connection closed by peer [127.0.0.1]:33693", True),
        ("[gloo/transport/tcp/pair.cc:534] Read error [127.0.0.1]:33693: Connection reset by peer", True),
        ("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation", False),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_the_end_of_another_process_is_recognised(message, lost):
    assert fit.lost_another_process(RuntimeError(message)) is lost
