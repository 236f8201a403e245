"""Personal parts against plain torch, with every kind of method beside them, in every engine, and what is refused."""

import copy

import pytest
import torch
from torch import nn

from fedlight.personal import PersonalParts
from fedlight.server.sampling import Sampler
from tests.helpers.tiny import SIZES, Clients, Regression, quiet_trainer

ROUNDS = ((0, 2, 3), (1, 2), (0, 1))


class Listed(Sampler):
    """The clients of the test's rounds."""

    def sample(self, round, rng):
        return list(ROUNDS[round])


class Decayed(Regression):
    """A body and a head, trained with momentum and weight decay, which move what has no gradient."""

    def __init__(self, net=None, dtype=torch.float32):
        super().__init__(0.1, (net or nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))).to(dtype))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9, weight_decay=0.1)


def trained(root, personal=None, model=None, data=None, ckpt_path=None, **settings):
    """A trainer that has trained, and its module."""
    model = Decayed() if model is None else model
    defaults = {"max_rounds": 3, "local_epochs": 2, "sampler": Listed(), "accelerator": "cpu", "logger": False}
    trainer = quiet_trainer(root, **{**defaults, "personal": personal, **settings})
    trainer.fit(model, data or Clients(), ckpt_path=ckpt_path)
    return trainer, model


def rows(trainer):
    """The server's vectors and every client's rows."""
    federation, found = trainer.federation, {}
    found |= {f"server/{k}": v for k, v in federation.state.algorithm.items()}
    found |= {f"views/{k}": v for k, v in federation.state.views.items()}
    for client in federation.store.clients():
        for part in ("algorithm", "perturbation", "personal", "buffers", "latest", "transforms"):
            state = federation.store.get(client, part) or {}
            found |= {f"{client}/{part}/{k}": v for k, v in state.items()}
    return found


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


# What the papers do, with a copy of the module for each client and optimizers of what is trained.


def local(module, names, data, epochs):
    """Local epochs of full batches on the parameters of these names, as plain torch has them."""
    chosen = [p for n, p in module.named_parameters() if n.startswith(names)]
    for parameter in module.parameters():
        parameter.requires_grad_(any(parameter is p for p in chosen))
    optimizer, (x, y) = torch.optim.SGD(chosen, 0.1, momentum=0.9, weight_decay=0.1), data
    for _ in range(epochs):
        optimizer.zero_grad()
        (module(x) - y).square().mean().backward()
        nn.utils.clip_grad_norm_(chosen, 0.5)
        optimizer.step()


def twin(phases, personal):
    """The mean of all parts after the last round, shared and personal, and every client's personal parts."""
    data = Clients(dtype=torch.float64)
    server, clients = Decayed(dtype=torch.float64), {}
    for selected in ROUNDS:
        models = {}
        for i in selected:
            models[i] = copy.deepcopy(server)
            own = clients.get(i, dict(Decayed(dtype=torch.float64).named_parameters()))
            models[i].load_state_dict({n: own[n] for n in own if n.startswith(personal)}, strict=False)
            for names, epochs in phases:
                local(models[i], names, data.datasets[i].batch(torch.arange(SIZES[i])), epochs)
            clients[i] = {n: p.detach() for n, p in models[i].named_parameters() if n.startswith(personal)}
        total = sum(SIZES[i] for i in selected)
        mean = {
            n: sum(SIZES[i] * models[i].get_parameter(n).detach() for i in selected) / total
            for n, _ in server.named_parameters()
        }
        server.load_state_dict(mean)
    return mean, clients


HEAD, BODY, ALL = ("net.2",), ("net.0",), ("net",)
TWINS = {
    "FedPer": (PersonalParts("head"), [(ALL, 2)], HEAD),
    "FedRep": (PersonalParts("head", "alternating", epochs=3), [(HEAD, 3), (BODY, 2)], HEAD),
    "LG-FedAvg": (PersonalParts("body"), [(ALL, 2)], BODY),
    "FedBABU": (PersonalParts("head", "frozen"), [(BODY, 2)], HEAD),
}


@pytest.mark.parametrize("name", TWINS)
def test_methods_are_those_of_plain_torch(name, tmp_path):
    personal, phases, names = TWINS[name]
    data, settings = Clients(batch_size=12, dtype=torch.float64), {"precision": "64-true", "gradient_clip_val": 0.5}
    trainer, model = trained(tmp_path, personal, Decayed(dtype=torch.float64), data, **settings)
    mean, clients = twin(phases, names)
    for n, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), mean[n], rtol=0, atol=1e-10)
    for client, parts in clients.items():
        expected = torch.cat([p.reshape(-1) for p in parts.values()])
        kept = trainer.federation.store.get(client, "personal")
        found = trainer.federation.clients.initial if name == "FedBABU" else kept["params"]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
