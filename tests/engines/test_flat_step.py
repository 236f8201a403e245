"""One optimizer step on the flat vector, and gradients that modules put in place of its views."""

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn, optim

from fedlight.algorithms.fedavg import FedAvg
from fedlight.algorithms.fedprox import FedProx
from fedlight.engines.optimizers import FlatStep
from fedlight.local import LocalObjective
from fedlight.module.parameters import FlatParameters
from tests.helpers.tiny import Clients, Regression, quiet_trainer, weights

MAKERS = {
    "sgd": lambda p: optim.SGD(p, lr=0.1, weight_decay=0.03),
    "nesterov": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: optim.AdamW(p, lr=0.01),
    "adamax": lambda p: optim.Adamax(p, lr=0.01),
    "nadam": lambda p: optim.NAdam(p, lr=0.01),
    "radam": lambda p: optim.RAdam(p, lr=0.01),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "rprop": lambda p: optim.Rprop(p, lr=0.01),
    "adadelta": lambda p: optim.Adadelta(p, lr=0.1),
}


def make_net():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(7, 13), nn.Linear(13, 5), nn.Linear(5, 3, bias=False), nn.Conv2d(3, 5, 3))
    net[1].bias.requires_grad_(False)
    return net


def two_groups(net):
    first, *_, last = net
    return [{"params": [*net[1].parameters(), *first.parameters()]}, {"params": last.parameters(), "lr": 0.003}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MAKERS)
def test_flat_steps_have_the_bits_of_torchs(name, dtype):
    expected, found = make_net().to(dtype), make_net().to(dtype)
    flats = [FlatParameters(net) for net in (expected, found)]
    optimizers = [MAKERS[name](two_groups(net)) for net in (expected, found)]
    step = FlatStep(optimizers[1], flats[1])
    for i in range(6):
        gradient = torch.randn_like(flats[0].params)
        for flat in flats:
            flat.grad.copy_(gradient)
        optimizers[0].step()
        step()
        if i == 2:
            assert len(optimizers[1].state) == (0 if name == "sgd" else 2)  # the first two layers, and the last one
        if i == 3:
            step.release()  # and go on as torch does
    assert torch.equal(flats[0].params, flats[1].params)
    states = [o.state_dict()["state"] for o in optimizers]
    assert states[0].keys() == states[1].keys()
    for one, other in zip(states[0].values(), states[1].values(), strict=True):
        assert all(torch.equal(torch.as_tensor(one[k]), torch.as_tensor(other[k])) for k in one if one[k] is not None)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: optim.Adagrad(p, lr=0.1),
        lambda p: optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
        lambda p: type("Mine", (optim.SGD,), {})(p, lr=0.1, momentum=0.9),
    ],
    ids=["another", "fused", "own"],
)
def test_other_optimizers_are_stepped_as_they_are(make):
    net = make_net()
    flat = FlatParameters(net)
    optimizer = make(net.parameters())
    flat.grad.fill_(1.0)
    FlatStep(optimizer, flat)()
    assert {id(p) for p in optimizer.state} >= {id(p) for p in net.parameters() if p.requires_grad}


def test_hooks_on_a_step_are_called_whenever_they_come():
    net, calls = make_net(), []
    optimizer = optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    step = FlatStep(optimizer, FlatParameters(net))
    step()
    optimizer.register_step_post_hook(lambda stepped, *_: calls.append(len(stepped.state)))
    step()
    assert calls == [6]  # one for each parameter that is trained


class Drifts(FedAvg):
    """w ← w − lr·1 after each step."""

    def objective(self, received, client, weight):
        return LocalObjective(received["params"], drift=torch.ones_like(received["params"]))


def test_clients_drift_beside_an_optimizer_without_state(tmp_path):
    model = Regression(lr=0.0)
    quiet_trainer(tmp_path, algorithm=Drifts(), max_rounds=1, local_steps=2).fit(model, Clients())
    assert torch.equal(weights(model), weights(Regression()))
    found, plain = Regression(lr=0.125), Regression(lr=0.125)
    quiet_trainer(tmp_path, algorithm=Drifts(), max_rounds=1, local_steps=1).fit(found, Clients())
    quiet_trainer(tmp_path, max_rounds=1, local_steps=1).fit(plain, Clients())
    torch.testing.assert_close(weights(found), weights(plain) - 0.125)


SEEN = []


class Moments(Regression):
    """Looks at the optimizer's state as one does in Lightning."""

    def configure_optimizers(self):
        return optim.Adam(self.parameters(), lr=0.1)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        optimizer = self.optimizers()
        (weight, _), state = optimizer.param_groups[0]["params"], optimizer.state_dict()["state"]
        SEEN.append((state[0]["exp_avg"].shape == weight.shape, float(state[0]["step"]) == batch_idx + 1))


def test_a_module_finds_the_state_of_its_optimizer(tmp_path):
    model, plain = Moments(), Regression()
    plain.configure_optimizers = lambda: optim.Adam(plain.parameters(), lr=0.1)
    for module in (model, plain):
        quiet_trainer(tmp_path, max_rounds=1, clients_per_round=4).fit(module, Clients())
    assert torch.equal(weights(model), weights(plain))
    assert SEEN == [(True, True)] * 8


class OneAfterTheOther(Regression):
    """The first step trains one parameter, the second one another, no step the third; the fourth gets no loss."""

    def __init__(self):
        super().__init__()
        self.net, self.abc = None, nn.ParameterList([nn.Parameter(torch.ones(())) for _ in "abc"])

    def training_step(self, batch, batch_idx):
        return [self.abc[0] * 1.0, self.abc[1] * 1.0, None][batch_idx]

    def configure_optimizers(self):
        return optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)

    validation_step = LightningModule.validation_step


def test_what_gets_no_gradient_is_moved_by_neither_decay_nor_momentum(tmp_path):
    model = OneAfterTheOther()
    quiet_trainer(tmp_path, max_rounds=1, clients_per_round=1).fit(model, Clients((12,)))
    torch.testing.assert_close([p.item() for p in model.abc], [0.89, 0.89, 1.0])  # 1 - 0.1·(1 + 0.1)
    pulled = OneAfterTheOther()
    quiet_trainer(tmp_path, algorithm=FedProx(mu=0.5), max_rounds=1, clients_per_round=1).fit(pulled, Clients((12,)))
    assert all(p < 0.9999 for p in pulled.abc)  # the proximal term is a gradient, if one of 0


class ClearsItself(Regression):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.zero_grad()


class ClearsFirst(Regression):
    def training_step(self, batch, batch_idx):
        self.zero_grad()
        return super().training_step(batch, batch_idx)


class ClearsByTheOptimizer(Regression):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.optimizers().zero_grad()


@pytest.mark.parametrize("model", [ClearsItself, ClearsFirst, ClearsByTheOptimizer])
def test_gradients_that_a_module_clears_are_corrected_all_the_same(tmp_path, model):
    found, expected = model(), Regression()
    for module in (found, expected):
        quiet_trainer(tmp_path, algorithm=FedProx(mu=0.5), gradient_clip_val=0.5).fit(module, Clients())
    assert torch.equal(weights(found), weights(expected))


class Halves(Callback):
    def __init__(self, anew):
        self.anew = anew

    def on_after_backward(self, trainer, pl_module):
        for p in pl_module.parameters():
            if self.anew:
                p.grad = p.grad / 2
            else:
                p.grad.div_(2)


def test_gradients_that_a_hook_puts_in_place_of_others_are_what_counts(tmp_path):
    found = []
    for anew in (True, False):
        module = Regression()
        quiet_trainer(tmp_path, algorithm=FedProx(mu=0.5), callbacks=[Halves(anew)]).fit(module, Clients())
        found.append(weights(module))
    assert torch.equal(*found)
    plain = Regression()
    quiet_trainer(tmp_path, algorithm=FedProx(mu=0.5)).fit(plain, Clients())
    assert not torch.equal(found[0], weights(plain))
