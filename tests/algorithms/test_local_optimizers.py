"""FedAdamW and FedMuon beside their twins: what is sent, what is refused, and the optimizer that FedMuon needs."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from fedlight.algorithms import FedAdamW, FedAvg, FedMuon
from fedlight.algorithms.fedmuon import Muon, orthogonal
from fedlight.engines.optimizers import OptimizerState
from fedlight.local import LocalObjective
from fedlight.module.parameters import FlatParameters
from tests.algorithms.networks import Network, Points
from tests.helpers.tiny import Clients, Regression, quiet_trainer, weights

LINEAR = nn.Linear(3, 1, bias=False)


class Trained(Regression):
    def __init__(self, optimizer, net=None):
        super().__init__(net=net)
        self.optimizer = optimizer

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


class Drifting(FedAvg):
    """Without anything of the optimizer's state."""

    def objective(self, received, client, weight):
        return LocalObjective(received["params"], drift=torch.ones_like(received["params"]))


@pytest.mark.parametrize(
    ("algorithm", "optimizer", "settings", "message"),
    [
        (
            FedMuon(),
            torch.optim.SGD,
            {},
            "FedMuon has clients step with Muon, .* SGD. Set model.optimizer to fedlight.alg",
        ),
        (
            FedAdamW(),
            torch.optim.Adam,
            {},
            "FedAdamW .* AdamW, and .* gives Adam. Set model.optimizer to torch.optim.adamw",
        ),
        (
            FedMuon(),
            Muon,
            {"engine": "vmap"},
            "trainer.engine=vmap: the algorithm has momentum_buffer of the optimizer's",
        ),
        (
            Drifting(),
            torch.optim.SGD,
            {"engine": "vmap"},
            "the algorithm has clients drift .* Use trainer.engine=eager",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, algorithm, optimizer, settings, message):
    trainer = quiet_trainer(tmp_path, algorithm=algorithm, **settings)
    with pytest.raises(MisconfigurationException, match=message):
        trainer.fit(Trained(optimizer), Clients())
    assert trainer.current_round == 0


def test_what_is_sent(tmp_path):
    """43 parameters in four tensors, in float64; a client counts its steps in float32."""
    for algorithm, optimizer, down, up in (
        (FedAdamW(), torch.optim.AdamW, 8 * (43 + 43 + 4 + 1), 8 * (43 + 4) + 4),
        (FedMuon(), Muon, 8 * 3 * 43, 8 * 2 * 43),
    ):
        trainer = quiet_trainer(tmp_path, algorithm=algorithm, max_rounds=1)
        trainer.fit(Network(optimizer), Points())
        assert trainer.callback_metrics["comm/down_mb"] * 1e6 == pytest.approx(2 * down)
        assert trainer.callback_metrics["comm/up_mb"] * 1e6 == pytest.approx(2 * up)


def test_a_drift_by_hand():
    """Without a gradient: w − lr·drift, with the first group's rate; a step that overflows is none."""
    module = LINEAR.double()
    flat = FlatParameters(module)
    flat.params.fill_(1.0)
    optimizer = torch.optim.SGD([{"params": [module.weight]}], lr=0.1)
    drift = torch.tensor([2.0, 0.0, -1.0], dtype=torch.float64)
    state = OptimizerState(module, flat, ())
    state.begin(optimizer, LocalObjective(flat.params, drift=drift))
    optimizer.step()
    assert module.weight.tolist() == [[pytest.approx(0.8), 1.0, pytest.approx(1.1)]]
    state._move(SimpleNamespace(param_groups=optimizer.param_groups, found_inf=torch.tensor(1.0)), drift)
    assert module.weight.tolist() == [[pytest.approx(0.8), 1.0, pytest.approx(1.1)]]
    flat.release()


def test_torchs_muon_does_where_all_parameters_are_matrices(tmp_path):
    model = Trained(partial(torch.optim.Muon, lr=0.05), nn.Linear(3, 1, bias=False))
    trainer = quiet_trainer(tmp_path, algorithm=FedMuon())
    before = weights(model)
    trainer.fit(model, Clients())
    assert trainer.federation.state.algorithm["momentum_buffer"].any()
    assert not torch.equal(weights(model), before)


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5)])
def test_singular_values_are_near_one(shape):
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(2))))
    assert (values / max(1, shape[0] / shape[1]) ** 0.5).sub(1).abs().max() < 0.35


def test_muon_steps_with_a_closure_and_kernels():
    conv = nn.Conv2d(2, 3, 3)
    optimizer, before = Muon(conv.parameters(), lr=0.1, weight_decay=0.0), conv.weight.clone()
    loss = optimizer.step(lambda: conv(torch.ones(1, 2, 4, 4)).sum().backward() or 7)
    assert loss == 7
    moved = (before - conv.weight).detach().flatten(1) / 0.1
    torch.testing.assert_close(moved, orthogonal(conv.weight.grad.flatten(1)), rtol=1e-4, atol=1e-5)
    assert set(optimizer.state[conv.bias]) == {"step", "exp_avg", "exp_avg_sq"}
    assert not orthogonal(torch.zeros(2, 3)).any()


def test_muon_takes_groups_of_parameters():
    """Each group steps as an optimizer of its own would."""
    nets = [nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    (a, b), (c, d) = nets
    groups = [{"params": a.parameters(), "adamw_lr": 0.2}, {"params": b.parameters(), "lr": 0.3, "weight_decay": 0.5}]
    one = Muon(groups, lr=0.1, adamw_lr=0.02)
    others = Muon(c.parameters(), lr=0.1, adamw_lr=0.2), Muon(d.parameters(), lr=0.3, weight_decay=0.5, adamw_lr=0.02)
    for _ in range(2):
        for net, optimizers in zip(nets, ([one], others), strict=True):
            net.zero_grad()
            net(torch.ones(5, 3)).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
    assert torch.equal(weights(nets[0]), weights(nets[1]))
    assert [group["lr"] for group in one.param_groups] == [0.1, 0.3, 0.2, 0.02]
