"""Lightning's own callbacks in a federated run: those that look count rounds, others have ours in their place."""

import csv

import pytest
import torch
from lightning.pytorch.callbacks import (
    DeviceStatsMonitor,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    ThroughputMonitor,
    Timer,
    TQDMProgressBar,
)
from torch.optim import SGD
from torch.optim.lr_scheduler import ExponentialLR

from fedlight.callbacks.checkpoint import Checkpoint
from fedlight.callbacks.progress import RoundProgress
from fedlight.module import hooks as _hooks
from tests.helpers.tiny import Clients, Regression, quiet_trainer, weights


class Decaying(Regression):
    def configure_optimizers(self):
        o = SGD(self.parameters(), lr=0.1)
        return [o], [{"scheduler": ExponentialLR(o, 0.5), "interval": "round"}]


def rows(trainer):
    with (trainer.run_dir / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def fit(tmp_path, *callbacks, model=None, **settings):
    trainer = quiet_trainer(tmp_path, callbacks=list(callbacks), **settings)
    trainer.fit(Regression() if model is None else model, Clients())
    return trainer


@pytest.mark.parametrize("interval", [None, "step", "epoch"])
def test_the_learning_rate_is_recorded_once_a_round(tmp_path, interval):
    monitor = LearningRateMonitor(interval)
    trainer = fit(tmp_path, monitor, model=Decaying())
    assert [float(row["lr-SGD"]) for row in rows(trainer)] == [0.1, 0.05, 0.025]
    assert monitor.lrs == {"lr-SGD": [0.1, 0.05, 0.025]}
    constant = LearningRateMonitor(interval, log_momentum=True)
    trainer = fit(tmp_path, constant)
    assert constant.lrs == {"lr-SGD": [0.1, 0.1, 0.1]}
    assert [float(row["lr-SGD-momentum"]) for row in rows(trainer)] == [0, 0, 0]


@pytest.mark.parametrize("engine", ["eager", "vmap"])
def test_looking_once_a_round_leaves_the_engine_and_the_weights(tmp_path, engine):
    watched, alone = Regression(), Regression()
    timer = Timer()
    fit(tmp_path, LearningRateMonitor(), DeviceStatsMonitor(), timer, model=watched, engine=engine)
    fit(tmp_path, model=alone, engine=engine)
    assert torch.equal(weights(watched), weights(alone))
    assert timer.time_elapsed("train") > timer.time_elapsed("validate") > 0


def test_device_statistics_stand_in_the_row_of_their_round(tmp_path):
    trainer = fit(tmp_path, DeviceStatsMonitor())
    found = rows(trainer)
    assert [int(row["round"]) for row in found] == [0, 1, 2]
    for when in ("train_batch_start", "train_batch_end", "validation_batch_end"):
        assert all(0 <= float(row[f"DeviceStatsMonitor.on_{when}/cpu_percent"]) <= 100 for row in found)


def test_throughput_counts_samples_of_local_steps(tmp_path):
    class Model(Regression):
        flops_per_batch = 7

    trainer = fit(tmp_path, ThroughputMonitor(lambda batch: len(batch[0]), window_size=4), model=Model())
    found = rows(trainer)
    steps = trainer.global_step
    assert steps > 8
    for row in found[1:]:  # a rate needs a window of steps
        assert 1 <= float(row["train/device/samples_per_sec"]) / float(row["train/device/batches_per_sec"]) <= 4
        assert float(row["train/time"]) > 0
    assert [int(float(row["validate/batches"])) for row in found] == [3, 3, 3]
    assert int(float(found[-1]["train/batches"])) == steps


def test_a_timer_ends_the_run_after_a_round_that_is_evaluated(tmp_path):
    for interval in ("step", "epoch"):
        timer = Timer({"seconds": 1000}, interval=interval)
        timer.load_state_dict({"time_elapsed": {"train": 999.9}})
        trainer = fit(tmp_path, timer, max_rounds=10**6, check_val_every_n_rounds=10**5)
        assert 0 < trainer.current_round < 10**6
        assert "val/loss" in rows(trainer)[-1]
        saved = torch.load(trainer.run_dir / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
        assert saved["Timer"]["time_elapsed"]["train"] > 1000


def test_early_stopping_on_what_is_logged_in_training_counts_rounds(tmp_path):
    class NoValidation(Clients):
        def val_dataset(self):
            return None

    for callback in (
        EarlyStopping("train/loss", patience=2, min_delta=100.0),
        EarlyStopping("train/loss", patience=2, min_delta=100.0, check_on_train_epoch_end=True),
    ):
        trainer = quiet_trainer(tmp_path, callbacks=[callback], max_rounds=50, local_epochs=3)
        trainer.fit(Regression(), NoValidation())
        assert trainer.current_round == 3
        assert (trainer.run_dir / "checkpoints" / "last.ckpt").exists()


def test_early_stopping_sees_the_rounds_training_metrics_when_it_is_validated(tmp_path):
    seen = []

    class Look(EarlyStopping):
        def on_validation_end(self, trainer, pl_module):
            super().on_validation_end(trainer, pl_module)
            seen.append(float(trainer.callback_metrics["train/loss"]))

    trainer = fit(tmp_path, Look("train/loss", patience=1, min_delta=100.0), max_rounds=50)
    assert trainer.current_round == 2
    assert seen == pytest.approx([float(row["train/loss"]) for row in rows(trainer)])


@pytest.mark.parametrize("bar", [RichProgressBar, TQDMProgressBar])
def test_progress_bars_have_ours_in_their_place(tmp_path, bar, capsys, caplog):
    trainer = fit(tmp_path, bar(), max_rounds=2)
    assert [type(c).__name__ for c in trainer.callbacks].count("RoundProgress") == 1
    assert not any(isinstance(c, bar) for c in trainer.callbacks)
    assert "round 2/2" in capsys.readouterr().out
    said = f"trainer.callbacks: fedlight's RoundProgress, which counts rounds: in place of {bar.__name__}."
    assert caplog.messages.count(said) == 1


def test_model_checkpoints_have_ours_in_their_place(tmp_path, caplog):
    trainer = fit(tmp_path, ModelCheckpoint(monitor="val/loss", mode="max", save_top_k=3), max_rounds=2)
    (found,) = (c for c in trainer.callbacks if isinstance(c, Checkpoint))
    assert (found.monitor, found.mode) == ("val/loss", "max")
    assert trainer.checkpoint_callback is found
    assert found.best == pytest.approx(max(float(row["val/loss"]) for row in rows(trainer)))
    assert (trainer.run_dir / "checkpoints" / "best.ckpt").exists()
    said = "fedlight's Checkpoint(monitor='val/loss'), which counts rounds: in place of ModelCheckpoint."
    assert caplog.text.count(said) == 1


def test_the_model_checkpoint_of_a_module_replaces_that_of_the_trainer(tmp_path):
    class Model(Regression):
        def configure_callbacks(self):
            last, best = ModelCheckpoint(save_last=True), ModelCheckpoint(monitor="val/loss", mode="max")
            return [last, best, ModelCheckpoint(monitor="other"), EarlyStopping("val/loss"), TQDMProgressBar()]

    trainer = fit(tmp_path, ModelCheckpoint(monitor="train/loss"), model=Model(), max_rounds=2)
    (found,) = (c for c in trainer.callbacks if isinstance(c, Checkpoint))
    assert (found.monitor, found.mode) == ("val/loss", "max")
    assert sum(isinstance(c, RoundProgress) for c in trainer.callbacks) == 1
    assert trainer.early_stopping_callback.monitor == "val/loss"


def test_a_checkpoint_callback_without_a_monitor_keeps_our_defaults(tmp_path):
    trainer = fit(tmp_path, ModelCheckpoint(), max_rounds=1)
    assert (trainer.checkpoint_callback.monitor, trainer.checkpoint_callback.mode) == (None, None)


def test_messages_name_what_exists():
    """What a refusal tells to import or to set is there."""
    import importlib
    import re

    text = " ".join([*_hooks._REFUSED_CALLBACKS.values(), *_hooks._REFUSED_MODULE.values()])
    for path in re.findall(r"fedlight(?:\.\w+)+", text):
        module, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(module), name), path
    settings = quiet_trainer(".").settings
    assert all(key in {*settings, "callbacks"} for key in re.findall(r"trainer\.(\w+)", text))
