"""Methods from outside the package that need more than a correction: of the learning rate, of the perturbation."""

import pytest
import torch
from torch import nn

from fedlight.algorithms import FedAvg
from fedlight.algorithms.base import mean_update
from fedlight.perturbations import Perturbation
from fedlight.perturbations.base import unit
from tests.helpers.tiny import Clients, Keep, Regression, quiet_trainer, weights


class FallingRate(Keep):
    """The learning rate falls linearly from η to last·η within the round."""

    def __init__(self, last=0.1):
        super().__init__()
        self.last = last

    def lr_factors(self, steps):
        return [1 - (1 - self.last) * s / max(1, steps - 1) for s in range(steps)]


def test_an_algorithm_sets_the_learning_rate_of_each_local_step(tmp_path):
    keep, model = FallingRate(), Regression(lr=0.1)
    trainer = quiet_trainer(tmp_path, algorithm=keep, max_rounds=1, clients_per_round=1, engine="eager")
    trainer.fit(model, Clients(sizes=(12,), batch_size=12))
    (one_step,) = keep.rounds[0]
    assert (one_step.num_steps, one_step.lr_sum) == (1, pytest.approx(0.1))
    keep, by_hand = FallingRate(), Regression(lr=0.1)
    settings = {"max_rounds": 1, "clients_per_round": 1, "local_steps": 3, "engine": "eager", "limit_train_batches": 1}
    data = Clients(sizes=(4,), batch_size=4)
    model = Regression(lr=0.1)
    quiet_trainer(tmp_path, algorithm=keep, **settings).fit(model, data)
    x, y = data.client_dataset(0).inputs, data.client_dataset(0).targets
    for lr in (0.1, 0.055, 0.01):
        loss = by_hand.training_step((x, y), 0)
        for p, g in zip(by_hand.parameters(), torch.autograd.grad(loss, by_hand.parameters()), strict=True):
            p.data -= lr * g
    torch.testing.assert_close(weights(model), weights(by_hand))
    assert keep.rounds[0][0].lr_sum == pytest.approx(0.165)


def test_batched_clients_follow_the_same_rates(tmp_path):
    found = []
    for engine in ("eager", "vmap"):
        model = Regression()
        settings = {"max_rounds": 2, "clients_per_round": 4, "local_epochs": 2}
        quiet_trainer(tmp_path, algorithm=FallingRate(0.3), engine=engine, **settings).fit(model, Clients())
        found.append(weights(model))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


class Momentum(FedAvg):
    """FedAvg that sends its last step along."""

    def init_server(self, params):
        return {"params": params, "step": torch.zeros_like(params)}

    def broadcast(self, server):
        return server

    def aggregate(self, server, total):
        return {"params": server["params"] + mean_update(total), "step": mean_update(total)}


class AlongTheStep(Perturbation):
    """The gradient is taken along g + kappa·(the server's last step), which the algorithm has broadcast."""

    def __init__(self, rho=0.1, kappa=0.5):
        self.rho, self.kappa = rho, kappa

    def begin(self, received, client, start):
        return {"step": received["step"]}

    def epsilon(self, params, gradient, state):
        return self.rho * unit(gradient + self.kappa * state["step"]), state


def test_a_perturbation_reads_what_the_algorithm_broadcast(tmp_path):
    data = Clients(sizes=(4,), batch_size=4)
    x, y = data.client_dataset(0).inputs, data.client_dataset(0).targets
    model, by_hand = Regression(lr=0.1), Regression(lr=0.1)
    settings = {"algorithm": Momentum(), "perturbation": AlongTheStep(), "engine": "eager"}
    trainer = quiet_trainer(tmp_path, max_rounds=3, clients_per_round=1, **settings)
    trainer.fit(model, data)

    def gradient(w):
        nn.utils.vector_to_parameters(w, by_hand.parameters())
        return nn.utils.parameters_to_vector(
            torch.autograd.grad(by_hand.training_step((x, y), 0), by_hand.parameters())
        )

    w, step = weights(by_hand), torch.zeros(4)
    for _ in range(3):
        direction = gradient(w) + 0.5 * step
        step = -0.1 * gradient(w + 0.1 * direction / direction.norm())
        w = w + step
    torch.testing.assert_close(weights(model), w)
    assert trainer.callback_metrics["comm/down_mb"] == pytest.approx(2 * 16e-6)
    assert trainer.callback_metrics["comm/up_mb"] == pytest.approx(16e-6)
