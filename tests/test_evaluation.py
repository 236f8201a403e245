"""Evaluation of views and clients."""

from unittest.mock import patch

import pytest
import torch
from lightning.fabric.strategies import SingleDeviceStrategy
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F
from torchmetrics import MaxMetric, MeanAbsoluteError, MeanMetric, MeanSquaredError, MetricCollection
from torchmetrics.wrappers import ClasswiseWrapper

from fedlight.callbacks import HessianSpectrum
from fedlight.run.attempt import evaluating
from fedlight.run.loggers import read_metrics
from fedlight.server.federation import Federation
from fedlight.server.sampling import RoundRobin
from tests.helpers.tiny import Clients, Regression, Samples, quiet_trainer, weights


class Accurate(Regression):
    """Logs the share of predictions with the right sign."""

    def validation_step(self, batch, batch_idx):
        x, y = batch
        right = (self(x).sign() == y.sign()).float().mean()
        self.log_dict({"val/loss": F.mse_loss(self(x), y), "val/accuracy": right})


class PerClient(Clients):
    """Every client is evaluated on its own training data, but for the last, which has none."""

    def client_val_dataset(self, client):
        return self.client_dataset(client) if client < 3 else None


def fit(tmp_path, model=None, data=None, **settings):
    trainer = quiet_trainer(tmp_path, **{"max_rounds": 1, "clients_per_round": 4, **settings})
    trainer.fit(Accurate() if model is None else model, PerClient() if data is None else data)
    return {k: v.item() for k, v in trainer.callback_metrics.items()}


@pytest.mark.parametrize("size", [1, 3, 10, 50])
def test_means_do_not_depend_on_the_batches(tmp_path, size):
    data, reference = PerClient(), PerClient()
    data.eval_batch_size, reference.eval_batch_size = size, 10
    found, expected = fit(tmp_path, data=data), fit(tmp_path, data=reference)
    assert found["val/loss"] == pytest.approx(expected["val/loss"], rel=1e-6)
    assert found["val/accuracy"] == pytest.approx(expected["val/accuracy"], abs=1e-12)


@pytest.mark.parametrize(("limit", "samples"), [(1, 4), (2, 8), (0.4, 4), (1.0, 10), (None, 10)])
def test_limits_are_numbers_or_fractions(tmp_path, limit, samples):
    seen = []

    class Counting(Accurate):
        def validation_step(self, batch, batch_idx):
            if not self.trainer.sanity_checking:
                seen.append(len(batch[0]))
            super().validation_step(batch, batch_idx)

    fit(tmp_path, Counting(), limit_val_batches=limit, views=["server"], client_val_every_n_rounds=0)
    assert sum(seen) == samples


def test_no_batches_are_no_validation(tmp_path):
    assert not [name for name in fit(tmp_path, limit_val_batches=0) if name.startswith(("val/", "clients/acc"))]


def test_clients_are_evaluated_on_their_own_data(tmp_path):
    model, data = Accurate(), PerClient()
    found = fit(tmp_path, model, data)
    with torch.no_grad():
        values = []
        for client in range(3):
            x, y = data.client_dataset(client).batch(torch.arange(len(data.client_dataset(client))))
            values.append((model(x).sign() == y.sign()).double().mean())
    accuracy = torch.stack(values)
    assert found["clients/accuracy_mean"] == pytest.approx(accuracy.mean().item(), abs=1e-7)
    assert found["clients/accuracy_std"] == pytest.approx(accuracy.std(unbiased=False).item(), abs=1e-7)
    assert found["clients/accuracy_p10"] == pytest.approx(accuracy.quantile(0.1).item(), abs=1e-7)
    assert found["clients/accuracy_p90"] == pytest.approx(accuracy.quantile(0.9).item(), abs=1e-7)
    assert found["clients/worst_accuracy"] == pytest.approx(accuracy.min().item(), abs=1e-7)


@pytest.mark.parametrize(
    ("settings", "rounds"),
    [
        ({}, [1, 2, 3, 4, 5]),
        ({"check_val_every_n_rounds": 2}, [2, 4, 5]),
        ({"client_val_every_n_rounds": 3}, [3, 5]),
        ({"client_val_every_n_rounds": 0}, []),
        ({"client_val_every_n_rounds": 1, "check_val_every_n_rounds": 2}, [2, 4, 5]),
    ],
)
def test_how_often_clients_are_evaluated(tmp_path, settings, rounds):
    from fedlight.run.loggers import read_metrics

    trainer = quiet_trainer(tmp_path, max_rounds=5, **settings)
    trainer.fit(Accurate(), PerClient())
    rows = read_metrics(trainer.run_dir / "metrics.csv")
    assert [row["round"] + 1 for row in rows if "clients/accuracy_mean" in row] == rounds
    every = settings.get("check_val_every_n_rounds", 1)
    assert [row["round"] + 1 for row in rows if "val/loss" in row] == [
        r for r in range(1, 6) if r % every == 0 or r == 5
    ]


def test_many_clients_are_evaluated_at_the_end_only(tmp_path):
    class Many(Clients):
        def client_val_dataset(self, client):
            return self.client_dataset(client)

    from fedlight.run.loggers import read_metrics

    trainer = quiet_trainer(tmp_path, max_rounds=3)
    trainer.fit(Accurate(), Many(sizes=(2,) * 201))
    rows = read_metrics(trainer.run_dir / "metrics.csv")
    assert ["clients/accuracy_mean" in row for row in rows] == [False, False, True]


def test_data_that_is_read_sample_by_sample_gives_the_same(tmp_path):
    data = PerClient()
    data.held_out = Samples(data.held_out.inputs, data.held_out.targets)
    assert fit(tmp_path, data=data)["val/loss"] == fit(tmp_path)["val/loss"]


def test_views_are_the_weights_that_they_say(tmp_path):
    """Round-robin with one client: server and selected are its model; all is the mean by samples with the others."""
    trainer = quiet_trainer(tmp_path, sampler=RoundRobin(), clients_per_round=1, max_rounds=1)
    trainer.fit(Accurate(), PerClient())
    views, first = trainer._session.federation.state.views, torch.cat([p.flatten() for p in Accurate().parameters()])
    assert torch.equal(views["server"], views["selected"])
    torch.testing.assert_close(views["all"], first + (views["server"] - first) * 5 / 28, rtol=1e-6, atol=1e-7)


def test_evaluation_leaves_modes_as_they_were():
    net = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2))
    net[1].eval()
    with evaluating(net):
        assert not any(m.training for m in net.modules())
    assert [net.training, net[0].training, net[1].training] == [True, True, False]


def test_evaluation_changes_no_buffers(tmp_path):
    model = Accurate(net=nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)))
    quiet_trainer(tmp_path).validate(model, PerClient(), verbose=False)
    assert torch.equal(model.net[0].running_mean, torch.zeros(3))


CALLS = []


class Named(Regression):
    """Logs its squared error under the given names."""

    def __init__(self, *names):
        super().__init__()
        self.names = names

    def validation_step(self, batch, batch_idx):
        CALLS.append(batch_idx)  # an attribute of the module would be put back after a client's evaluation
        x, y = batch
        self.log_dict({name: F.mse_loss(self(x), y) + i for i, name in enumerate(self.names)})


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["val_acc"], ["acc"]),
        (["val/loss", "val/top5/accuracy", "auroc"], ["loss", "top5/accuracy", "auroc"]),
        (["val_loss", "val/loss", "loss"], ["logged_loss", "loss", "logged_logged_loss"]),
        (["val/", "validity", "val_"], ["val/", "validity", "val_"]),
    ],
)
def test_every_metric_that_a_client_logs_is_kept_under_a_name_of_its_own(tmp_path, names, short):
    model, data = Named(*names), PerClient()
    found = fit(tmp_path, model, data)
    with torch.no_grad():
        batches = (data.client_dataset(c).batch(torch.arange(len(data.client_dataset(c)))) for c in range(3))
        values = torch.stack([F.mse_loss(model(x), y) for x, y in batches]).double()
    for offset, name in enumerate(short):
        assert found[f"clients/{name}_mean"] == pytest.approx(values.mean().item() + offset, abs=1e-6)
        assert found[f"clients/{name}_std"] == pytest.approx(values.std(unbiased=False).item(), abs=1e-6)
        assert found[f"clients/{name}_min"] == pytest.approx(values.min().item() + offset, abs=1e-6)
        assert found[f"clients/{name}_p10"] == pytest.approx(values.quantile(0.1).item() + offset, abs=1e-6)
        worst = values.max() if "loss" in names[offset] else values.min()
        assert found[f"clients/worst_{name}"] == pytest.approx(worst.item() + offset, abs=1e-6)
    clients = [name for name in found if name.startswith("clients/") and name[-4:] in ("mean", "_std", "_min", "_p10")]
    assert len(clients) == 4 * len(names)


def test_clients_are_not_evaluated_for_nothing(tmp_path, caplog):
    """A module that logs nothing: one evaluation of the server's data and of one client, and a line."""

    class Shifted(PerClient):
        def client_val_dataset(self, client):
            return self.client_dataset(client) if client > 0 else None

    CALLS.clear()
    fit(tmp_path, Named(), Shifted(), max_rounds=3, views=["server"])
    evaluations = (
        1 + 3 * 3 + 3
    )  # one that is tried, ten samples of all rounds, and twelve of client 1, in batches of four
    assert len(CALLS) == evaluations
    assert [r.message for r in caplog.records if "clients/*" in r.message] == [
        "clients/*: validation_step logs nothing, so no client is evaluated on its own data."
    ]


class Silent(Regression):
    def test_step(self, batch, batch_idx):
        self.tested = True


def test_a_test_may_log_nothing(tmp_path):
    """What is missing then is not the data."""
    module = Silent()
    assert quiet_trainer(tmp_path).test(module, Clients()) == [{}]
    assert module.tested


class Merging(nn.Linear):
    """Adds a small matrix to its weight for evaluations, as LoRA does."""

    def __init__(self):
        super().__init__(3, 1)
        self.delta, self.merged = nn.Parameter(torch.zeros(1, 3)), False

    def train(self, mode=True):
        if self.merged == mode:
            self.weight.data += (1 - 2 * mode) * self.delta.data
            self.merged = not mode
        return super().train(mode)

    def forward(self, x):
        return F.linear(x, self.weight if self.merged else self.weight + self.delta, self.bias)


class Apart(Merging):
    train = nn.Module.train


@pytest.mark.parametrize("frozen", [False, True])
def test_layers_that_merge_themselves_for_an_evaluation_train_apart(tmp_path, frozen):
    found = []
    for layer in (Merging(), Apart()):
        layer.weight.requires_grad_(not frozen)
        model, callbacks = Regression(net=layer), [HessianSpectrum(density=False, layerwise=False)]
        metrics = fit(tmp_path, model, max_rounds=2, callbacks=callbacks)
        found.append((weights(model), [v for name, v in metrics.items() if name.startswith(("hessian/", "val/"))]))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4)


class Swaps(Regression):
    """Is evaluated with an average of its weights, which begins with 0."""

    def __init__(self):
        super().__init__()
        self.average = [torch.zeros_like(p) for p in self.parameters()]

    def on_validation_start(self):
        for p, other in zip(self.parameters(), self.average, strict=True):
            p.data, other.data = other.data, p.data

    on_validation_end = on_validation_start


def test_a_trial_of_validation_leaves_weights_that_it_exchanges(tmp_path):
    found = []
    for model in (Swaps(), Regression()):
        fit(tmp_path, model)
        found.append(weights(model))
    assert torch.equal(*found)


class Best(Regression):
    """Keeps what a resume does not know, beside what every evaluation begins anew."""

    def __init__(self):
        super().__init__()
        self.top, self.mean, self.outputs = MaxMetric(), MeanMetric(), []
        self.each = ClasswiseWrapper(MeanMetric())

    def on_validation_start(self):
        self.outputs = [None]

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.outputs.append(batch_idx)
        self.mean.update(batch[1])
        self.log("val/mean", self.mean)
        self.each.update(batch[1])

    def on_validation_epoch_end(self):
        self.each.reset()
        self.best = len(self.outputs)
        self.top.update(self.best)


def test_what_an_evaluation_leaves_in_the_module_is_said_once(tmp_path, caplog):
    quiet_trainer(tmp_path).fit(Best(), Clients())
    (said,) = (m for m in caplog.messages if "no checkpoint has it" in m)
    assert said.startswith("model: validation changes self.best, self.top, and no checkpoint has it")

    assert any(m.startswith("model: self.best: views and clients are evaluated with what the") for m in caplog.messages)

    class Kept(Best):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["best"] = self.best

    class Collects(Regression):
        def __init__(self):
            super().__init__()
            self.errors = MetricCollection(
                [MeanSquaredError(), MeanAbsoluteError()]
            )  # which finds groups of alike ones

        def validation_step(self, batch, batch_idx):
            self.errors.update(self(batch[0]), batch[1])

        def on_validation_epoch_end(self):
            self.log_dict(self.errors.compute())
            self.errors.reset()

    for command, model in (("fit", Kept()), ("fit", Collects()), ("fit", Regression()), ("validate", Best())):
        caplog.clear()
        getattr(quiet_trainer(tmp_path, max_rounds=1), command)(model, Clients())
        assert "no checkpoint has" not in caplog.text


def test_a_metric_that_runs_through_rounds_has_of_views_and_clients_their_own(tmp_path):
    class Largest(Regression):
        def __init__(self):
            super().__init__()
            self.largest = MaxMetric()

        def on_validation_epoch_end(self):
            self.largest.update(self.net.weight.abs().sum())
            self.log("val/largest", self.largest.compute())
            self.log("val/now", self.net.weight.abs().sum())

    class Each(Clients):
        client_val_dataset = Clients.client_dataset

    trainer = quiet_trainer(tmp_path, views=["server", "selected", "all"], client_val_every_n_rounds=1)
    trainer.fit(Largest(), Each())
    rows = read_metrics(trainer.run_dir / "metrics.csv")
    assert all(row["val/largest_all"] == row["val/now_all"] for row in rows)
    assert all(row["clients/worst_largest"] == row["clients/worst_now"] for row in rows)
    assert rows[-1]["val/largest"] == max(row["val/now"] for row in rows) > rows[-1]["val/now"]


def test_what_validation_sets_in_buffers_is_the_servers(tmp_path, monkeypatch):
    seen, written, keep = [], set(), Federation.keep_buffers
    monkeypatch.setattr(Federation, "keep_buffers", lambda self, found: (written.update(found), keep(self, found)))

    class Calibrated(Regression):
        """Finds a threshold in validation, for training, tests and all who read the checkpoint."""

        def __init__(self):
            super().__init__()
            self.register_buffer("threshold", torch.zeros(()))
            self.register_buffer("mask", torch.ones(3))  # is not written to, and so not looked at

        def on_client_start(self, client):
            seen.append(float(self.threshold))

        def on_validation_epoch_end(self):
            self.threshold = self.net.weight.detach().sum()

        def test_step(self, batch, batch_idx):
            self.log("test/threshold", self.threshold)

    trainer, model = quiet_trainer(tmp_path, clients_per_round=1, views=["server", "selected"]), Calibrated()
    trainer.fit(model, PerClient())
    assert model.threshold == model.net.weight.sum()
    assert len({*seen}) == 3
    assert (seen[0], written) == (0.0, {"threshold"})
    trainer.test(fresh := Calibrated(), PerClient(), ckpt_path="last")
    assert fresh.threshold == trainer.callback_metrics["test/threshold"] == model.threshold

    class Longer(Calibrated):
        def on_validation_epoch_end(self):
            self.threshold = torch.zeros(2)

    with pytest.raises(MisconfigurationException, match=r"'threshold' was \[\] and is \[2\] after validation"):
        fit(tmp_path, Longer())


def test_steps_of_an_evaluation_wait_for_no_other_process(tmp_path):
    found = []

    class Gathers(Regression):
        def validation_step(self, batch, batch_idx):
            found.append(torch.equal(self.all_gather(batch[1]), batch[1]))

    trainer = quiet_trainer(tmp_path)
    with patch.object(SingleDeviceStrategy, "all_gather", side_effect=AssertionError("asks the other processes")):
        trainer.fit(Gathers(), PerClient())
    assert found
    assert all(found)
    assert not trainer.alone
