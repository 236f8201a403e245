"""What each client reported: to callbacks, and in ``clients.csv``."""

import csv

import pytest
import torch
from lightning.pytorch import Callback
from torch.nn import functional as F

from fedlight.callbacks import ClientMetrics
from fedlight.callbacks.checkpoint import Checkpoint
from fedlight.run.loggers import read_metrics
from tests.helpers.tiny import SIZES, Clients, Regression, quiet_trainer
from tests.test_wandb import items, offline, records  # noqa: F401


class Own(Clients):
    """Every client has validation data of its own."""

    def client_val_dataset(self, client):
        return self.client_dataset(client)


class Logging(Regression):
    """Logs in training, too."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train/loss", loss)
        return loss


def table(trainer):
    return list(csv.DictReader((trainer.run_dir / "clients.csv").read_text().splitlines()))


def run(folder, rounds, model=None, data=None, ckpt_path=None, **settings):
    settings = {"callbacks": [ClientMetrics()], "max_rounds": rounds, "client_val_every_n_rounds": 2, **settings}
    trainer = quiet_trainer(folder, **settings)
    trainer.fit(model or Logging(), data or Own(), ckpt_path=ckpt_path)
    return trainer


def test_rows_by_hand_and_against_the_rounds_metrics(tmp_path):
    model, data = Logging(), Own()
    trainer = run(tmp_path, 2, model, data)
    rows, rounds = table(trainer), read_metrics(trainer.run_dir / "metrics.csv")
    first, second = ([row for row in rows if row["round"] == str(r)] for r in (0, 1))
    trained = [row["client"] for row in first]
    assert len(trained) == 2
    assert trained == sorted(trained)
    assert [row["client"] for row in second] == ["0", "1", "2", "3"]  # those that were evaluated, too
    for row in rows:
        size = SIZES[int(row["client"])]
        steps = -(-size // 4) if row["train/loss"] else 0
        wanted = {"samples": size, "steps": steps, "used": int(steps > 0), "up_bytes": 16 * (steps > 0)}
        assert {k: int(row[k]) for k in wanted} == wanted
    for number, part in enumerate((first, second)):
        part = [row for row in part if row["train/loss"]]
        total = sum(float(row["train/loss"]) * int(row["samples"]) for row in part)
        assert rounds[number]["train/loss"] == pytest.approx(total / sum(int(row["samples"]) for row in part))
        assert rounds[number]["comm/up_mb"] == pytest.approx(sum(int(row["up_bytes"]) for row in part) / 1e6)
    assert not any(row["val/loss"] for row in first)
    with torch.no_grad():
        for row in second:
            x, y = data.client_dataset(int(row["client"])).batch(torch.arange(SIZES[int(row["client"])]))
            assert float(row["val/loss"]) == pytest.approx(F.mse_loss(model(x), y).item(), rel=1e-5)
    losses = [float(row["val/loss"]) for row in second]
    assert rounds[1]["clients/loss_mean"] == pytest.approx(sum(losses) / 4)
    assert rounds[1]["clients/loss_min"] == pytest.approx(min(losses))


class Stop(Callback):
    def __init__(self, rounds):
        self.rounds = rounds

    def on_round_end(self, trainer, pl_module):
        if trainer.current_round == self.rounds:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stop", [2, 3, 4, 5])
def test_no_row_is_lost_or_twice_where_a_run_goes_on(tmp_path, stop):
    """The last checkpoint is up to two rounds behind, and columns appear in the second round."""
    whole = run(tmp_path / "whole", 5)
    callbacks = [Checkpoint(every_n_rounds=2, max_overhead=1), ClientMetrics(), Stop(stop)]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, 5, callbacks=callbacks)
    path = tmp_path / "default" / "version_0" / "clients.csv"
    with path.open("a") as file:
        file.write("4,1,12")
    if stop == 2:  # before the first checkpoint
        assert [line[0] for line in path.read_text().splitlines()] == list("r0011114")
        return
    resumed = run(tmp_path, 5, ckpt_path="last")
    assert resumed.run_dir == path.parent
    assert path.read_text() == (whole.run_dir / "clients.csv").read_text()


@pytest.mark.parametrize("damage", ["a row", "a cell", "the file"])
def test_rows_that_are_missing_or_damaged_are_said(tmp_path, damage):
    path = run(tmp_path, 3).run_dir / "clients.csv"
    lines = path.read_text().splitlines(True)
    lines[2] = {"a row": "", "a cell": lines[2].replace("16", "17"), "the file": ""}[damage]
    path.write_text("".join(lines)) if damage != "the file" else path.unlink()
    with pytest.warns(UserWarning, match=r"clients\.csv: rows of the first 3 rounds are missing or damaged"):
        trainer = run(tmp_path, 4, ckpt_path="last")
    assert [row["round"] for row in table(trainer)][-4:] == ["3"] * 4
    run(tmp_path, 5, ckpt_path="last")  # it is said once


def test_callbacks_see_what_each_client_reported(tmp_path):
    seen = []

    class Look(Callback):
        def on_round_metrics(self, trainer, pl_module):
            seen.append(list(trainer.client_reports))
            return {"clients/largest_loss": max(r.values["train/loss"] for r in trainer.client_reports if r.used)}

    before = quiet_trainer(tmp_path)
    assert (before.client_reports, before.client_val_metrics) == ((), {})
    data = Own()
    data.datasets[1] = data.dataset(torch.full((4, 3), 1e25), torch.zeros(4))
    settings = {"callbacks": [Look(), ClientMetrics()], "clients_per_round": 4}
    with pytest.warns(UserWarning, match=r"left out clients \[1\]"):
        trainer = run(tmp_path, 1, data=data, client_val_every_n_rounds=0, **settings)
    (reports,) = seen
    assert [(r.client, r.used, r.num_samples, r.num_steps) for r in reports] == [
        (0, True, 5, 2), (1, False, 4, 1), (2, True, 8, 2), (3, True, 3, 1),
    ]  # fmt: skip
    rows = table(trainer)
    assert [row["used"] for row in rows] == ["1", "0", "1", "1"]
    largest = max(float(row["train/loss"]) for row in rows if row["used"] == "1")
    assert trainer.callback_metrics["clients/largest_loss"] == pytest.approx(largest)


@pytest.mark.usefixtures("offline")
def test_wandb_has_the_table(tmp_path):
    trainer = run(tmp_path, 2, logger="wandb")
    (found,) = records(trainer.run_dir)
    rows = [items(record) for record in found["history"]]
    (entry,) = [row for row in rows if {"clients", "clients/_type"} & row.keys()]
    assert entry.get("clients/nrows", entry.get("clients", {}).get("nrows")) == 6
    assert list(trainer.run_dir.rglob("*.table.json"))
