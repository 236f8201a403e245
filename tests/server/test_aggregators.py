"""What takes the place of the mean of the updates, against numpy's and scipy's, or by hand."""

import itertools

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from scipy.stats import trim_mean
from torch import nn

from fedlight.algorithms import SCAFFOLD, FedAvg, FedDyn, FedExP, FedLESAM
from fedlight.perturbations import DualSAM
from fedlight.server.aggregators import Aggregator, GeometricMedian, Krum, Median, TrimmedMean, in_place_of_sums
from fedlight.server.sampling import Bernoulli
from fedlight.transforms import DifferentialPrivacy, SignFlip
from tests.helpers.tiny import Clients, Regression, quiet_trainer, seeded, weights


def combined(aggregator, updates, weights=None):
    updates = torch.as_tensor(updates, dtype=torch.float64)
    weights = torch.ones(len(updates)) if weights is None else torch.tensor(weights)
    return aggregator(updates, updates, weights.double()).numpy()


def krum(x, f, m):
    """Blanchard et al. 2017, section 4, with loops; the lowest m scores."""
    scores = []
    for i in range(len(x)):
        far = sorted(sum((a - b) ** 2 for a, b in zip(x[i], x[j], strict=True)) for j in range(len(x)) if j != i)
        scores.append(sum(far[: len(x) - f - 2]))
    chosen = sorted(range(len(x)), key=lambda i: (scores[i], i))[:m]
    return np.mean([x[i] for i in chosen], axis=0)


def weiszfeld(x, alphas, rounds, smoothing):
    """Pillutla et al. 2022, algorithm 2, with loops, from 0."""
    v = np.zeros(len(x[0]))
    for _ in range(rounds):
        betas = [a / max(smoothing, np.sqrt(((v - row) ** 2).sum())) for a, row in zip(alphas, x, strict=True)]
        v = sum(b * row for b, row in zip(betas, x, strict=True)) / sum(betas)
    return v


@pytest.mark.parametrize("clients", [7, 8])
def test_each_is_what_its_paper_says(clients):
    x = seeded(clients, 5, dtype=torch.float64).numpy() ** 3
    sizes = [float(n) for n in range(1, clients + 1)]
    for aggregator, expected in (
        (Median(), np.median(x, axis=0)),
        (TrimmedMean(0.3), trim_mean(x, 0.3, axis=0)),
        (GeometricMedian(3, 1e-6), weiszfeld(x, sizes, 3, 1e-6)),
        (GeometricMedian(4, 2.0), weiszfeld(x, sizes, 4, 2.0)),
        (Krum(2), krum(x, 2, 1)),
        (Krum(2, keep=3), krum(x, 2, 3)),
    ):
        np.testing.assert_allclose(combined(aggregator, x, sizes), expected, rtol=1e-12, err_msg=repr(aggregator))


def test_by_hand():
    x = [[0.0, 1.0], [1.0, 0.0], [2.0, 2.0], [3.0, 5.0], [1e9, -1e9]]
    assert combined(Median(), x).tolist() == [2.0, 1.0]
    assert combined(Median(), x[:4]).tolist() == [1.5, 1.5]
    assert combined(TrimmedMean(0.2), x).tolist() == [2.0, 1.0]  # of 1, 2, 3 and of 0, 1, 2
    assert combined(Krum(1), x).tolist() == [0.0, 1.0]  # its two nearest are 2 and 5 away, as those of (1, 0) are
    # Where three of five agree, so does the geometric median, however far the others are.
    far = [[3.0, -4.0], [3.0, -4.0], [3.0, -4.0], [1e9, 0.0], [0.0, 1e9]]
    np.testing.assert_allclose(combined(GeometricMedian(30), far), [3.0, -4.0], rtol=1e-6)


def test_the_geometric_median_of_a_triangle_sees_its_sides_alike():
    """Fermat's point: unit vectors to the three corners add up to 0."""
    corners = np.array([[0.0, 0.0], [4.0, 0.0], [1.0, 3.0]])
    towards = corners - combined(GeometricMedian(200), corners)
    assert np.abs((towards / np.linalg.norm(towards, axis=1, keepdims=True)).sum(0)).max() < 1e-9


@pytest.mark.parametrize("scale", [1.0, 1e9])
def test_krum_tells_small_differences_beside_a_large_common_part_or_attacker(scale):
    x = seeded(7, 40, dtype=torch.float64).numpy() / 100
    x[5:] = scale * 100
    np.testing.assert_array_equal(combined(Krum(2), x), krum(x, 2, 1))
    x = seeded(7, 40, dtype=torch.float64).numpy() / 100 + scale
    np.testing.assert_array_equal(combined(Krum(2), x), krum(x, 2, 1))


def test_many_columns_are_sorted_in_parts(monkeypatch):
    x = seeded(5, 11, dtype=torch.float64)
    monkeypatch.setattr("fedlight.server.aggregators._COLUMNS", 4)
    np.testing.assert_array_equal(combined(Median(), x), np.median(x.numpy(), axis=0))


def test_buffers_follow_the_clients_that_were_chosen_and_the_sums_are_replaced():
    sent = [{"update": torch.tensor([u]).double(), "buffers/x": torch.tensor([[b, b]]).double()} for u, b in
            ((1.0, 10.0), (2.0, 20.0), (2.5, 30.0), (4.0, 40.0), (9.0, 50.0))]  # fmt: skip
    found = in_place_of_sums(Krum(1), sent, [1.0, 2.0, 3.0, 4.0, 5.0])
    assert found["update"].tolist() == [30.0]
    assert found["buffers/x"].tolist() == [[300.0, 300.0]]
    del sent[1]["buffers/x"]  # it has not moved there
    assert in_place_of_sums(Median(), sent, [1.0] * 5)["buffers/x"].tolist() == [[150.0, 150.0]]


class Received(FedAvg):
    """FedAvg that keeps what clients send, and what their buffers have come to."""

    def __init__(self, server_lr=1.0):
        super().__init__(server_lr)
        self.updates, self.buffers, self.models = [], [], []

    def client_update(self, received, client, result):
        self.updates.append((result.params - received["params"]).double().numpy())
        self.buffers.append({k: v.double().numpy() for k, v in result.buffers.items()})
        return super().client_update(received, client, result)

    def aggregate(self, server, total):
        made = super().aggregate(server, total)
        self.models.append(made["params"].numpy().copy())
        return made


def test_a_round_of_the_whole_trainer_is_the_servers_step_along_it(tmp_path):
    """w + 0.5·median(Δ_i), and running statistics moved by the median of theirs; drift is about the mean."""
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    algorithm, model = Received(0.5), Regression(net=net)
    before = model.net[1].running_mean.double().numpy().copy()
    start = torch.cat([p.detach().flatten() for p in model.parameters()]).double().numpy()
    given = {"aggregator": Median(), "clients_per_round": 4, "max_rounds": 1, "precision": "64-true"}
    trainer = quiet_trainer(tmp_path, algorithm=algorithm, **given)
    trainer.fit(model, Clients((5, 6, 8, 3), batch_size=8, dtype=torch.float64))
    updates, buffers = algorithm.updates[-4:], algorithm.buffers[-4:]
    np.testing.assert_allclose(algorithm.models[0], start + 0.5 * np.median(updates, axis=0), rtol=0, atol=1e-12)
    moved = np.median([b["net.1.running_mean"] - before for b in buffers], axis=0)
    np.testing.assert_allclose(model.net[1].running_mean.numpy(), before + moved, rtol=0, atol=1e-12)
    mean = np.average(updates, axis=0, weights=[5, 6, 8, 3])
    square = np.average([(u**2).sum() for u in updates], weights=[5, 6, 8, 3])
    drift = float(trainer.callback_metrics["clients/drift"])
    assert drift == pytest.approx(np.sqrt(square - (mean**2).sum()), rel=1e-5)
    assert trainer.method_name == "Received+Median"


@pytest.mark.parametrize("aggregator", [Median(), TrimmedMean(0.3), Krum(0)])
def test_a_buffer_that_some_clients_have_no_number_of_is_made_of_those_that_have_one(tmp_path, aggregator):
    class Observes(Regression):
        def __init__(self):
            super().__init__()
            self.register_buffer("least", torch.full((2,), torch.inf))

        def on_train_epoch_end(self):
            size = len(self.trainer.train_dataloader.dataset)
            self.least[0] = {3: torch.inf, 5: 10.0, 6: 20.0, 8: 30.0}[size]
            self.least[1] = 1.0 if size == 3 else torch.inf  # one alone may be hostile

    model, data = Observes(), Clients((5, 6, 8, 3))
    quiet_trainer(tmp_path, aggregator=aggregator, clients_per_round=4, max_rounds=1).fit(model, data)
    assert model.least[0] in ((10, 20, 30) if isinstance(aggregator, Krum) else (20,))
    assert model.least[1] == (1 if isinstance(aggregator, Krum) else torch.inf)


class First(Aggregator):
    """Of one's own: the first client's update."""

    def __call__(self, values, updates, weights):
        return values[0]


def test_feddyn_takes_k_times_what_comes_of_it_for_the_sum(tmp_path):
    """By hand: h_mean = K/N·Δ_0, w = w_0 + Δ_0 + h_mean, for any aggregator."""
    algorithm, model = FedDyn(0.1), Regression()
    start, seen = weights(model).double(), []
    update = algorithm.client_update

    def kept(received, client, result):
        seen.append(result.params.double() - received["params"].double())
        return update(received, client, result)

    algorithm.client_update = kept
    given = {"aggregator": First(), "clients_per_round": 3, "max_rounds": 1, "views": ["server"]}
    quiet_trainer(tmp_path, algorithm=algorithm, **given).fit(model, Clients())
    torch.testing.assert_close(weights(model).double(), start + seen[-3] * (1 + 3 / 4), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reduce", [lambda v: v.mean(0, keepdim=True), lambda v: v.mean(), lambda v: v[0].tolist()])
def test_what_is_no_row_is_refused(reduce):
    class Odd(Aggregator):
        def __call__(self, values, updates, weights):
            return reduce(values)

    with pytest.raises(
        TypeError, match=r"trainer.aggregator: Odd makes of \[2, 3\] .*; it must be a tensor of one row"
    ):
        in_place_of_sums(Odd(), [{"update": torch.ones(3)}] * 2, [1.0, 1.0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrimmedMean(0.5), "2·trim·K below K"),
        (lambda: TrimmedMean(0), "trim=0 must be above 0"),
        (lambda: Krum(-1), "attackers must be at least 0"),
        (lambda: Krum(1.5), "attackers must be a whole number, got 1.5"),
        (lambda: GeometricMedian(2.5), "iterations must be a whole number"),
        (lambda: Krum(1, keep=0), "keep must be at least 1"),
        (lambda: GeometricMedian(0), "iterations must be at least 1"),
        (lambda: GeometricMedian(smoothing=0), "smoothing must be"),
    ],
)
def test_settings_that_make_no_sense(make, message):
    with pytest.raises((MisconfigurationException, ValueError), match=message):
        make()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"algorithm": SCAFFOLD()}, "Median takes the place of the mean of the updates, and SCAFFOLD makes more"),
        ({"algorithm": FedExP()}, "FedExP makes more"),
        ({"perturbation": DualSAM()}, "what clients send for DualSAM to a mean"),
        ({"transforms": [DifferentialPrivacy(1.0, 1.0)]}, "DifferentialPrivacy needs"),
        ({"aggregator": "median"}, "str is no Aggregator"),
        ({"aggregator": Krum(1), "clients_per_round": 4}, "Krum needs 5 clients in a round, and trainer.clients_per_"),
        ({"aggregator": Krum(0, keep=3), "clients_per_round": 4}, "Krum needs 5 clients in a round, and trainer.clie"),
        ({"aggregator": TrimmedMean(0.25), "clients_per_round": 3}, "TrimmedMean needs 4 clients in a round"),
        ({"sampler": Bernoulli(), "clients_per_round": 3}, r"needs 3 clients in a round, and trainer.sampler draws \d"),
        ({"transforms": [SignFlip(clients=[0, 1])]}, "Median tolerates 1 attackers among 4 clients, and 3 of 3 rounds"),
    ],
)
def test_what_it_cannot_stand_in_for_is_refused_before_training(tmp_path, settings, message):
    given = {"aggregator": Median(), "clients_per_round": 4, **settings}
    with pytest.raises(MisconfigurationException, match=message):
        quiet_trainer(tmp_path, **given).fit(Regression(), Clients())
    assert not list(tmp_path.glob("default/version_*"))


def test_a_perturbation_that_sends_nothing_goes_with_it(tmp_path):
    """LESAM keeps what a client received, and nothing of it crosses: the median of equal clients is their mean."""
    found = []
    for aggregator in (None, Median()):
        data, settings = Clients(batch_size=5), {"aggregator": aggregator, "clients_per_round": 4}
        trainer = quiet_trainer(tmp_path, algorithm=FedLESAM(), **settings)
        data.datasets = data.datasets[:1] * 4
        trainer.fit(model := Regression(), data)
        found.append(weights(model))
    torch.testing.assert_close(*found)


def test_a_round_that_loses_too_many_clients_ends_the_run(tmp_path):
    class Broken(Clients):
        def client_dataset(self, client):
            x = torch.full((4, 3), torch.inf if client == 2 and self.started else 1.0)
            return self.dataset(x, torch.ones(4))

    data = Broken((4, 4, 4))
    data.started = False
    model = Regression()
    model.on_train_start = lambda: setattr(data, "started", True)
    trainer = quiet_trainer(tmp_path, aggregator=Median(), clients_per_round=3)
    with (
        pytest.warns(UserWarning, match=r"left out clients \[2\]"),
        pytest.raises(MisconfigurationException, match="Median needs 3 clients in a round, and round 1 has 2"),
    ):
        trainer.fit(model, data)


def test_rounds_with_more_attackers_now_and_then_are_warned_of(tmp_path):
    trainer = quiet_trainer(tmp_path, aggregator=Median(), clients_per_round=3, transforms=[SignFlip(clients=[0, 1])])
    with pytest.warns(UserWarning, match=r"tolerates 1 attackers among 3 clients, and 1 of 3 rounds have more"):
        trainer.fit(Regression(), Clients())


def test_all_subsets_of_honest_clients_give_what_they_have_in_common():
    """With f of K = 2f + 3 clients anywhere, Krum and both medians stay among the honest ones, which agree."""
    honest = np.tile([1.0, -2.0], (7, 1))
    for attackers in itertools.combinations(range(7), 2):
        x = honest.copy()
        x[list(attackers)] = [[1e6, 3.0], [-1e6, 1e6]]
        for aggregator in (Median(), TrimmedMean(2 / 7), Krum(2), GeometricMedian(40)):
            np.testing.assert_allclose(combined(aggregator, x), [1.0, -2.0], rtol=1e-6)
