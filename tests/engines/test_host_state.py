"""A step that draws on the host or changes its module is not recorded; in eager the draws repeat, and are seeded."""

import random

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import Dataset

from fedlight.engines.cuda_graph.engine import CudaGraph
from fedlight.engines.vmap import programs
from tests.engines import cases
from tests.engines.tape import Tape
from tests.helpers.tiny import Clients, Regression, quiet_trainer, weights


class Draws(cases.Net):
    """A mixup weight, or its like, from somewhere else each time."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.numbers, self.nested = np.random.default_rng(1), {"a": [torch.zeros(())]}
        self.steps, self.weight = 0, torch.ones(())

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * self.share()


class Beta(Draws):
    def share(self):
        return float(np.random.beta(0.5, 0.5))


class Python(Draws):
    def share(self):
        return random.random()


class Own(Draws):
    def share(self):
        return float(self.numbers.random())


class Item(Draws):
    def share(self):
        return torch.rand(()).item()


class Counts(Draws):
    def share(self):
        self.steps += 1
        return self.steps


class CountsRarely(Draws):
    """Only the third step shows it."""

    seen = 0

    def share(self):
        type(self).seen += 1
        if self.seen % 3 == 0:
            self.steps += 1
        return 1 + self.steps


class Tensors(Draws):
    def share(self):
        self.weight = self.weight * 0.5
        return self.weight


class Nested(Draws):
    def share(self):
        self.nested["a"][0].data.add_(1)
        return 1


class Still(Draws):
    def share(self):
        return 1


class Multiplies(Still):
    """Floats and tensors take the value of an index without asking it."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * 0.9**batch_idx


class Looks(Still):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * torch.arange(1.0, 9.0)[batch_idx]


REASONS = {
    Multiplies: "reads batch_idx",
    Looks: "reads batch_idx",
    Beta: "draws from numpy.random",
    Python: "draws from random",
    Own: "changes self.numbers",
    Item: "takes it to Python",
    Counts: "changes self.steps",
    CountsRarely: "changes self.(seen|steps)",
    Tensors: "changes self.weight",
    Nested: "changes self.nested",
}
ENGINES = {
    "vmap": {"engine": "vmap"},
    "cuda_graph": {"engine": CudaGraph(slots=1, recorder=Tape)},
    "eager with trainer.compile=true": {"engine": "eager", "compile": True},
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("net", REASONS, ids=lambda net: net.__name__)
def test_what_a_step_draws_or_changes_on_the_host_is_named(net, engine, tmp_path, monkeypatch):
    if net is Item and engine == "cuda_graph":
        pytest.skip("the stand-in for CUDA graphs cannot tell that the host waits for a CPU")
    monkeypatch.setattr(programs, "BACKEND", lambda graph, inputs: graph.forward)
    monkeypatch.setattr(cases, "Net", net)
    monkeypatch.setattr(CountsRarely, "seen", 0)
    with pytest.raises(MisconfigurationException, match=f"(?s)trainer.engine={engine}: .*{REASONS[net]}"):
        cases.train(tmp_path, **ENGINES[engine])


def test_dropout_on_a_cpu_is_no_draw_of_the_host(tmp_path):
    cases.train(tmp_path, "vmap", net={"dropout": 0.5})


class Drawn(Dataset):
    """Samples with noise from every global generator."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        x, y = self.dataset.inputs[index], self.dataset.targets[index]
        return x + random.random() + np.random.rand() + torch.rand(()), y


def drawn():
    data = Clients()
    data.datasets = [Drawn(dataset) for dataset in data.datasets]
    return data


class Mixed(Regression):
    def training_step(self, batch, batch_idx):
        share = np.random.beta(0.5, 0.5) + random.random() + torch.rand(()).item()
        if self.trainer.now[0] is not None:  # not in the trial before training
            SHARES.setdefault((self.current_epoch, self.trainer.now[0]), []).append(share)
        return super().training_step(batch, batch_idx) * share


SHARES: dict = {}


def test_eager_draws_depend_on_seed_round_and_client_alone(tmp_path):
    found = []
    for settings in ({"clients_per_round": 4}, {"clients_per_round": 4}, {"clients_per_round": 3}):
        SHARES.clear()
        random.seed(len(found)), np.random.seed(len(found)), torch.manual_seed(len(found))
        model = Mixed()
        quiet_trainer(tmp_path, max_rounds=2, **settings).fit(model, drawn())
        found.append((dict(SHARES), weights(model)))
    (first, params), (again, same), (fewer, _) = found
    assert first == again
    assert torch.equal(params, same)
    assert all(first[key] == shares for key, shares in fewer.items())
    values = [share for shares in first.values() for share in shares]
    assert len({*values}) == len(values)
