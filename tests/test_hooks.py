"""Which hooks are called, how often and in which order; what cannot be honoured is refused by name."""

import lightning.pytorch.callbacks as lightning_callbacks
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback, ModelSummary
from lightning.pytorch.core.hooks import CheckpointHooks, ModelHooks

from fedlight.callbacks.progress import RoundProgress
from fedlight.module.hooks import _REFUSED_MODULE, BATCH_HOOKS, EPOCH_HOOKS
from fedlight.perturbations import SAM
from tests.helpers.tiny import Clients, Regression, quiet_trainer, weights

# Hooks that are called with the arguments that Lightning gives them (and the round hooks, which are fedlight's).
SUPPORTED = {
    *(*EPOCH_HOOKS, *BATCH_HOOKS, "on_fit_start", "on_train_start", "on_train_end", "on_fit_end"),
    *("on_round_start", "on_client_start", "on_client_end", "on_round_metrics", "on_round_end"),
    *("setup", "teardown", "configure_model", "configure_callbacks", "on_exception"),
    *("on_save_checkpoint", "on_load_checkpoint"),
}
for stage in ("validation", "test", "predict"):
    SUPPORTED |= {f"on_{stage}_{when}_{end}" for when in ("epoch", "batch") for end in ("start", "end")}
    SUPPORTED |= {f"on_{stage}_start", f"on_{stage}_end"}


def recorder(base, name, calls, hooks=SUPPORTED):
    """A subclass that notes every hook that is called on it."""

    def hook(event):
        def method(self, *args):
            calls.append(f"{name}.{event}")

        return method

    noted = {h: hook(h) for h in hooks if h not in ("configure_model", "configure_callbacks")}
    return type(name, (base,), noted)()


def record(tmp_path, sizes=(4,), hooks=SUPPORTED, validation=True, **settings):
    calls = []
    model, callback = recorder(Regression, "model", calls, hooks), recorder(Callback, "callback", calls, hooks)
    data = Clients(sizes=sizes)
    if not validation:
        data.held_out = None
    settings = {"max_rounds": 1, "clients_per_round": 1.0, "enable_checkpointing": False, **settings}
    quiet_trainer(tmp_path, callbacks=callback, **settings).fit(model, data)
    return calls


def both(*hooks):
    return [f"{owner}.{hook}" for hook in hooks for owner in ("callback", "model")]


def test_the_order_of_a_run_with_one_client_and_one_batch(tmp_path):
    assert record(tmp_path, validation=False) == both(
        "setup",
        "on_fit_start",
        "on_train_start",
        "on_round_start",
        "on_client_start",
        "on_train_epoch_start",
        "on_train_batch_start",
        "on_before_zero_grad",
        "on_before_backward",
        "on_after_backward",
        "on_before_optimizer_step",
        "on_train_batch_end",
        "on_train_epoch_end",
        "on_client_end",
        "on_round_metrics",
        "on_round_end",
        "on_train_end",
        "on_fit_end",
        "teardown",
    )


def test_how_often_each_hook_is_called(tmp_path):
    """Clients of 5 and 8 samples make two batches each, in three epochs of two rounds; validation has three batches."""
    calls = record(tmp_path, sizes=(5, 8), max_rounds=2, local_epochs=3)
    rounds, clients, epochs, batches = 2, 4, 12, 24
    expected = dict.fromkeys(("setup", "on_fit_start", "on_train_start", "on_train_end", "on_fit_end", "teardown"), 1)
    expected |= dict.fromkeys(("on_round_start", "on_round_metrics", "on_round_end"), rounds)
    expected |= {"on_client_start": clients, "on_client_end": clients}
    expected |= {"on_train_epoch_start": epochs, "on_train_epoch_end": epochs} | dict.fromkeys(BATCH_HOOKS, batches)
    for when, times in (("start", 1), ("epoch_start", 1), ("batch_start", 3), ("batch_end", 3), ("epoch_end", 1)):
        expected[f"on_validation_{when}"] = rounds * times
    expected["on_validation_end"] = rounds
    assert {h: calls.count(f"callback.{h}") for h in SUPPORTED if f"callback.{h}" in calls} == expected
    # The module's own hooks see every evaluation: of the server's model, which FedAvg's selected one is, and of all;
    # callbacks see the server's. A step of validation is tried before.
    tried = [f"on_validation_{when}" for when in ("start", "epoch_start", "batch_start", "batch_end")]
    for hook, times in expected.items():
        views = 2 if "validation" in hook else 1
        assert calls.count(f"model.{hook}") == times * views + (hook in tried), hook


def test_a_step_of_two_passes_or_batches_has_one_optimizer_step(tmp_path):
    passes = record(tmp_path, perturbation=SAM(0.1), validation=False)
    assert passes.count("model.on_before_backward") == 2
    assert passes.count("model.on_after_backward") == 2
    assert passes.count("model.on_before_optimizer_step") == passes.count("model.on_train_batch_end") == 1
    groups = record(tmp_path, sizes=(8,), accumulate_grad_batches=2, validation=False)
    assert groups.count("model.on_before_zero_grad") == groups.count("model.on_before_optimizer_step") == 1
    assert groups.count("model.on_train_batch_start") == groups.count("model.on_train_batch_end") == 2


def test_test_and_validate_call_their_hooks(tmp_path):
    calls = []
    model, callback = recorder(Regression, "model", calls), recorder(Callback, "callback", calls)
    quiet_trainer(tmp_path, callbacks=callback).test(model, Clients(), verbose=False)
    assert calls == both(
        *("setup", "on_test_start", "on_test_epoch_start"),
        *("on_test_batch_start", "on_test_batch_end") * 3,
        *("on_test_epoch_end", "on_test_end", "teardown"),
    )


def test_hooks_get_what_lightning_gives_them(tmp_path):
    seen = {}

    class See(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen["start"] = (len(batch), batch_idx, trainer.lightning_module is pl_module)

        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            seen["optimizer"] = type(optimizer).__name__

        def on_before_backward(self, trainer, pl_module, loss):
            seen["loss"] = loss.requires_grad

        def on_after_backward(self, trainer, pl_module):
            seen["gradient"] = pl_module.net.weight.grad.abs().sum().item() > 0

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen["clipped"] = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in pl_module.parameters()]))

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen["end"] = (outputs["loss"].requires_grad, len(batch[0]), batch_idx)

        def on_client_end(self, trainer, pl_module, client):
            seen.setdefault("clients", []).append((trainer.current_round, client))

        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            seen.setdefault("validation", []).append((len(batch[0]), batch_idx))

        def on_validation_end(self, trainer, pl_module):
            seen["metric"] = trainer.callback_metrics["val/loss"].item() > 0

    trainer = quiet_trainer(tmp_path, callbacks=[See()], max_rounds=1, clients_per_round=4, gradient_clip_val=0.01)
    trainer.fit(Regression(), Clients())
    assert seen["start"] == (2, 0, True)
    assert seen["optimizer"] == "SGD"
    assert [seen["loss"], seen["gradient"], seen["metric"]] == [True, True, True]
    torch.testing.assert_close(seen["clipped"].item(), 0.01, rtol=1e-3, atol=0)
    assert seen["end"] == (False, 3, 0)
    assert seen["clients"] == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert seen["validation"] == [(4, 0), (4, 1), (2, 2)]


def test_minus_one_skips_the_rest_of_an_epoch(tmp_path):
    class Skip(Regression):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 1 else None

    trainer = quiet_trainer(tmp_path, max_rounds=1, clients_per_round=4, local_epochs=2)
    trainer.fit(Skip(), Clients())
    assert trainer.global_step == 4 * 2


def test_a_gradient_that_a_hook_changes_is_what_the_optimizer_gets(tmp_path):
    class Stop(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            for p in pl_module.parameters():
                p.grad.zero_()

    model = Regression()
    quiet_trainer(tmp_path, callbacks=[Stop()]).fit(model, Clients())
    assert torch.equal(weights(model), weights(Regression()))


def test_a_failure_reaches_on_exception_and_teardown_and_not_the_end(tmp_path):
    calls = []

    class Failing(Regression):
        def on_round_end(self):
            raise KeyError("mine")

    callback = recorder(Callback, "callback", calls)
    with pytest.raises(KeyError, match="mine"):
        quiet_trainer(tmp_path, callbacks=callback).fit(Failing(), Clients())
    assert calls[-2:] == ["callback.on_exception", "callback.teardown"]
    assert "callback.on_train_end" not in calls
    assert "callback.on_fit_end" not in calls


def test_the_modules_own_callbacks_join_and_replace(tmp_path):
    calls = []

    class Mine(Callback):
        def __init__(self, name):
            self.name = name

        def on_round_end(self, trainer, pl_module):
            calls.append(self.name)

    class Model(Regression):
        def configure_callbacks(self):
            return [Mine("module's")]

    trainer = quiet_trainer(tmp_path, callbacks=[Mine("trainer's")], max_rounds=1)
    trainer.fit(Model(), Clients())
    assert calls == ["module's"]
    # The checkpoint saves what others did in the round, and does not wait for pictures.
    assert [type(c).__name__ for c in trainer.callbacks] == [
        *("ConfigFile", "Mine", "Checkpoint", "PartitionPicture", "Curves")
    ]


def test_configure_model_comes_after_prepare_data_and_setup_and_before_parameters_are_read(tmp_path):
    class Late(LightningModule):
        training_step, validation_step = Regression.training_step, Regression.validation_step
        configure_optimizers, forward = Regression.configure_optimizers, Regression.forward
        lr = 0.1

        def prepare_data(self):
            self.downloaded = 3

        def setup(self, stage):
            self.inputs = self.downloaded

        def configure_model(self):
            self.net = torch.nn.Linear(self.inputs, 1)
            self.net.load_state_dict(Regression().net.state_dict())

    model, expected = Late(), Regression()
    quiet_trainer(tmp_path).fit(model, Clients())
    quiet_trainer(tmp_path).fit(expected, Clients())
    assert torch.equal(weights(model), weights(expected))


def test_early_stopping_stops(tmp_path):
    callback = EarlyStopping("val/loss", patience=1, min_delta=100.0, mode="min")
    trainer = quiet_trainer(tmp_path, callbacks=[callback], max_rounds=50)
    trainer.fit(Regression(), Clients())
    assert trainer.current_round == 2
    assert callback.stopped_epoch == 2
    assert (trainer.run_dir / "checkpoints" / "last.ckpt").exists()


@pytest.mark.parametrize("how", ["EarlyStopping", "ReduceLROnPlateau"])
def test_what_is_monitored_and_not_logged_is_named_and_the_round_is_saved(tmp_path, how):
    class Plateau(Regression):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": schedule, "monitor": "val_loss"}

    callbacks, model = ([EarlyStopping("val_loss")], Regression()) if how == "EarlyStopping" else ([], Plateau())
    trainer = quiet_trainer(tmp_path, callbacks=callbacks, check_val_every_n_rounds=2)
    with pytest.raises(MisconfigurationException, match=f"{how}.monitor='val_loss' was not.* mean 'val/loss'.* last"):
        trainer.fit(model, Clients())
    assert len((trainer.run_dir / "metrics.csv").read_text().splitlines()) == 3
    assert torch.load(trainer.run_dir / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 2


@pytest.mark.parametrize("monitor", ["train/loss", "val/loss", "val/loss_all", "clients/worst_loss", "fake"])
def test_early_stopping_takes_whatever_a_round_logs_once_a_round(tmp_path, monitor):
    class Fake(Callback):
        def on_round_metrics(self, trainer, module):
            return {"fake": 1.0} if trainer.current_round % 2 == 0 else None

    class Own(Clients):
        client_val_dataset = Clients.client_dataset

    for now in (False, True) if monitor in ("train/loss", "val/loss") else (None,):
        stop = EarlyStopping(monitor, patience=2, min_delta=100.0, check_on_train_epoch_end=now)
        trainer = quiet_trainer(tmp_path, callbacks=[stop, Fake()], max_rounds=50, check_val_every_n_rounds=2)
        trainer.fit(Regression(), Own())
        assert trainer.current_round == (3 if now and monitor == "train/loss" else 6)
        assert "val/loss" in trainer.callback_metrics


def test_should_stop_ends_the_run_after_the_round_with_an_evaluation(tmp_path):
    class Stop(Regression):
        def on_client_end(self, client):
            self.trainer.should_stop = self.current_epoch == 2

    trainer = quiet_trainer(tmp_path, max_rounds=50, check_val_every_n_rounds=10)
    trainer.fit(Stop(), Clients())
    assert trainer.current_round == 3
    assert "val/loss" in trainer.callback_metrics


def test_lightnings_small_callbacks_work(tmp_path):
    rounds = []
    callbacks = [LambdaCallback(on_train_end=lambda *_: rounds.append(1)), ModelSummary()]
    quiet_trainer(tmp_path, callbacks=callbacks, max_rounds=1).fit(Regression(), Clients())
    assert rounds == [1]


def test_refused_hooks_are_named(tmp_path):
    of_lightning_1 = ("training_epoch_end", "validation_epoch_end", "test_epoch_end")
    for hook in sorted({*_REFUSED_MODULE, *of_lightning_1}):
        model = type("Model", (Regression,), {hook: lambda self, *args: None})()
        with pytest.raises(MisconfigurationException, match=f"Model overrides {hook}, which is not supported: "):
            quiet_trainer(tmp_path).fit(model, Clients())


def test_a_module_without_what_training_needs_is_refused(tmp_path):
    class Nothing(LightningModule):
        pass

    with pytest.raises(MisconfigurationException, match="Nothing does not define training_step"):
        quiet_trainer(tmp_path).fit(Nothing(), Clients())

    class Manual(Regression):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(
        MisconfigurationException, match="Manual sets automatic_optimization=False; manual optimization"
    ):
        quiet_trainer(tmp_path).fit(Manual(), Clients())


@pytest.mark.parametrize("found", [1.0, [1.0], {"a": "x"}, {"a": None}, {"a": torch.ones(2)}, {1: 2.0}])
def test_what_a_round_logs_is_numbers_by_names(tmp_path, found):
    class Odd(Callback):
        def on_round_metrics(self, trainer, pl_module):
            return found

    with pytest.raises(MisconfigurationException, match="trainer.callbacks: on_round_metrics gives .*; it may give a"):
        quiet_trainer(tmp_path, callbacks=[Odd()]).fit(Regression(), Clients())


def test_a_parameter_group_that_comes_late_is_refused(tmp_path):
    class Late(Regression):
        def on_train_epoch_start(self):
            self.optimizers().add_param_group({"params": [self.net.bias]})

        def configure_optimizers(self):
            return torch.optim.SGD([self.net.weight], lr=0.1)

    with pytest.raises(MisconfigurationException, match="model: a parameter group was added while a client trains"):
        quiet_trainer(tmp_path).fit(Late(), Clients())


@pytest.mark.parametrize(
    "name",
    [
        *("BackboneFinetuning", "StochasticWeightAveraging", "GradientAccumulationScheduler", "OnExceptionCheckpoint"),
        *("WeightAveraging", "BatchSizeFinder", "LearningRateFinder", "ModelPruning"),
    ],
)
def test_refused_callbacks_are_named(tmp_path, name):
    cls = getattr(lightning_callbacks, name)
    with pytest.raises(MisconfigurationException, match="trainer.callbacks: .* does not work in federated training: "):
        quiet_trainer(tmp_path, callbacks=[object.__new__(cls)]).fit(Regression(), Clients())


def test_every_hook_of_lightning_is_called_refused_or_of_another_command():
    """A hook that Lightning gains must be looked at here."""
    elsewhere = {"on_sanity_check_start", "on_sanity_check_end", "on_validation_model_zero_grad"}
    for base in (Callback, ModelHooks, CheckpointHooks):
        hooks = {name for name in vars(base) if name.startswith("on_") and "predict_model" not in name}
        assert hooks <= SUPPORTED | set(_REFUSED_MODULE) | elsewhere


def test_progress_prints_plain_lines_where_there_is_no_terminal(tmp_path, capsys):
    trainer = quiet_trainer(tmp_path, callbacks=[RoundProgress(every_n_seconds=1e9)], max_rounds=4)
    trainer.fit(Regression(), Clients())
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["round 1/4", "round 4/4"]
    assert "val loss" in lines[0]
    assert lines[1].endswith("0 s left")


def test_progress_draws_a_bar_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    trainer = quiet_trainer(tmp_path, callbacks=[RoundProgress()], max_rounds=2)
    trainer.fit(Regression(), Clients())
    assert "2/2" in capsys.readouterr().out
