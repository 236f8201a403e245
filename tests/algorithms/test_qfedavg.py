"""QFedAvg beyond its twin: where the clients' loss comes from."""

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.nn import functional as F

from fedlight.algorithms import FedAvg, QFedAvg
from fedlight.callbacks import MAN
from tests.helpers.tiny import Clients, Regression, quiet_trainer, weights


class Sent(QFedAvg):
    """Keeps what clients send."""

    def __init__(self):
        super().__init__(1.0)
        self.losses = []

    def client_update(self, received, client, result):
        self.losses.append((result.client, received["params"].clone(), result.loss))
        return super().client_update(received, client, result)


class Noisy(Regression):
    """Drops inputs, and logs nothing."""

    def __init__(self):
        super().__init__(net=nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 1)))


def fit(folder, algorithm, model=None, **settings):
    model = model or Regression()
    given = {"clients_per_round": 3, "enable_plots": False, "enable_checkpointing": False, **settings}
    quiet_trainer(folder, algorithm=algorithm, **given).fit(model, Clients())
    return weights(model)


def test_without_q_it_is_fedavg(tmp_path):
    torch.testing.assert_close(fit(tmp_path, QFedAvg(0)), fit(tmp_path, FedAvg()), rtol=1e-6, atol=1e-7)
    assert not torch.allclose(fit(tmp_path, QFedAvg(2.0)), fit(tmp_path, FedAvg()), rtol=1e-3)


class Skipping(Regression):
    """Has a loss of every second batch only."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx % 2 else loss


class Outputs(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append((batch_idx % 2, sorted(outputs)))


def test_a_batch_without_a_loss_is_skipped_and_is_not_given_that_of_the_one_before(tmp_path):
    outputs = Outputs()
    settings = {"algorithm": QFedAvg(), "clients_per_round": 2, "callbacks": [outputs], "max_rounds": 1}
    quiet_trainer(tmp_path, **settings).fit(Skipping(), Clients((12, 12), batch_size=4))
    assert {*map(str, outputs.seen)} == {"(0, ['loss'])", "(1, [])"}


@pytest.mark.parametrize("engine", ["eager", "vmap"])
def test_the_loss_is_that_of_the_broadcast_model_on_all_of_a_clients_data(tmp_path, engine):
    """Without penalty, dropout or a step, whatever the batches are."""
    algorithm, model, data = Sent(), Noisy(), Clients()
    callbacks = [MAN(0.1, layers=["net.0"])]
    fit(tmp_path, algorithm, model, callbacks=callbacks, engine=engine, max_rounds=2)
    seen, by_hand = algorithm.losses[-6:], Noisy().eval()
    for client, params, loss in seen:
        nn.utils.vector_to_parameters(params, by_hand.parameters())
        x, y = data.datasets[client].batch(torch.arange(len(data.datasets[client])))
        assert loss == pytest.approx(F.mse_loss(by_hand(x), y).item(), rel=1e-5)
    assert not torch.equal(seen[0][1], seen[-1][1])


def test_a_loss_below_zero_has_no_power(tmp_path):
    class Negative(Regression):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) - 100

    with pytest.raises(ValueError, match=r"QFedAvg takes F\^q, and the loss of client \d is -\d"):
        fit(tmp_path, QFedAvg(), Negative())


def test_a_step_may_take_gradients_of_its_own(tmp_path):
    class Gradient(Regression):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss + torch.autograd.grad(loss, self.net.bias, create_graph=True)[0].square().sum()

    algorithm, data = Sent(), Clients().datasets
    fit(tmp_path, algorithm, Gradient(), max_rounds=1)
    for client, _, loss in algorithm.losses[-3:]:
        batches = zip(*(part.split(4) for part in data[client].batch(torch.arange(len(data[client])))), strict=True)
        by_hand = [len(y) * Gradient().training_step((x, y), 0).item() for x, y in batches]
        assert loss == pytest.approx(sum(by_hand) / len(data[client]), rel=1e-5)
