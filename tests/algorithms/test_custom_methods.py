"""Methods from outside the package that need more than a correction.

Of the learning rate, of the perturbation, of the optimizer's state, or all models at once.
"""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import Tensor, nn

from fedlight.algorithms import FedAvg
from fedlight.algorithms.base import mean_update
from fedlight.local import LocalObjective
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


class MeanMoments(FedAvg):
    """FedAdamW's core: clients begin with the mean of the second moments that they ended with, and 0 otherwise.

    ``step`` is the number of steps before, so that the bias correction is that of the moments.
    """

    optimizer_state = ("exp_avg_sq", "step")

    def init_server(self, params):
        return {"params": params, "exp_avg_sq": torch.zeros_like(params), "step": params.new_zeros(())}

    def broadcast(self, server):
        return server

    def objective(self, received, client, weight):
        return LocalObjective(received["params"], optimizer={k: received[k] for k in self.optimizer_state})

    def client_update(self, received, client, result):
        return client, {"params": result.params, **result.optimizer}

    def contribution(self, message, sender):
        weight = self.mean_weight(sender.num_samples)
        return {k: weight * message[k].double() for k in self.optimizer_state}

    def aggregate(self, server, total):
        moments = {k: total[k] / total["weight"] for k in self.optimizer_state}
        return {**super().aggregate(server, total), **moments}


class Adam(Regression):
    """With weight decay, and another learning rate for the bias."""

    def configure_optimizers(self):
        groups = [{"params": [self.net.weight]}, {"params": [self.net.bias], "lr": 0.02}]
        return torch.optim.AdamW(groups, lr=0.1, weight_decay=0.1)


def test_second_moments_are_sent_averaged_and_begun_with(tmp_path):
    """Against AdamW in plain torch, whose state is written by hand."""
    sizes = (4, 8, 12)
    data, model, twin = Clients(sizes=sizes, dtype=torch.float64), Adam().double(), Adam().double()
    settings = {"max_rounds": 3, "clients_per_round": 3, "precision": "64-true", "limit_train_batches": 1}
    settings |= {"engine": "eager", "local_epochs": 2}
    trainer = quiet_trainer(tmp_path, algorithm=MeanMoments(), **settings)
    twin.train()
    orders = {}

    class Look(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            orders.setdefault((trainer.current_round, trainer.now[0]), []).append(batch)

    trainer.callbacks.append(Look())
    trainer.fit(model, data)
    start, v, steps = weights(twin), torch.zeros(4, dtype=torch.float64), 0
    for round in range(3):
        ends, moments = [], []
        for client in range(3):
            nn.utils.vector_to_parameters(start.clone(), twin.parameters())
            optimizer, offset = twin.configure_optimizers(), 0
            for p in twin.parameters():
                part = v[offset : offset + p.numel()].view_as(p).clone()
                offset += p.numel()
                optimizer.state[p] = {
                    "step": torch.tensor(float(steps)), "exp_avg": torch.zeros_like(p), "exp_avg_sq": part,
                }  # fmt: skip
            for batch in orders[round, client]:
                optimizer.zero_grad()
                twin.training_step(batch, 0).backward()
                optimizer.step()
            ends.append(weights(twin))
            moments.append(torch.cat([optimizer.state[p]["exp_avg_sq"].flatten() for p in twin.parameters()]))
        share = torch.tensor(sizes, dtype=torch.float64)[:, None] / sum(sizes)
        start, v, steps = (share * torch.stack(ends)).sum(0), (share * torch.stack(moments)).sum(0), steps + 2
    torch.testing.assert_close(weights(model), start, rtol=1e-12, atol=1e-14)
    state = trainer._session.federation.state.algorithm
    torch.testing.assert_close(state["exp_avg_sq"], v, rtol=1e-12, atol=1e-14)
    assert float(state["step"]) == 6
    assert trainer.callback_metrics["comm/up_mb"] * 1e6 == pytest.approx(3 * (2 * 4 * 8 + 4))
    assert trainer.callback_metrics["comm/down_mb"] * 1e6 == pytest.approx(3 * (2 * 4 * 8 + 8))


class Kept(MeanMoments):
    """SGD's momentum goes on at each client, and is not sent."""

    optimizer_state = ("momentum_buffer",)

    def init_server(self, params):
        return {"params": params}

    def init_client(self, params):
        return {"momentum_buffer": torch.zeros_like(params)}

    def objective(self, received, client, weight):
        return LocalObjective(received["params"], optimizer=client)

    def client_update(self, received, client, result):
        return result.optimizer, {"params": result.params}

    contribution, aggregate = FedAvg.contribution, FedAvg.aggregate


class WithMomentum(Regression):
    momentum = 0.9

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=self.momentum, weight_decay=0.1)


def test_momentum_that_a_client_keeps_makes_rounds_one_training(tmp_path):
    """One client with all data, and one step a round: plain SGD with momentum."""
    data, model, plain = Clients(sizes=(4,)), WithMomentum(), WithMomentum()
    settings = {"algorithm": Kept(), "max_rounds": 5, "clients_per_round": 1, "engine": "eager"}
    quiet_trainer(tmp_path, **settings).fit(model, data)
    optimizer, (x, y) = plain.configure_optimizers(), data.client_dataset(0).batch(torch.arange(4))
    for _ in range(5):
        optimizer.zero_grad()
        plain.training_step((x, y), 0).backward()
        optimizer.step()
    torch.testing.assert_close(weights(model), weights(plain))


class Rprop(Regression):
    def configure_optimizers(self):
        return torch.optim.Rprop(self.parameters())


class NoMomentum(WithMomentum):
    momentum = 0


class Silent(Kept):
    optimizer_state = ()


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (Adam, {}, r"AdamW .* keeps \['exp_avg', 'exp_avg_sq', 'step'\], and not momentum_buffer"),
        (NoMomentum, {}, "SGD .* keeps none, and not momentum_buffer. Use another optimizer"),
        (Rprop, {}, "Rprop .* keeps step_size, which does not begin with zeros"),
        (WithMomentum, {"engine": "vmap"}, "trainer.engine=vmap: the algorithm has momentum_buffer of the optimizer's"),
        (WithMomentum, {"algorithm": Silent()}, r"Silent.optimizer_state must name \['momentum_buffer'\]"),
    ],
)
def test_optimizers_and_engines_without_that_state_are_refused_before_training(tmp_path, model, settings, message):
    trainer = quiet_trainer(tmp_path, **{"algorithm": Kept(), "engine": "eager", **settings})
    with pytest.raises(MisconfigurationException, match=message):
        trainer.fit(model(), Clients())
    assert trainer.current_round == 0


class Median(FedAvg):
    """The coordinate-wise median of the clients' models (Yin et al. 2018)."""

    collects = True

    def aggregate(self, server, total):
        return {"params": total["models"].double().quantile(0.5, dim=0)}


class TrimmedMean(FedAvg):
    """The coordinate-wise mean without the ``trim`` smallest and largest entries (Yin et al. 2018)."""

    collects = True

    def __init__(self, trim=1):
        super().__init__()
        self.trim, self.min_clients = trim, 2 * trim + 1

    def aggregate(self, server, total):
        return {"params": total["models"].double().sort(0).values[self.trim : -self.trim].mean(0)}


SENT = []


def lying(base):
    """The algorithm, at whose client 3 a model is sent that is far off."""

    class Lying(base):
        def client_update(self, received, client, result):
            SENT.append(result.params.tolist())
            if result.client == 3:
                SENT[-1] = [1e6, -1e6, 1e6, -1e6]
            return client, {"params": result.params.new_tensor(SENT[-1])}

    return Lying()


@pytest.mark.parametrize(("base", "clients"), [(Median, 3), (Median, 4), (TrimmedMean, 4)])
def test_an_aggregator_that_needs_all_models_is_robust(tmp_path, base, clients):
    SENT.clear()
    model = Regression()
    settings = {"max_rounds": 4, "clients_per_round": clients, "views": ["server"]}
    quiet_trainer(tmp_path, algorithm=lying(base), **settings).fit(model, Clients())
    entries = [sorted(column) for column in zip(*SENT[-clients:], strict=True)]
    wanted = [column[1] if clients == 3 else (column[1] + column[2]) / 2 for column in entries]
    torch.testing.assert_close(weights(model), torch.tensor(wanted))
    assert weights(model).abs().max() < 10
    assert sum(abs(sent[0]) == 1e6 for sent in SENT) > 1


def test_an_aggregator_with_fewer_clients_than_it_needs_is_refused(tmp_path):
    few = quiet_trainer(tmp_path, algorithm=TrimmedMean(2), clients_per_round=4)
    message = r"TrimmedMean needs 5 clients in a round, and trainer\.clients_per_round gives 4"
    with pytest.raises(MisconfigurationException, match=message):
        few.fit(Regression(), Clients())
    assert few.current_round == 0
    quiet_trainer(tmp_path, algorithm=TrimmedMean(1), fast_dev_run=True).fit(Regression(), Clients())
    data = Clients()
    data.datasets[1] = data.dataset(torch.full((4, 3), 1e25), torch.zeros(4))
    late = quiet_trainer(tmp_path, algorithm=TrimmedMean(1), clients_per_round=3, max_rounds=9)
    with (
        pytest.warns(UserWarning, match=r"left out clients \[1\]"),
        pytest.raises(
            MisconfigurationException, match=r"needs 3 clients in a round, and round \d has 2 that can be used"
        ),
    ):
        late.fit(Regression(), data)


def odd(method, made, key="params"):
    """FedAvg, of which one method gives something else in the place of ``params``, or beside it."""

    def replaced(self, *args):
        found = getattr(FedAvg, method)(self, *args)
        state = found[1] if isinstance(found, tuple) else found
        state[key] = made(state["params"])
        return found

    return type("Odd", (FedAvg,), {method: replaced})()


@pytest.mark.parametrize("method", ["init_server", "broadcast", "client_update", "aggregate"])
def test_what_is_no_tensor_of_the_models_shape_is_refused_by_name(tmp_path, method):
    cases = [(Tensor.numpy, "ndarray as 'params'"), (lambda w: w[None], r"\{'params': \[1, 4\]\}; it must be")]
    cases += [(lambda w: w[:3], r"\{'params': \[3\]\}"), (lambda w: float(w[0]), "float as 'params'")]
    for made, what in cases:
        with pytest.raises(MisconfigurationException, match=f"algorithm: Odd.{method} gives {what}"):
            quiet_trainer(tmp_path, max_rounds=1, algorithm=odd(method, made)).fit(Regression(), Clients())


def test_what_the_server_keeps_is_there_from_the_beginning(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"Odd.aggregate gives \['late'\], which no checkpoint"):
        quiet_trainer(tmp_path, algorithm=odd("aggregate", torch.clone, "late")).fit(Regression(), Clients())
