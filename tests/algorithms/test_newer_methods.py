"""The methods since 2022: what they equal, figures by hand, and what the trainer does for them."""

import pytest
import torch

from fedlight import algorithms
from fedlight.algorithms import (
    FedACG,
    FedCM,
    FedExP,
    FedInit,
    FedMoSWA,
    FedNSAM,
    FedSpeed,
    FedSWA,
    FedTOGA,
    FedVARP,
    FedWMSAM,
)
from fedlight.transforms import ClipUpdate
from tests.algorithms.driver import Driver
from tests.algorithms.test_identities import assert_same
from tests.algorithms.twins import Problem
from tests.helpers.tiny import Clients, Regression, quiet_trainer, weights

PLAIN = FedCM(alpha=1.0)
"""FedAvg with a plain mean."""


@pytest.mark.parametrize("name", ["FedACG", "FedNSAM", "FedInit", "FedSWA", "FedExP"])
def test_each_is_fedavg_with_a_plain_mean_where_its_setting_is_off(name):
    off = {
        "FedACG": FedACG(0, 0),
        "FedNSAM": FedNSAM(0, 0),
        "FedInit": FedInit(0),
        "FedSWA": FedSWA(1, 1),
        "FedExP": FedExP(1e12),
    }
    assert_same(Driver(off[name]).run(), Driver(PLAIN).run())


def test_fedvarp_is_fedavg_with_a_plain_mean_where_nobody_is_absent():
    problem = Problem(rounds=((0, 1, 2),) * 3)
    assert_same(Driver(FedVARP(), problem).run(), Driver(PLAIN, problem).run())
    assert_same(Driver(FedVARP()).run()[0], Driver(PLAIN).run()[0])  # nothing is remembered in the first round
    assert abs(Driver(FedVARP()).run()[1] - Driver(PLAIN).run()[1]).max() > 1e-2


def test_fedmoswa_at_a_constant_rate_is_scaffold_where_m_follows_at_once():
    """With gamma 1 and everyone there both c and m are the mean of the clients' newest variates."""
    problem = Problem(rounds=((0, 1, 2),) * 3)
    scaffold = algorithms.SCAFFOLD(0.7, weighting="equal")
    assert_same(Driver(FedMoSWA(1, 1, 0.7), problem).run(), Driver(scaffold, problem).run())


def test_fedtoga_that_does_not_lean_is_fedspeed():
    assert_same(Driver(FedTOGA(0.1, 0.3, 0, 0)).run(), Driver(FedSpeed(0.1, 0.3)).run())


def test_fedexp_by_hand():
    """Δ = (3, 0) and (−1, 0): the mean is 1 long, and η_g = (9 + 1)/(2·2·(1 + 0.25)) = 2."""
    algorithm, start = FedExP(0.25), torch.tensor([1.0, 1.0], dtype=torch.float64)
    updates = torch.tensor([[3.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    squares = [algorithm.contribution({"update": update}, None)["square"] for update in updates]
    two = torch.tensor(2.0, dtype=torch.float64)
    total = {"update": updates.sum(0), "weight": two, "clients": two, "square": sum(squares)}
    server = algorithm.aggregate(algorithm.init_server(start), total)
    assert server["params"].tolist() == [3.0, 1.0]
    views = algorithm.evaluated(server, {"params": start}, total)
    assert (views["server"].tolist(), views["selected"].tolist()) == ([2.0, 1.0], [2.0, 1.0])


def test_fedswa_rates_by_hand():
    assert FedSWA(0.2).lr_factors(4) == pytest.approx([1, 0.8, 0.6, 0.4])
    assert FedMoSWA(0.0).lr_factors(2) == [1, 0.5]


def test_fedwmsam_begins_as_fedcm():
    problem = Problem(rounds=((0, 1, 2),), lrs=(0.1,))
    assert_same(Driver(FedWMSAM(0, 0.3), problem).run(), Driver(FedCM(0.3), problem).run())


@pytest.mark.parametrize(("momentum", "aim"), [([0.0, 0.0], 0.1), ([-1.0, 0.0], 0.5), ([2.0, 0.0], 0.9)])
def test_fedwmsam_trusts_the_momentum_less_where_clients_turn_against_it(momentum, aim):
    """Updates along (1, 0) and (0, 1): the mean cosine to the momentum, a gradient, is 0, −½ or ½."""
    algorithm, zero = FedWMSAM(alpha=0.3, speed=0.5), torch.zeros(2, dtype=torch.float64)
    algorithm.num_clients = 2
    server = {**algorithm.init_server(zero), "momentum": torch.tensor(momentum, dtype=torch.float64)}
    two = torch.tensor(2.0, dtype=torch.float64)
    total = {"update": zero, "weight": two, "clients": two, "gradient": zero, "direction": zero + 1}
    assert float(algorithm.aggregate(server, total)["alpha"]) == pytest.approx(0.5 * 0.3 + 0.5 * aim)


def test_an_unknown_direction_is_refused():
    with pytest.raises(ValueError, match=r"algorithm\.along must be 'gradient' or 'momentum', found 'both'"):
        FedNSAM(along="both")


@pytest.mark.parametrize("client_state", ["cpu", "disk"])
def test_the_server_remembers_what_it_received(tmp_path, client_state):
    """With clipped updates, and nobody absent, FedVARP is the plain mean of what was received."""
    found, common = [], {"max_rounds": 3, "clients_per_round": 4, "client_state": client_state}
    for algorithm in (FedVARP(), FedInit(0)):
        model = Regression(lr=0.1)
        trainer = quiet_trainer(tmp_path, algorithm=algorithm, transforms=[ClipUpdate(0.05)], **common)
        trainer.fit(model, Clients())
        found.append(weights(model))
    torch.testing.assert_close(*found)
    assert trainer.callback_metrics["comm/up_mb"] == pytest.approx(4 * 16e-6)
