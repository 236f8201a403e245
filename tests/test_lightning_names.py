"""What modules and callbacks read on ``trainer`` and ``self``: its value in a round, or a sentence that names it."""

import inspect

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import RunningStage
from torch import nn

from fedlight import FederatedTrainer
from fedlight.module.looking import _COUNTERS
from tests.helpers.tiny import Clients, Regression, quiet_trainer, weights

SENTENCES = ("has no meaning in a federated run. ", "is known only from when fit, validate or test is called")
REFUSED = {
    *("predict_dataloaders", "predict_loop", "num_predict_batches", "limit_predict_batches", "init_module"),
    *("test_loop", "validate_loop", "scaler", "val_check_batch", "enable_autolog_hparams"),
    *("distributed_sampler_kwargs", "num_sanity_val_batches", "reload_dataloaders_every_n_epochs"),
}


def names_of_lightnings_trainer():
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return [name for name in dir(Trainer(accelerator="cpu", **quiet)) if not name.startswith("_")]


def read(owner, names):
    """The values of names, and what is said of those that have none."""
    values, refused = {}, {}
    for name in names:
        try:
            values[name] = getattr(owner, name)
        except (AttributeError, RuntimeError) as error:
            refused[name] = str(error)
    return values, refused


SEEN = {}


class Curious(Regression):
    """Reads every name of Lightning's trainer in every place."""

    def __init__(self, names):
        super().__init__()
        self.names = names
        SEEN.clear()

    def look(self, place):
        SEEN[place] = read(self.trainer, self.names)  # an attribute of the module would be put back after each client

    def setup(self, stage):
        self.look("setup")

    def configure_optimizers(self):
        self.look("configure_optimizers")
        return super().configure_optimizers()

    def training_step(self, batch, batch_idx):
        self.look("training_step")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.look("validation_step")
        super().validation_step(batch, batch_idx)

    def on_train_epoch_end(self):
        self.look("on_train_epoch_end")

    def on_fit_end(self):
        self.look("on_fit_end")


def test_every_name_of_lightnings_trainer_is_supplied_or_refused_by_name(tmp_path):
    """A name that Lightning gains must be looked at here: it is to be supplied, or to be listed as refused."""
    names = names_of_lightnings_trainer()
    trainer, model = quiet_trainer(tmp_path, max_rounds=1), Curious(names)
    _, before = read(trainer, names)
    trainer.fit(model, Clients())
    _, after = read(trainer, names)
    for place, refused in {"before": before, "after": after, **{p: r for p, (_, r) in SEEN.items()}}.items():
        assert all(any(s in text for s in SENTENCES) for text in refused.values()), (place, refused)
        assert place == "before" or set(refused) <= REFUSED, place
    assert set(SEEN["training_step"][1]) == REFUSED
    assert not hasattr(trainer, "predict_loop")
    assert getattr(trainer, "val_check_batch", 7) == 7


def test_every_name_of_lightnings_module_is_supplied_in_a_step(tmp_path):
    names = [n for n in dir(LightningModule) if not n.startswith("_") and n not in dir(nn.Module)]
    found = {}

    class Module(Regression):
        def training_step(self, batch, batch_idx):
            assert read(self, names)[1] == {}
            optimizer, one = self.optimizers(), torch.ones(2)
            found["optimizer"] = type(optimizer.optimizer), self.optimizers(use_pl_optimizer=False)
            found["schedulers"] = self.lr_schedulers()
            found["gathered"] = self.all_gather(one)
            self.toggle_optimizer(optimizer)
            self.untoggle_optimizer(optimizer)
            self.print("printed")
            found["steps"] = [*found.get("steps", []), self.global_step]
            return super().training_step(batch, batch_idx)

        def on_before_optimizer_step(self, optimizer):
            self.clip_gradients(optimizer, 1e-3, "norm")
            found["norm"] = torch.cat([p.grad.flatten() for p in self.parameters()]).norm().item()

    trainer = quiet_trainer(tmp_path, max_rounds=2, clients_per_round=1.0)
    trainer.fit(Module(), Clients(sizes=(8, 4)))
    assert found["optimizer"][0] is torch.optim.SGD
    assert type(found["optimizer"][1]) is torch.optim.SGD
    assert found["schedulers"] is None
    assert found["gathered"].tolist() == [1, 1]
    assert found["norm"] == pytest.approx(1e-3, rel=1e-2)
    assert found["steps"][-6:] == [0, 1, 0, 3, 4, 3]  # clients of two steps and of one, after none and after three


def test_names_have_the_values_of_the_present_client(tmp_path):
    """Clients of 5 and 12 samples make two and three batches, in two local epochs; the validation data three."""
    seen, names = {}, ("num_training_batches", "estimated_stepping_batches", "max_steps", "current_epoch", "max_epochs")

    class See(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            values = [getattr(trainer, name) for name in names]
            loop = trainer.fit_loop
            at = [loop.epoch_loop.batch_idx, loop.total_batch_idx, trainer.is_last_batch, trainer.global_step]
            key = trainer.current_round, len(trainer.train_dataloader.dataset)
            seen.setdefault(key, []).append((values, at, len(trainer.train_dataloader)))

        def on_train_epoch_start(self, trainer, pl_module):
            seen["state"] = trainer.state.fn, trainer.state.stage, trainer.training, trainer.validating
            seen["parts"] = trainer.model is pl_module, trainer.optimizers[0].param_groups[0]["lr"]
            seen["devices"] = trainer.local_rank, trainer.node_rank, trainer.num_devices, trainer.device_ids
            seen["accelerator"], seen["random"] = trainer.accelerator, torch.random.get_rng_state()
            for _ in trainer.train_dataloader:
                pass
            seen["quiet"] = torch.equal(torch.random.get_rng_state(), seen["random"])
            seen["settings"] = trainer.limit_train_batches, trainer.gradient_clip_val, trainer.precision
            seen["reduced"] = trainer.strategy.reduce(torch.tensor(3.0)).item()

        def on_validation_start(self, trainer, pl_module):
            seen["validation"] = trainer.state.stage, trainer.validating, trainer.evaluating, trainer.training
            seen["batches"] = trainer.num_val_batches, len(trainer.val_dataloaders), trainer.enable_validation

    trainer = quiet_trainer(tmp_path, callbacks=See(), max_rounds=2, clients_per_round=1.0, local_epochs=2)
    trainer.fit(Regression(), Clients(sizes=(5, 12)))
    for round, before in ((0, 0), (1, 10)):
        for size, batches in ((5, 2), (12, 3)):
            expected = [
                ([batches, 2 * batches, 2 * batches, round, 2], [i % batches, i, (i + 1) % batches == 0, before + i])
                for i in range(2 * batches)
            ]
            assert seen[round, size] == [(*values, batches) for values in expected]
    assert seen["state"] == ("fit", RunningStage.TRAINING, True, False)
    assert seen["parts"] == (True, 0.1)
    assert seen["devices"] == (0, 0, 1, [0])
    assert isinstance(seen["accelerator"], CPUAccelerator)
    assert seen["quiet"]
    assert seen["settings"] == (1.0, None, "32-true")
    assert seen["reduced"] == 3
    assert seen["validation"] == (RunningStage.VALIDATING, True, True, False)
    assert seen["batches"] == ([3], 3, True)
    assert (trainer.state.stage, trainer.state.finished, trainer.training) == (None, True, False)
    assert trainer.global_step == 20


def test_stages_of_test_and_validate(tmp_path):
    seen = []

    class Model(Regression):
        def test_step(self, batch, batch_idx):
            seen.append(self.trainer.testing and not self.trainer.training)

        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            seen.append(self.trainer.validating)

        def on_test_epoch_end(self):
            self.log("test/loss", 1.0)

    quiet_trainer(tmp_path).test(Model(), Clients(), verbose=False)
    quiet_trainer(tmp_path).validate(Model(), Clients(), verbose=False)
    assert seen == [True] * 6


def test_arguments_of_lightnings_trainer_are_answered_with_what_they_are_here(tmp_path):
    """Whatever its trainer takes, this one takes or answers; it ended in Python's TypeError."""
    given = set(inspect.signature(Trainer).parameters) - set(inspect.signature(FederatedTrainer).parameters)
    for name in given:
        with pytest.raises(
            TypeError, match=rf"{name}' is (not known; did you mean|of Lightning's own Trainer and has)"
        ):
            FederatedTrainer(**{name: 1})
    for name, here in {"max_epochs": "max_rounds", "limit_predict_batches": "leave it out", "names": "'name'"}.items():
        with pytest.raises(TypeError, match=rf"FederatedTrainer.__init__: '{name}' is .*{here}"):
            FederatedTrainer(**{name: 1})
    trainer = quiet_trainer(tmp_path)
    for call in ("fit", "validate", "test", "predict"):
        with pytest.raises(MisconfigurationException, match=r"dataloaders`: data: expected a .* DatasetPartition\("):
            getattr(trainer, call)(Regression(), **{"train_dataloaders" if call == "fit" else "dataloaders": [1]})


def test_before_fit_names_are_known_or_say_when_they_will_be():
    trainer = FederatedTrainer(limit_val_batches=3, max_rounds=7)
    assert (trainer.current_epoch, trainer.global_step, trainer.max_epochs, trainer.limit_val_batches) == (0, 0, 7, 3)
    assert not trainer.training
    assert trainer.checkpoint_callback is trainer.callbacks[0]
    with pytest.raises(AttributeError, match="known only from when fit"):
        _ = trainer.num_training_batches


def test_the_logger_is_the_users_first_one(tmp_path):
    seen = {}

    class Model(Regression):
        def on_train_start(self):
            seen["logger"], seen["loggers"] = self.logger, [type(one).__name__ for one in self.loggers]
            self.logger.log_metrics({"own": 3.0}, step=17)

    quiet_trainer(tmp_path, logger=CSVLogger(tmp_path), max_rounds=1).fit(Model(), Clients())
    assert isinstance(seen["logger"], CSVLogger)
    assert seen["loggers"] == ["CSVLogger", "MetricsCSV"]
    quiet_trainer(tmp_path, fast_dev_run=True).fit(Model(), Clients())
    seen["logger"].experiment.add_histogram("weights", torch.zeros(3))  # as in Lightning, nothing happens


def test_what_a_module_logs_to_metrics_csv_itself_joins_the_round(tmp_path):
    class Model(Regression):
        def on_client_end(self, client):
            self.logger.log_metrics({f"own/{client}": self.current_epoch + 0.5}, step=self.global_step)

    trainer = quiet_trainer(tmp_path, max_rounds=2, clients_per_round=1.0)
    trainer.fit(Model(), Clients(sizes=(8, 4)))
    rows = (trainer.run_dir / "metrics.csv").read_text().splitlines()
    columns = rows[0].split(",")
    assert [[row.split(",")[columns.index(name)] for name in ("round", "own/1")] for row in rows[1:]] == [
        ["0", "0.5"],
        ["1", "1.5"],
    ]
    with pytest.raises(AttributeError, match=r"metrics.csv has no `experiment`.*trainer.logger"):
        _ = trainer.logger.experiment


def test_names_of_a_round_are_not_frozen_in_recorded_steps():
    assert {"fit_loop", "is_last_batch", "optimizers", "global_step", "callback_metrics", "logger"} <= _COUNTERS


def test_metrics_are_there_when_lightning_has_them(tmp_path):
    seen = {}

    class Model(Regression):
        def training_step(self, batch, batch_idx):
            self.log("train_loss", float(batch_idx))
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            self.log("val/index", float(batch_idx), batch_size=1)

        def on_train_epoch_end(self):
            seen["train"] = float(self.trainer.callback_metrics["train_loss"])

        def on_validation_epoch_end(self):
            seen["own"] = float(self.trainer.callback_metrics["val/index"])
            self.log("val/late", 5.0)

    class See(Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            seen["callback"] = float(trainer.callback_metrics["val/index"])

        def on_validation_end(self, trainer, pl_module):
            seen["end"] = float(trainer.callback_metrics["val/late"])

    trainer = quiet_trainer(tmp_path, callbacks=See(), max_rounds=1, clients_per_round=1.0)
    trainer.fit(Model(), Clients(sizes=(12,)))
    assert seen == {"train": 1.0, "callback": 1.0, "own": 1.0, "end": 5.0}
    assert trainer.callback_metrics["val/index"] == 1


def test_metrics_that_are_computed_at_the_end_of_an_epoch_are_not_reset_by_a_look(tmp_path):
    from torchmetrics import MeanMetric

    seen = []

    class Model(Regression):
        def __init__(self):
            super().__init__()
            self.mean = MeanMetric()

        def validation_step(self, batch, batch_idx):
            self.mean.update(float(batch_idx))
            self.log("val/mean", self.mean)

        def on_validation_epoch_end(self):
            seen.append((float(self.trainer.callback_metrics["val/mean"]), float(self.mean.compute())))

    trainer = quiet_trainer(tmp_path, max_rounds=1, views=["server"], client_val_every_n_rounds=0)
    trainer.fit(Model(), Clients())
    assert seen == [(1.0, 1.0)]
    assert trainer.callback_metrics["val/mean"] == 1


def test_gradients_that_a_module_clears_itself_stay_views(tmp_path):
    class Clears(Regression):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.optimizers().zero_grad()

    found, expected = Clears(), Regression()
    for model in (found, expected):
        quiet_trainer(tmp_path).fit(model, Clients())
    assert torch.equal(weights(found), weights(expected))
