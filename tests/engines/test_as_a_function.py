"""A step that is another one as a function of tensors is refused by name, and `auto` trains it as it is written."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn, optim

from fedlight.engines.vmap import programs
from tests.engines import cases


class Net(cases.Net):
    """Some parameters are kept beside the layers, for a step to know them again."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.kept = {id(self.fc1.weight), id(self.fc2.weight)}

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.more(batch)


class Knows(Net):
    def more(self, batch):
        return sum(p.square().sum() for p in self.parameters() if id(p) in self.kept)


class LooksAtGradients(Net):
    def more(self, batch):
        return self.fc1.weight.square().sum() * (self.fc1.weight.grad is None)


class Catches(Net):
    def more(self, batch):
        try:
            return self.fc1.weight.square().sum() * float(batch[0].sum() < 1e9)
        except RuntimeError:
            return 0.0


class Wakes(Net):
    """One parameter has no part in batches of one."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.late = nn.Parameter(torch.ones(()))

    def more(self, batch):
        return self.late.square() if len(batch[1]) > 1 else 0.0


class SmallAlone(Net):
    """Parameters are looked for in the smallest batches only."""

    def more(self, batch):
        return Knows.more(self, batch) if len(batch[1]) == 1 else 0.0


class Seeds(Net):
    def more(self, batch):
        torch.manual_seed(3)
        return 0.0


class LogsSome(Net):
    def more(self, batch):
        if len(batch[1]) > 1:
            self.log("train/loss", 1.0)
        return 0.0


class Counts(Net):
    """A buffer notes what a step finds."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.register_buffer("found", torch.zeros(()))

    def more(self, batch):
        self.found.add_(sum(id(p) in self.kept for p in self.parameters()))
        return 0.0


REASONS = {
    Knows: "another gradient on 4 samples",
    LooksAtGradients: "another gradient",
    Catches: "another gradient",
    SmallAlone: "another gradient on 1 samples",
    Seeds: "draws from torch, which it seeds",
    LogsSome: "train/loss of its own in some steps only",
    Counts: "other buffers",
}


@pytest.mark.parametrize("engine", ["vmap", "eager with trainer.compile=true"])
@pytest.mark.parametrize("net", REASONS, ids=lambda net: net.__name__)
def test_another_step_is_refused_by_name(net, engine, tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "BACKEND", lambda graph, inputs: graph.forward)
    monkeypatch.setattr(cases, "Net", net)
    with pytest.raises(MisconfigurationException, match=f"trainer.engine={engine}: .*training_step .*{REASONS[net]}"):
        cases.train(tmp_path, engine.split()[0], compile="compile" in engine)


STEPPED = {"plain": {}, "momentum": {"momentum": 0.9}}


@pytest.mark.parametrize("settings", STEPPED.values(), ids=STEPPED)
def test_a_parameter_that_has_a_gradient_in_some_steps_only(settings, tmp_path, monkeypatch):
    """Momentum moves it in other steps as well, unless it is left out there."""
    monkeypatch.setattr(cases, "Net", Wakes)

    def train(engine):
        return cases.train(tmp_path, engine, net={"optimizer": lambda params: optim.SGD(params, lr=0.1, **settings)})

    if settings:
        with pytest.raises(MisconfigurationException, match="vmap: parameter late has a gradient in some steps only"):
            train("vmap")
    else:
        torch.testing.assert_close(train("eager")[0], train("vmap")[0])


class Hooks(cases.Net):
    """A hook on a layer from the second round on, or another optimizer."""

    def on_round_start(self):
        if self.trainer.current_round == 1:
            self.fc1.register_forward_hook(lambda layer, args, out: 2 * out)


def test_a_hook_that_is_put_on_a_layer_later_is_called(tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "Net", Hooks)
    monkeypatch.setattr(programs, "TRACE_AFTER", 1)
    torch.testing.assert_close(cases.train(tmp_path, "eager")[0], cases.train(tmp_path, "vmap")[0])


class Changes(cases.Net):
    def configure_optimizers(self):
        return (optim.Adam if self.trainer.current_round else optim.SGD)(self.parameters(), lr=0.1)


def test_an_optimizer_of_another_class_in_a_later_round_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "Net", Changes)
    cases.train(tmp_path, "eager")
    with pytest.raises(
        MisconfigurationException, match="engine=vmap: configure_optimizers makes Adam where it made SGD"
    ):
        cases.train(tmp_path, "vmap")


class Attends(cases.Net):
    """Attention draws its dropout's masks in another order where it is a function."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.layer = nn.TransformerEncoderLayer(6, 2, 6, dropout=0.3, batch_first=True)

    def forward(self, x):
        return super().forward(self.layer(x[:, 0])[:, None])


def test_what_draws_in_another_order_is_no_other_step(tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "Net", Attends)
    cases.train(tmp_path, "vmap", max_rounds=1)
