"""What self.log collects over batches, epochs, clients and processes."""

import csv

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch.nn import functional as F
from torchmetrics import MaxMetric, MeanMetric, MeanSquaredError, MetricCollection, SumMetric

from fedlight.module.logs import LogCollector, collecting_logs
from fedlight.penalties.base import Penalty
from fedlight.run.loggers import read_metrics
from fedlight.seeding import generator
from fedlight.server.sampling import RoundRobin
from tests.helpers.tiny import SIZES, Clients, Keep, Regression, quiet_trainer


class Logs(Regression):
    """Logs the number of samples of each batch in every way."""

    def training_step(self, batch, batch_idx):
        loss, size = super().training_step(batch, batch_idx), float(len(batch[0]))
        self.log("mean", size, prog_bar=True, on_step=True, on_epoch=True)
        self.log("unweighted", size, batch_size=1)
        for how in ("sum", "min", "max"):
            self.log(how, torch.tensor([size]), reduce_fx=how)
        self.log_dict({"a": size, "b": torch.tensor(2 * size)}, sync_dist=True)
        self.log("function", size, reduce_fx=torch.mean)
        self.log("train/loss", torch.tensor(-1.0), batch_size=1)  # in the place of the loss that is returned
        return loss


def fit(tmp_path, model, data=None, **settings):
    settings = {"max_rounds": 1, "clients_per_round": 1.0, **settings}
    trainer = quiet_trainer(tmp_path, **settings)
    trainer.fit(model, Clients() if data is None else data)
    return {k: v.item() for k, v in trainer.callback_metrics.items()}


def test_values_are_reduced_over_unequal_batches_and_clients(tmp_path):
    """Clients of 5, 12, 8 and 3 samples have batches of 4 1, 4 4 4, 4 4 and 3."""
    batches = [4, 1, 4, 4, 4, 4, 4, 3]
    found = fit(tmp_path, Logs(), local_epochs=2)
    weighted = sum(b * b for b in batches) / sum(batches)
    for name in ("mean", "a", "function"):
        assert found[name] == pytest.approx(weighted)
    assert found["b"] == pytest.approx(2 * weighted)
    assert found["unweighted"] == pytest.approx(sum(batches) / len(batches))
    assert (found["sum"], found["min"], found["max"], found["train/loss"]) == (2 * sum(batches), 1, 4, -1)


def test_train_loss_has_all_digits_in_double_precision(tmp_path):
    class Same(Regression):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("same", loss)
            return loss

    fit(tmp_path, Same(), Clients(dtype=torch.float64), precision="64-true")
    (row,) = read_metrics(next(tmp_path.rglob("metrics.csv")))
    assert row["train/loss"] == row["same"]


def test_train_loss_is_the_mean_over_samples_of_the_loss_without_penalties(tmp_path):
    class Constant(Penalty):
        def penalty(self, module, measured):
            return 5 * module.net.weight.square().sum()

    losses = []

    class Model(Regression):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            losses.append((loss.item(), len(batch[0])))
            return loss

    found = fit(tmp_path, Model(), callbacks=[Constant()])
    seen = [(loss, n) for loss, n in losses[1:]]  # the first is the trial before training
    expected = sum(loss * n for loss, n in seen) / sum(SIZES)
    assert found["train/loss"] == pytest.approx(expected, rel=1e-5)
    assert found["train/penalty"] > 0


class WithMetrics(Regression):
    """Logs torchmetrics objects."""

    def __init__(self):
        super().__init__()
        self.mse, self.val_mse = MeanSquaredError(), MeanSquaredError()
        self.both = MetricCollection({"mean": MeanMetric(), "largest": MaxMetric()}, prefix="target/")
        self.by_hand = SumMetric()

    def training_step(self, batch, batch_idx):
        x, y = batch
        out = self(x)
        self.mse(out.detach(), y)
        self.log("train/mse", self.mse)
        self.both.update(y)
        self.log_dict(self.both)
        self.by_hand(float(len(y)))
        return F.mse_loss(out, y)

    def on_train_epoch_end(self):
        self.log("samples", self.by_hand.compute())
        self.by_hand.reset()

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.val_mse.update(self(x), y)
        self.log("val/mse", self.val_mse, on_step=False, on_epoch=True)
        self.log("val/loss", F.mse_loss(self(x), y))


def test_torchmetrics_are_computed_per_client_and_weighted_by_its_samples(tmp_path):
    data, by_client = Clients(), {}

    keep = Keep()
    found = fit(tmp_path, WithMetrics(), data, algorithm=keep)
    for r in keep.rounds[-1]:
        by_client[r.client] = {k: (v / w).item() for k, (v, w) in r.metrics.items()}
        assert r.metrics["train/mse"][1].item() == SIZES[r.client]
    for client, metrics in by_client.items():
        y = data.client_dataset(client).targets
        assert metrics["train/mse"] == pytest.approx(metrics["train/loss"], rel=1e-5)
        assert metrics["target/mean"] == pytest.approx(y.mean().item(), rel=1e-5)
        assert metrics["target/largest"] == pytest.approx(y.max().item())
        assert metrics["samples"] == SIZES[client]
    assert len(by_client) == 4
    for name in ("train/mse", "target/mean", "target/largest", "samples"):
        expected = sum(n * by_client[i][name] for i, n in enumerate(SIZES)) / sum(SIZES)
        assert found[name] == pytest.approx(expected, rel=1e-5)


def test_torchmetrics_start_anew_for_each_view_and_round(tmp_path):
    found = fit(tmp_path, WithMetrics(), max_rounds=3, clients_per_round=2)
    for view in ("", "_selected", "_all"):
        assert found[f"val/mse{view}"] == pytest.approx(found[f"val/loss{view}"], rel=1e-6)
    assert found["val/mse"] != found["val/mse_all"]


def test_what_validation_logs_at_its_end_is_logged(tmp_path):
    class Model(Regression):
        def on_validation_epoch_start(self):
            self.seen = []

        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.seen.append(len(batch[0]))

        def on_validation_epoch_end(self):
            self.log("val/samples", float(sum(self.seen)))

    assert fit(tmp_path, Model())["val/samples"] == 10


def test_only_the_first_pass_of_a_step_logs(tmp_path):
    from fedlight.perturbations import SAM

    assert fit(tmp_path, Logs(), perturbation=SAM(0.1))["sum"] == sum(SIZES)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": 1.0}, "use self.log_dict"),
        ((1.0, 2.0), r"self.log\('x', ...\) takes one number, found a tuple"),
        (torch.zeros(2), r"takes one number, found a tensor of shape \[2\]"),
    ],
)
def test_values_that_are_no_numbers_are_refused(value, message):
    with pytest.raises(ValueError, match=message):
        LogCollector().log("x", value)


@pytest.mark.parametrize("name", ["round", "two\nlines", ""])
def test_names_that_the_table_of_rounds_cannot_have_are_refused(name):
    with pytest.raises(MisconfigurationException, match=r"self.log\(.*, ...\): a name is a line, and not `round`"):
        LogCollector().log(name, 1.0)


def test_a_callback_does_not_number_the_rows(tmp_path):
    class Numbers(Callback):
        def on_round_metrics(self, trainer, module):
            return {"round": 7, "mine": 1}

    with pytest.raises(MisconfigurationException, match=r"on_round_metrics gives .*`round`, which numbers the row"):
        quiet_trainer(tmp_path, max_rounds=2, callbacks=[Numbers()]).fit(Regression(), Clients())


@pytest.mark.parametrize("engine", ["eager", "vmap"])
def test_a_client_has_no_value_of_what_only_those_beside_it_log(engine, tmp_path):
    class LogsPairs(Regression):
        def training_step(self, batch, batch_idx):
            if len(batch[0]) > 1:
                self.log("pairs", batch[0].max(), reduce_fx="max")
                self.log("mean", batch[0].mean())
            return super().training_step(batch, batch_idx)

    class Sees(Callback):
        def on_round_trained(self, trainer, module):
            seen.update({report.client: report.values.keys() for report in trainer.client_reports})

    seen = {}
    settings = {"engine": engine, "max_rounds": 1, "clients_per_round": 2, "callbacks": [Sees()]}
    quiet_trainer(tmp_path, **settings).fit(LogsPairs(), Clients((1, 6)))
    assert {client: "pairs" in names or "mean" in names for client, names in seen.items()} == {0: False, 1: True}


def test_reductions_that_cannot_be_merged_are_refused():
    with pytest.raises(MisconfigurationException, match=r"self.log\('x', reduce_fx=.*median.*use one of"):
        LogCollector().log("x", 1.0, reduce_fx=torch.median)


@pytest.mark.parametrize("owner", ["module", "callback"])
def test_what_is_logged_when_training_starts_is_in_the_first_row(tmp_path, owner):
    class Model(Regression):
        def on_train_start(self):
            self.log("at_start", 7.0)

    class Logger(Callback):
        def on_train_start(self, trainer, pl_module):
            pl_module.log("at_start", 7.0)

    trainer = quiet_trainer(tmp_path, callbacks=[Logger()] if owner == "callback" else [])
    trainer.fit(Model() if owner == "module" else Regression(), Clients())
    rows = csv.DictReader((trainer.run_dir / "metrics.csv").read_text().splitlines())
    assert [row["at_start"] for row in rows] == ["7", "", ""]


def test_logging_outside_of_training_says_so(tmp_path):
    class Model(Regression):
        def on_round_end(self):
            self.log("late", 1.0)

    with pytest.raises(MisconfigurationException, match="self.log: this hook .* Log in on_train_start"):
        fit(tmp_path, Model())


def test_logging_is_given_back(tmp_path):
    model = WithMetrics()
    synced = [m.sync_on_compute for m in (model.mse, model.val_mse)]
    fit(tmp_path, model)
    assert "log" not in vars(model)
    assert [m.sync_on_compute for m in (model.mse, model.val_mse)] == synced == [True, True]
    assert model.mse.update_count == 0


def test_alone_metrics_do_not_wait_for_other_processes():
    model = WithMetrics()
    with collecting_logs(model, LogCollector()):
        assert not model.mse._to_sync
        model.mse(torch.ones(2), torch.zeros(2))
        assert not model.mse._to_sync  # torchmetrics sets it anew in forward
    with collecting_logs(model, LogCollector(alone=False)):
        assert model.mse._to_sync
    assert model.mse._to_sync


def test_merging_records_in_order_gives_the_same_bits():
    """Values that float64 sums differently in another order."""
    values = (torch.rand(50, generator=generator(0, "values"), dtype=torch.float64) * 1e8).tolist()
    alone = LogCollector()
    for value in values:
        alone.log("x", value, batch_size=3)
    parts = [LogCollector(), LogCollector()]
    records = []
    for i, value in enumerate(values):
        parts[i % 2].log("x", value, batch_size=3)
        records.append((i, parts[i % 2].take()))
    total = LogCollector()
    for _, taken in sorted(records, key=lambda r: r[0]):
        for name, entry in taken.items():
            total.merge(name, *entry)
    assert torch.equal(total.compute()["x"], alone.compute()["x"])


def test_the_row_of_a_round_has_no_value_of_a_client_that_did_not_train(tmp_path):
    found = fit(tmp_path, Logs(), sampler=RoundRobin(), clients_per_round=1, max_rounds=2)
    assert found["sum"] == SIZES[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_have_the_bits_of_tensors(dtype):
    tensors, numbers = LogCollector(), LogCollector()
    numbers.numbers = True
    values = torch.randn(60, generator=torch.Generator().manual_seed(0), dtype=dtype) * 1e3
    for log in (tensors, numbers):
        for i, value in enumerate(values):
            log.log("loss", value, batch_size=i % 7 + 1)
            log.log("largest", value, reduce_fx="max")
            if i == 30:  # what a compiled step gives
                log.merge("loss", values[0] * 3, torch.tensor(3.0))
        log.log("diverged", torch.tensor(3e38), batch_size=10)
        log.log("undefined", torch.tensor(float("nan")), batch_size=10)
    found, expected = numbers.sums(), tensors.sums()
    for name, (total, weight) in expected.items():
        assert found[name][0].dtype == total.dtype
        assert found[name][1] == weight
        assert torch.equal(found[name][0].nan_to_num(7.0), total.nan_to_num(7.0))
    assert found["diverged"][0].isinf()
    assert found["undefined"][0].isnan()
