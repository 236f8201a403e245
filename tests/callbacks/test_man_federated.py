"""MAN in FederatedTrainer: in every local step and in both passes of SAM, reported by round, away from evaluation."""

import csv

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F

from fedlight.algorithms.feddyn import FedDyn
from fedlight.callbacks import MAN
from fedlight.engines.cuda_graph.engine import CudaGraph
from fedlight.engines.vmap import programs
from fedlight.perturbations.sam import SAM
from tests.callbacks.nets import is_untouched
from tests.engines.tape import Tape
from tests.helpers.tiny import Clients, Regression, quiet_trainer, weights

ZETA, LR, RHO = 0.8, 0.1, 0.3


def model(cls=Regression):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    return cls(lr=LR, net=net)


def data():
    return Clients(sizes=(4,), dtype=torch.float64)  # one client, one batch of all its data


def gradient(module, batch, zeta=ZETA):
    x, y = batch
    a = torch.tanh(module.net[0](x))
    loss = F.mse_loss(module.net[2](a)[:, 0], y) + zeta / 2 * (a**2).sum() / a.numel()
    return torch.autograd.grad(loss, list(module.parameters()))


def move(module, directions, factor):
    with torch.no_grad():
        for p, d in zip(module.parameters(), directions, strict=True):
            p.add_(factor * d)


def batch_of(clients):
    dataset = clients.client_dataset(0)
    return [torch.stack(part) for part in zip(*[dataset[i] for i in range(len(dataset))], strict=True)]


def fit(tmp_path, module, *callbacks, **settings):
    settings = {"max_rounds": 1, "clients_per_round": 1, "local_epochs": 3, "precision": "64-true"} | settings
    trainer = quiet_trainer(tmp_path, callbacks=list(callbacks), **({"engine": "eager"} | settings))
    trainer.fit(module, data())
    return trainer


@pytest.mark.parametrize("rho", [None, RHO])
def test_local_steps_follow_the_formula(tmp_path, rho):
    expected, batch = model(), batch_of(data())
    for _ in range(3):
        g = gradient(expected, batch)
        if rho is not None:
            length = torch.cat([part.flatten() for part in g]).norm()
            move(expected, g, rho / length)
            at_w, g = g, gradient(expected, batch)
            move(expected, at_w, -rho / length)
        move(expected, g, -LR)
    module = model()
    fit(tmp_path, module, MAN(ZETA), perturbation=None if rho is None else SAM(rho))
    torch.testing.assert_close(weights(module), weights(expected), rtol=1e-10, atol=1e-12)
    without = model()
    fit(tmp_path, without, perturbation=None if rho is None else SAM(rho))
    assert (weights(without) - weights(module)).abs().max() > 1e-3
    assert is_untouched(module)


def test_task_loss_penalty_and_norms_are_reported_apart(tmp_path):
    x, y = batch_of(data())
    module = model()
    with torch.no_grad():
        norm = torch.tanh(module.net[0](x)).square().mean().item()
        task = F.mse_loss(module(x), y).item()
    trainer = fit(tmp_path, module, MAN(ZETA), local_epochs=1)
    with (trainer.run_dir / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["train/loss"]) == pytest.approx(task, rel=1e-6)
    assert float(row["man/net.1"]) == pytest.approx(norm, rel=1e-6)
    assert float(row["train/penalty"]) == pytest.approx(ZETA / 2 * norm, rel=1e-6)


class CallsTrainingStep(Regression):
    """Its validation borrows from its training."""

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.training_step(batch, batch_idx))


@pytest.mark.parametrize("cls", [Regression, CallsTrainingStep])
def test_evaluation_has_no_penalty(tmp_path, cls):
    module = model(cls)
    trainer = fit(tmp_path, module, MAN(ZETA))
    x, y = (torch.stack(part) for part in zip(*[data().val_dataset()[i] for i in range(10)], strict=True))
    with torch.no_grad():
        assert float(trainer.callback_metrics["val/loss"]) == pytest.approx(F.mse_loss(module(x), y).item(), rel=1e-6)


def test_it_combines_with_an_algorithm_over_rounds(tmp_path):
    module = model()
    trainer = fit(tmp_path, module, MAN(ZETA), algorithm=FedDyn(alpha=0.1), perturbation=SAM(RHO), max_rounds=3)
    assert torch.isfinite(weights(module)).all()
    assert trainer.callback_metrics["man/net.1"] > 0
    assert is_untouched(module)


def test_a_layer_that_a_hook_replaces_is_named(tmp_path):
    class Replaced(Regression):
        def on_round_start(self):
            if self.trainer.current_round == 1:
                self.net[1] = nn.GELU()

    with pytest.raises(MisconfigurationException, match=r"MAN: a hook has put another module in the place of net\.1,"):
        fit(tmp_path, model(Replaced), MAN(ZETA), max_rounds=3)


class Called(nn.Sequential):
    """The network of :func:`model` with a function for its activation."""

    def forward(self, x):
        return self[1](torch.tanh(self[0](x)))


def called(cls=Regression):
    return cls(lr=LR, net=Called(nn.Linear(3, 4), nn.Linear(4, 1)).double())


ENGINES = {"eager": lambda: "eager", "vmap": lambda: "vmap", "cuda_graph": lambda: CudaGraph(slots=2, recorder=Tape)}


@pytest.mark.parametrize("rho", [None, RHO])
@pytest.mark.parametrize("engine", [*ENGINES, "eager compiled", "vmap compiled"])
@pytest.mark.slow
def test_functions_train_as_modules_do_in_every_engine(tmp_path, engine, rho, monkeypatch):
    monkeypatch.setattr(programs, "BACKEND", lambda graph, inputs: graph.forward)  # no machine code
    settings = {"compile": "compiled" in engine, "engine": ENGINES[engine.split()[0]]()}
    found, reference = [], model()
    common = {"perturbation": None if rho is None else SAM(rho), "local_epochs": 60 if engine == "vmap" else 5}
    fit(tmp_path / "modules", reference, MAN(ZETA), **common)
    for name, zeta in (("functions", ZETA), ("without", 0)):
        module = called()
        trainer = fit(tmp_path / name, module, MAN(zeta), **common, **settings)
        assert "man/net.tanh" in trainer.callback_metrics
        assert is_untouched(module)
        found.append(weights(module))
    torch.testing.assert_close(found[0], weights(reference), rtol=1e-5, atol=1e-7)
    assert (found[1] - found[0]).abs().max() > 1e-3


def test_a_layer_in_a_graph_that_the_step_has_used_up_is_named(tmp_path):
    class Samples(Regression):
        def training_step(self, batch, batch_idx):  # as an energy model does, which moves its inputs
            x = batch[0].clone().requires_grad_()
            slope = torch.autograd.grad(self.net(x).sum(), x)[0]
            return super().training_step((x.detach() - slope, batch[1]), batch_idx)

    fit(tmp_path / "without", model(Samples))
    with pytest.raises(MisconfigurationException, match="MAN measures layers of a graph .* retain_graph=True"):
        fit(tmp_path, model(Samples), MAN(ZETA))


class FixedPoint(torch.nn.Module):
    """Its gradient is that of the fixed point, for which a hook differentiates one more step."""

    def __init__(self, within):
        super().__init__()
        self.inner, self.within = torch.nn.Linear(3, 3), within

    def forward(self, x):
        z, one = torch.tanh(self.inner(x)), x.detach()

        def more():
            point = z.detach().requires_grad_()
            return point, torch.tanh(self.inner(point)) + one

        made = None if self.within else more()

        def hook(grad):
            with torch.enable_grad():
                point, out = made or more()
                return grad + torch.autograd.grad(out, point, grad, retain_graph=True)[0]

        if z.requires_grad:
            z.register_hook(hook)
        return z


def test_what_a_hook_differentiates_is_to_be_computed_in_it(tmp_path):
    def net(within):
        return Regression(net=torch.nn.Sequential(FixedPoint(within), torch.nn.Linear(3, 1)))

    with pytest.raises(MisconfigurationException, match=r"or a hook takes .* computed in it, under torch.enable"):
        fit(tmp_path / "before", net(False), MAN(ZETA))
    trainer = fit(tmp_path / "within", net(True), MAN(ZETA))
    assert [key for key in trainer.callback_metrics if key.startswith("man/")] == ["man/net.0.tanh"]
