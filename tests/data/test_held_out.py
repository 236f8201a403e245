"""Clients that never train: training is as if they were not there, and the model is evaluated on their data."""

import csv
import json

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.nn import functional as F

from fedlight.algorithms import SCAFFOLD
from fedlight.callbacks import ClientMetrics
from fedlight.data import DatasetPartition, DirichletClients, Federated
from fedlight.data.federated import HeldOut, draw_clients, given_data, training_data
from fedlight.run.loggers import read_metrics
from fedlight.seeding import generator
from tests.helpers.tiny import Clients, Regression, quiet_trainer, two_classes, weights

SIZES = (5, 12, 8, 3, 9, 7)
NEW = sorted(torch.randperm(6, generator=generator(3, "held_out_clients"))[:2].tolist())
OLD = [client for client in range(6) if client not in NEW]


class Own(Clients):
    """Every client has validation data of its own."""

    def client_val_dataset(self, client):
        return self.client_dataset(client)


class Others(Own):
    """The clients that are not held out, and nobody else."""

    def __init__(self):
        super().__init__(SIZES)
        self.datasets, self.num_clients = [self.datasets[client] for client in OLD], len(OLD)


def fit(folder, data, ckpt_path=None, **settings):
    model = Regression()
    trainer = quiet_trainer(folder, algorithm=SCAFFOLD(), callbacks=[ClientMetrics()], **settings)
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return model, trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held_out")
    return folder, *fit(folder, Own(SIZES, seed=3, held_out_clients=2))


def test_training_is_as_if_they_were_not_there(run, tmp_path):
    """K, N, p_i, SCAFFOLD's 1/N and view ``all`` know nothing of them."""
    _, model, trainer = run
    other, alone = fit(tmp_path, Others())
    assert torch.equal(weights(model), weights(other))
    rows = [read_metrics(t.run_dir / "metrics.csv") for t in (trainer, alone)]
    for row, expected in zip(*rows, strict=True):
        assert {k: v for k, v in row.items() if "new_" not in k and "time" not in k} == {
            k: v for k, v in expected.items() if "time" not in k
        }


def test_the_model_is_evaluated_on_their_data(run):
    _, model, trainer = run
    data, figures = Own(SIZES), trainer.callback_metrics
    losses = torch.stack([F.mse_loss(model(d.inputs), d.targets) for d in map(data.client_dataset, NEW)]).detach()
    torch.testing.assert_close(figures["clients/new_loss_mean"], losses.mean())
    torch.testing.assert_close(figures["clients/new_loss_min"], losses.min())
    assert json.loads((trainer.run_dir / "held_out_clients.json").read_text()) == NEW
    assert trainer.facts["new clients"] == f"2 never train: {NEW[0]}, {NEW[1]}"
    rows = [r for r in csv.DictReader((trainer.run_dir / "clients.csv").read_text().splitlines()) if r["round"] == "2"]
    assert [(r["client"], r["samples"], r["steps"]) for r in rows[4:]] == [
        (str(4 + i), str(SIZES[c]), "0") for i, c in enumerate(NEW)
    ]
    assert [float(r["new_loss"]) for r in rows[4:]] == pytest.approx(losses.tolist(), rel=1e-5)
    assert all(not r["val/loss"] for r in rows[4:])


def test_a_resume_with_others_is_refused(run):
    folder, _, trainer = run
    with pytest.raises(MisconfigurationException, match="data.held_out_clients"):
        fit(folder, Own(SIZES, seed=3, held_out_clients=3), ckpt_path="last", max_rounds=4)
    assert given_data(trainer.datamodule) is trainer.datamodule.data


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (6, "leaves none of 6 clients"),
        (4, "must lie between 1 and data.num_clients=2"),
        (True, "must be a number of clients, or a fraction"),
        (-1, "must be a number of clients, or a fraction"),
        (2.5, "must be a number of clients, or a fraction"),
    ],
)
def test_bad_numbers_are_refused(tmp_path, wanted, message):
    with pytest.raises((ValueError, MisconfigurationException), match=message):
        fit(tmp_path, Own(SIZES, held_out_clients=wanted), clients_per_round=3)


@pytest.mark.parametrize("wanted", [2, 2.0, 0.5, np.float32(0.5)])
def test_numbers_and_fractions_are_told_by_their_value(wanted):
    trained, new = draw_clients(two_classes(held_out_clients=wanted))
    assert (len(trained), len(new)) == (2, 2)


def test_pooled_and_partitioned_data_are_without_them():
    data = two_classes(40, partitioner=DirichletClients(0.5), held_out_clients=0.25)
    central, held = training_data(data, centralized=True), HeldOut(data)
    for each in (central, held):
        each.setup()
    (new,) = held.new_clients
    own = data.client_dataset(new)
    rows = {tuple(x.tolist()) for x, _ in (central.client_dataset(0)[i] for i in range(40 - len(own)))}
    assert held.num_clients == 3
    assert not rows & {tuple(own[i][0].tolist()) for i in range(len(own))}
    assert held.partition_counts().shape == (3, 2)
    assert held.partition_counts().sum() == len(central.client_dataset(0)) == 40 - len(own)
    assert torch.equal(held.client_dataset(3).indices, own.indices)
    assert held.partitioner is data.partitioner
    assert all(kind.__init__.__code__.co_varnames.count("held_out_clients") for kind in (DatasetPartition, Federated))
