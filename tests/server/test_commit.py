"""A client's state advances only if the server used its message."""

import math
import random
from itertools import pairwise

import pytest
import torch

from fedlight.algorithms import SCAFFOLD, FedDC, FedDyn, FedGloSS
from fedlight.server.sums import LIMIT
from fedlight.transforms import TopK
from tests.helpers.tiny import Clients, Regression, quiet_trainer

KEPT = {
    SCAFFOLD: ("control", "control", "control_change", 1),
    FedDyn: ("h", "h_mean", "params", 1),
    FedDC: ("gradient", "gradient", "gradient_change", 1),
    FedGloSS: ("dual", "dual", "params", -1 / 10),
}
"""What of a client's state has the server's as its mean, and by which message it moves, with which factor."""


def failing(base, seed, bad):
    """The algorithm, a third of whose messages arrive damaged; and the clients of these, by round."""
    draw, left_out = random.Random(seed), []

    class Failing(base):
        def client_update(self, received, client, result):
            state, message = super().client_update(received, client, result)
            if draw.random() < 1 / 3:
                left_out.append(result.client)
                message = {**message, "params": torch.full_like(message["params"], bad)}
            return state, message

    return Failing(), left_out


@pytest.mark.filterwarnings("ignore:round .*left out clients")
@pytest.mark.parametrize("transforms", [[], [TopK(0.5)]], ids=["plain", "top_k"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 2 * LIMIT])
@pytest.mark.parametrize("base", KEPT)
def test_the_servers_mean_is_that_of_the_clients_under_random_failures(tmp_path, base, bad, transforms):
    algorithm, left_out = failing(base, 3, bad)
    settings = {"max_rounds": 12, "clients_per_round": 4, "engine": "eager", "transforms": transforms}
    trainer = quiet_trainer(tmp_path, algorithm=algorithm, **settings)
    trainer.fit(Regression(), Clients(sizes=(8,) * 6))
    assert 5 < len(left_out) < 40
    federation = trainer._session.federation
    own, servers, moved_by, factor = KEPT[base]
    rows = [federation.store.get(i, "algorithm") for i in range(6)]
    zero = torch.zeros(4)
    mean = torch.stack([zero if row is None else row[own] for row in rows]).double().mean(0)
    server = federation.state.algorithm[servers].double()
    assert float(server.abs().max()) > 1e-3
    if transforms:  # what a client has left out so far is still on its way
        kept = [federation.store.get(i, "transforms") for i in range(6)]
        waiting = torch.stack([zero if k is None else k[f"{moved_by}/0/error"] for k in kept]).double().mean(0)
        assert float(waiting.abs().max()) > 1e-4
        mean = mean - factor * waiting
    torch.testing.assert_close(mean, server, rtol=1e-5, atol=1e-6)
    assert trainer.callback_metrics["clients/trained"] + trainer.callback_metrics["clients/left_out"] == 4


@pytest.mark.filterwarnings("ignore:round .*left out clients")
def test_what_a_transform_keeps_stays_where_the_message_was_not_used(tmp_path):
    algorithm, left_out = failing(FedDyn, 3, math.nan)
    errors = []

    class Watched(type(algorithm)):
        def aggregate(self, server, total):
            store = trainer._session.federation.store
            errors.append({i: store.get(i, "transforms") for i in range(6)})
            return super().aggregate(server, total)

    settings = {"max_rounds": 8, "clients_per_round": 6, "engine": "eager", "transforms": [TopK(0.25)]}
    trainer = quiet_trainer(tmp_path, algorithm=Watched(), **settings)
    trainer.fit(Regression(), Clients(sizes=(8,) * 6))
    seen = 0
    for before, after in pairwise(errors):
        for i in range(6):
            if before[i] is not None and torch.equal(before[i]["params/0/error"], after[i]["params/0/error"]):
                seen += 1
    assert 0 < seen <= len(left_out)
