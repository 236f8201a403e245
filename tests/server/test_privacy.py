"""Differential privacy of clients: bounds, noise, and what it costs."""

import math
import sys

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from scipy.stats import beta
from torch import nn

from fedlight.algorithms import SCAFFOLD, FedAvg, FedExP, FedVARP
from fedlight.perturbations import DualSAM
from fedlight.run.loggers import read_metrics
from fedlight.seeding import generator
from fedlight.server.privacy import Privacy, begin_privacy
from fedlight.server.sampling import Bernoulli, RoundRobin, Uniform
from fedlight.transforms import ClipUpdate, DifferentialPrivacy, Quantize, TopK
from tests.helpers.tiny import Clients, Regression, quiet_trainer, weights

dp = pytest.importorskip("dp_accounting", reason="needs dp-accounting: pip install 'fedlight[privacy]'")
RELATION = dp.NeighboringRelation


def poisson():
    return Bernoulli(redraw=False)


def set_up(sampler, clients_per_round=4, clients=40):
    sampler.setup(clients, clients_per_round, torch.ones(clients, dtype=torch.int64))
    return sampler


class Received(FedAvg):
    """FedAvg that keeps the updates as they were trained, with their clients, and what it aggregates of them."""

    def __init__(self):
        super().__init__()
        self.updates, self.totals = [], []

    def client_update(self, received, client, result):
        self.updates.append((result.client, result.params.double() - received["params"].double()))
        return super().client_update(received, client, result)

    def aggregate(self, server, total):
        self.totals.append({name: value.clone() for name, value in total.items()})
        return super().aggregate(server, total)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three rounds of two clients each, their results, and what was aggregated; some updates are longer than 0.2."""
    model, algorithm = Regression(), Received()
    transforms = [DifferentialPrivacy(0.2, noise_multiplier=1.5)]
    trainer = quiet_trainer(tmp_path_factory.mktemp("private"), algorithm=algorithm, transforms=transforms)
    trainer.fit(model, Clients())
    return trainer, algorithm, model, read_metrics(trainer.run_dir / "metrics.csv")


def test_the_sum_is_that_of_bounded_updates_and_one_noise(run):
    """By hand: Σ Δ_i·0.2/‖Δ_i‖ + 1.5·0.2·normal numbers of (seed, privacy, round); clients weigh equally."""
    _, algorithm, _, _ = run
    updates = [update for _, update in algorithm.updates[1:]]  # the first is what preflight tries
    norms = [float(update.norm()) for update in updates]
    assert len(norms) == 6
    assert min(norms) > 0.2
    for round, total in enumerate(algorithm.totals):
        noise = 0.3 * torch.randn(4, generator=generator(0, "privacy", round), dtype=torch.float64)
        pair = slice(2 * round, 2 * round + 2)
        bounded = [0.2 / norm * update for norm, update in zip(norms[pair], updates[pair], strict=True)]
        torch.testing.assert_close(total["update"], sum(bounded) + noise, rtol=0, atol=1e-12)
        assert float(total["weight"]) == float(total["clients"]) == 2.0


def test_a_short_update_is_left_as_it_is():
    privacy = Privacy(None, DifferentialPrivacy(5.0, 1.0), set_up(poisson()), 9, 0)
    short, none = torch.tensor([3.0, -4.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for update in (short, none):
        before = update.clone()
        privacy.bound(update, [])
        assert torch.equal(update, before)


def test_rows_have_epsilon_and_no_drift_and_one_line_says_what_is_not_private(run):
    trainer, _, _, rows = run
    event = dp.SampledWithoutReplacementDpEvent(4, 2, dp.GaussianDpEvent(0.75))  # replacing one moves the sum by 2·clip
    for rounds, row in enumerate(rows, 1):
        direct = dp.rdp.RdpAccountant(neighboring_relation=RELATION.REPLACE_ONE).compose(event, rounds)
        assert row["privacy/epsilon"] == pytest.approx(direct.get_epsilon(4**-1.1), abs=1e-6)
        assert "clients/drift" not in row
    said = trainer.facts["privacy"]
    assert said.startswith(f"ε = {rows[-1]['privacy/epsilon']:.4g}, δ = 0.218 for replacing a client, after 3 rounds")
    for leak in ("from the seed", "train/*", "clients/*", "view all", "clients.csv", "partition"):
        assert leak in said


@pytest.mark.parametrize("rounds", [1, 7, 200])
@pytest.mark.parametrize("accountant", ["rdp", pytest.param("pld", marks=pytest.mark.slow)])
def test_epsilon_is_that_of_dp_accounting(accountant, rounds):
    """Adding or removing one of about 4 of 40 clients."""
    privacy = Privacy(None, DifferentialPrivacy(1.0, 1.3, delta=1e-3, accountant=accountant), set_up(poisson()), 9, 0)
    make = dp.rdp.RdpAccountant if accountant == "rdp" else dp.pld.PLDAccountant
    direct = make(neighboring_relation=RELATION.ADD_OR_REMOVE_ONE)
    direct.compose(dp.PoissonSampledDpEvent(0.1, dp.GaussianDpEvent(1.3)), rounds)
    assert privacy.epsilon(rounds) == pytest.approx(direct.get_epsilon(1e-3), abs=1e-6)


def test_all_clients_in_one_round_are_the_gaussian_mechanism():
    """Without sampling, α/(2σ²) is the Rényi divergence of order α: σ is 1.3 for adding, 1.3/2 for replacing."""
    for sampler, noise in ((poisson(), 1.3), (Uniform(), 0.65)):
        privacy = Privacy(None, DifferentialPrivacy(1.0, 1.3, delta=1e-3), set_up(sampler, 40), 9, 0)
        orders = torch.tensor([1 + x / 10 for x in range(1, 100)] + list(range(11, 64)), dtype=torch.float64)
        # Canonne, Kamath, Steinke 2020, proposition 12.
        bound = 5 * orders / (2 * noise**2) + (1 - 1 / orders).log() - (1e-3 * orders).log() / (orders - 1)
        assert privacy.epsilon(5) == pytest.approx(float(bound.min()), abs=1e-6)


@pytest.mark.parametrize(
    ("accountant", "clients"), [("rdp", 40), *(pytest.param(a, 4, marks=pytest.mark.slow) for a in ("rdp", "pld"))]
)
def test_a_target_finds_the_least_noise(accountant, clients):
    settings = DifferentialPrivacy(1.0, epsilon=2.0, delta=1e-3, accountant=accountant)
    privacy = Privacy(None, settings, set_up(poisson(), clients), 50, 0)
    assert 1.998 < privacy.epsilon(50) <= 2.0
    assert (privacy.spent(49), privacy.spent(50)) == (False, True)


def test_a_target_stops_the_run_also_when_it_is_continued(tmp_path, caplog):
    settings = {"transforms": [DifferentialPrivacy(0.2, epsilon=5.0)], "clients_per_round": 4}
    first = quiet_trainer(tmp_path, **settings)
    first.fit(Regression(), Clients())
    assert first.current_round == 3
    again = quiet_trainer(tmp_path, **{**settings, "max_rounds": 9})
    again.fit(Regression(), Clients(), ckpt_path="last")
    assert again.current_round == 3
    assert "after 3 rounds, the last that epsilon allows; noise" in caplog.text
    rows = read_metrics(again.run_dir / "metrics.csv")
    assert [row["privacy/epsilon"] <= 5.0 for row in rows] == [True] * 3


def test_a_round_without_clients_is_noise_and_the_ledger_is_resumed(tmp_path):
    chain = [DifferentialPrivacy(0.2, noise_multiplier=1.0, delta=0.01)]
    settings = {"transforms": chain, "clients_per_round": 1, "sampler": poisson()}
    whole = Regression()
    trainer = quiet_trainer(tmp_path, max_rounds=8, **settings)
    trainer.fit(whole, Clients())
    rows = read_metrics(trainer.run_dir / "metrics.csv")
    assert 0 in [row["clients/trained"] for row in rows]
    half = {**settings, "name": "half"}
    quiet_trainer(tmp_path, max_rounds=4, **half).fit(Regression(), Clients())
    resumed = Regression()
    second = quiet_trainer(tmp_path, max_rounds=8, **half)
    second.fit(resumed, Clients(), ckpt_path="last")
    assert torch.equal(weights(resumed), weights(whole))
    again = read_metrics(second.run_dir / "metrics.csv")
    assert [row["privacy/epsilon"] for row in again] == [row["privacy/epsilon"] for row in rows]
    allowed = {**half, "max_rounds": 9, "allow_changes": True}
    for change, message in (
        (
            {"transforms": [DifferentialPrivacy(0.2, noise_multiplier=2.0, delta=0.01)]},
            r"another \['noise_multiplier'\]",
        ),
        ({"clients_per_round": 2}, r"another \['clients_per_round'\] in their ledger"),
        ({"transforms": None}, "its rounds had DifferentialPrivacy"),
    ):
        with pytest.raises(MisconfigurationException, match=message):
            quiet_trainer(tmp_path, **{**allowed, **change}).fit(Regression(), Clients(), ckpt_path="last")


@pytest.fixture(scope="module")
def adaptive(tmp_path_factory):
    """Five rounds of two of four clients, whose bound follows the median; in one go, and interrupted."""
    root, found = tmp_path_factory.mktemp("adaptive"), []
    chain = [DifferentialPrivacy(0.3, noise_multiplier=0.4, quantile=0.5, clip_lr=0.9)]
    for name, rounds in (("whole", [5]), ("half", [2, 5])):
        for done in rounds:
            model, algorithm = Regression(), Received()
            trainer = quiet_trainer(root, algorithm=algorithm, transforms=chain, max_rounds=done, name=name)
            trainer.fit(model, Clients(), ckpt_path="last" if done > rounds[0] else None)
        found.append((weights(model), read_metrics(trainer.run_dir / "metrics.csv"), algorithm, trainer))
    return found


def test_the_bound_follows_a_quantile_whose_noise_is_accounted_for(adaptive):
    """Andrew et al. 2021, algorithm 1, in numpy: noise 0.4 at the count of two clients, max(2/20, 0.4)."""
    _, rows, algorithm, _ = adaptive[0]
    scale = (0.4**-2 - 0.8**-2) ** -0.5
    assert (scale**-2 + (2 * 0.4) ** -2) ** -0.5 == pytest.approx(0.4)  # both together tell as much as noise 0.4 alone
    clip, updates = 0.3, [update.numpy() for _, update in algorithm.updates[1:]]
    for round, (row, total) in enumerate(zip(rows, algorithm.totals, strict=True)):
        pair, normal = (
            updates[2 * round : 2 * round + 2],
            torch.randn(5, generator=generator(0, "privacy", round), dtype=torch.float64).numpy(),
        )
        assert row["privacy/clip"] == pytest.approx(clip, rel=1e-6)
        expected = sum(u * min(1.0, clip / np.linalg.norm(u)) for u in pair) + scale * clip * normal[:4]
        np.testing.assert_allclose(total["update"].numpy(), expected, rtol=0, atol=1e-12)
        within = (sum(np.linalg.norm(u) <= clip for u in pair) - 1 + 0.4 * normal[4]) / 2 + 0.5
        clip *= np.exp(-0.9 * (within - 0.5))
    event = dp.SampledWithoutReplacementDpEvent(4, 2, dp.GaussianDpEvent(0.2))
    direct = dp.rdp.RdpAccountant(neighboring_relation=RELATION.REPLACE_ONE).compose(event, 5)
    assert rows[-1]["privacy/epsilon"] == pytest.approx(direct.get_epsilon(4**-1.1), abs=1e-6)
    assert len({row["privacy/clip"] for row in rows}) == 5


def test_the_bound_is_resumed(adaptive):
    (whole, rows, _, trainer), (resumed, again, _, _) = adaptive
    assert torch.equal(whole, resumed)
    assert [row["privacy/clip"] for row in rows] == [row["privacy/clip"] for row in again]
    chain = [DifferentialPrivacy(0.3, noise_multiplier=0.4, quantile=0.7, clip_lr=0.9)]
    with pytest.raises(MisconfigurationException, match=r"another \['quantile'\] in their ledger"):
        quiet_trainer(trainer.default_root_dir, transforms=chain, max_rounds=9, name="whole").fit(
            Regression(), Clients(), ckpt_path="last"
        )


@pytest.mark.parametrize("quantile", [0.2, 0.8])
def test_without_noise_the_bound_comes_to_the_quantile(quantile):
    privacy = Privacy(None, DifferentialPrivacy(5.0, 0, quantile=quantile), set_up(Uniform(), 40), 9, 0)
    for _ in range(400):
        norms = torch.arange(1, 41, dtype=torch.float64) / 40
        within = sum(privacy.bound(n[None].clone(), [])["privacy/within"] for n in norms)
        assert privacy.draw(0, torch.zeros(3))["privacy/within"] == 0
        privacy.finish(1, {"privacy/within": within})
    assert privacy.clip == pytest.approx(quantile, abs=0.03)


def test_secret_noise_has_the_right_size_and_another_draw_each_time():
    privacy = Privacy(None, DifferentialPrivacy(0.5, 2.0, secure=True), set_up(poisson()), 9, 0)
    one, other = (privacy.draw(0, torch.zeros(20000))["update"] for _ in range(2))
    assert not torch.equal(one, other)
    both = torch.cat([one, other])
    assert float(both.mean()) == pytest.approx(0, abs=6 / math.sqrt(40000))
    assert float(both.std()) == pytest.approx(1.0, abs=6 / math.sqrt(80000))
    assert float((both.abs() < 0.6744898).double().mean()) == pytest.approx(0.5, abs=6 * 0.5 / 200)


def test_secret_runs_draw_other_clients_and_noise(tmp_path):
    found = []
    for _ in range(2):
        model, algorithm = Regression(0.001), Received()
        chain = [DifferentialPrivacy(0.2, noise_multiplier=1.0, secure=True)]
        trainer = quiet_trainer(tmp_path, algorithm=algorithm, transforms=chain, clients_per_round=20, max_rounds=1)
        trainer.fit(model, Clients((2,) * 40))
        found.append((weights(model), [client for client, _ in algorithm.updates]))
    assert not torch.equal(found[0][0], found[1][0])
    assert found[0][1] != found[1][1]  # the same 20 of 40 clients: once in 10^11
    assert "from the seed" not in trainer.facts["privacy"]


def test_it_bounds_what_other_transforms_leave(tmp_path):
    algorithm = Received()
    chain = [ClipUpdate(3.0), TopK(0.5), Quantize(8), DifferentialPrivacy(0.2, noise_multiplier=0)]
    trainer = quiet_trainer(tmp_path, algorithm=algorithm, transforms=chain, clients_per_round=1)
    trainer.fit(Regression(), Clients())
    assert [float(total["update"].norm()) for total in algorithm.totals] == pytest.approx([0.2] * 3, abs=1e-12)
    assert read_metrics(trainer.run_dir / "metrics.csv")[-1]["privacy/epsilon"] == math.inf


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clip": 0, "noise_multiplier": 1.0}, "hides nothing unless updates are bounded"),
        ({"clip": None, "noise_multiplier": 1.0}, "hides nothing unless updates are bounded"),
        ({"clip": math.inf}, "transforms.clip must be a finite number"),
        ({"clip": 1.0, "noise_multiplier": 1.0, "epsilon": 1.0}, "exclude each other"),
        ({"clip": 1.0, "noise_multiplier": -1}, "transforms.noise_multiplier must be"),
        ({"clip": 1.0, "epsilon": 0}, "transforms.epsilon must be"),
        ({"clip": 1.0, "delta": 1.0}, "transforms.delta must be"),
        ({"clip": 1.0, "quantile": 1.0}, "transforms.quantile must be"),
        (
            {"clip": {"schedule": "linear", "from": 1, "to": 2, "rounds": 3}, "quantile": 0.5},
            "a schedule or a quantile",
        ),
        ({"clip": 1.0, "clip_lr": 0}, "transforms.clip_lr must be"),
        ({"clip": 1.0, "accountant": "prv"}, "must be 'rdp' or 'pld'"),
    ],
)
def test_settings_that_make_no_sense(arguments, message):
    with pytest.raises((MisconfigurationException, ValueError), match=message):
        DifferentialPrivacy(**arguments)


BATCH_NORM = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


class Counting(nn.Linear):
    """A layer that counts its calls in a buffer."""

    def __init__(self):
        super().__init__(3, 1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


GIVEN = DifferentialPrivacy(1.0, noise_multiplier=1.0)


@pytest.mark.parametrize(
    ("settings", "net", "message"),
    [
        ({"algorithm": SCAFFOLD()}, None, "SCAFFOLD makes more than that of what clients send"),
        ({"perturbation": DualSAM()}, None, "sends dual"),
        ({}, Counting(), "training moves net.calls, which"),
        ({"transforms": [GIVEN, TopK()]}, None, r"Write \['TopK', 'DifferentialPrivacy'\]"),
        ({"centralized": True}, None, "must be below 1/N; N=1"),
    ],
)
def test_what_would_not_be_private_is_refused(tmp_path, settings, net, message):
    with pytest.raises(MisconfigurationException, match=message):
        quiet_trainer(tmp_path, **{"transforms": [GIVEN], **settings}).fit(Regression(net=net), Clients())


@pytest.mark.parametrize(
    ("transforms", "sampler", "algorithm", "net", "message"),
    [
        ([GIVEN], Uniform(), FedExP(), None, "FedExP makes more"),
        ([GIVEN], Uniform(), FedVARP(), None, "FedVARP makes more"),
        ([GIVEN], Uniform(), FedAvg(), BATCH_NORM, r"training moves net.1, which .* Use GroupNorm"),
        ([GIVEN], Bernoulli(), FedAvg(), None, "redraw: no accountant covers"),
        ([GIVEN], RoundRobin(), FedAvg(), None, "rdp accounts for no RoundRobin. Use Bernoulli"),
        ([GIVEN, GIVEN], Uniform(), FedAvg(), None, "holds DifferentialPrivacy twice"),
        ([DifferentialPrivacy(1.0)], Uniform(), FedAvg(), None, "needs noise_multiplier or epsilon"),
        ([DifferentialPrivacy(1.0, 1.0, delta=0.3)], Uniform(), FedAvg(), None, "delta=0.3 must be below 1/N; N=40"),
        ([DifferentialPrivacy(1.0, 1.0, accountant="pld")], Uniform(), FedAvg(), None, "pld accounts for no Uniform"),
        ([DifferentialPrivacy(1.0, epsilon=1e-4, delta=1e-5)], poisson(), FedAvg(), None, "epsilon=0.0001 is out of"),
    ],
)
def test_what_has_no_accounting_is_refused(transforms, sampler, algorithm, net, message):
    with pytest.raises(MisconfigurationException, match=message):
        begin_privacy(transforms, Regression(net=net), algorithm, None, set_up(sampler), 3, 0)


class Drift(Regression):
    """Each client pulls the weights its own way, wherever they are."""

    def training_step(self, batch, batch_idx):
        x, _ = batch
        return -(self.net.weight * x.mean(0)).sum() - 0 * self.net.bias.sum()


def pulls(root, canary, clients_per_round, rounds=600):
    """What the noised sums have of the direction in which only the first of four clients pulls, if it does."""
    data, algorithm = Clients((1, 1, 1, 1)), Received()
    inputs = torch.tensor([[canary, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    data.datasets = [data.dataset(x[None], torch.zeros(1)) for x in inputs]
    few = {"check_val_every_n_rounds": rounds, "enable_checkpointing": False, "enable_plots": False}
    chain = [DifferentialPrivacy(1.0, noise_multiplier=1.0, delta=0.01)]
    given = {"algorithm": algorithm, "transforms": chain, "sampler": poisson(), "seed": int(canary), **few}
    trainer = quiet_trainer(root, max_rounds=rounds, clients_per_round=clients_per_round, **given)
    trainer.fit(Drift(lr=1.0), data)
    return torch.stack([total["update"][0] for total in algorithm.totals]), trainer._session.federation.privacy


@pytest.mark.filterwarnings("ignore:.*the gradient of Drift.training_step is 0")  # without the canary
@pytest.mark.slow
@pytest.mark.parametrize("clients_per_round", [4, 2])
def test_an_attack_finds_no_more_than_epsilon_allows(tmp_path, clients_per_round):
    """Each round is a game: was there a client whose update is 100 long? Half of them choose the threshold.

    (TPR − δ)/FPR is at most e^ε; with the ends of 97.5 % intervals (Clopper and Pearson) for the two rates.
    """
    (with_canary, privacy), (without, _) = (pulls(tmp_path, canary, clients_per_round) for canary in (100.0, 0.0))

    def lower_bound(threshold, present, absent):
        hits, false = int((present > threshold).sum()), int((absent > threshold).sum())
        most = beta.ppf(0.975, false + 1, len(absent) - false)
        least = beta.ppf(0.025, hits, len(present) - hits + 1) if hits else 0.0
        return math.log(max(least - 0.01, 1e-9) / most)

    halves = [values.chunk(2) for values in (with_canary, without)]
    threshold = max(torch.linspace(-1, 4, 51).tolist(), key=lambda t: lower_bound(t, halves[0][0], halves[1][0]))
    found = lower_bound(threshold, halves[0][1], halves[1][1])
    claimed = privacy.epsilon(1)
    less = Privacy(None, DifferentialPrivacy(1.0, 8.0, delta=0.01), set_up(poisson(), clients_per_round, 4), 1, 0)
    assert found <= claimed
    assert found > less.epsilon(1)  # had the noise been claimed to be eight times as large, this would tell


def test_without_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(MisconfigurationException, match=r"pip install 'fedlight\[privacy\]'"):
        quiet_trainer(tmp_path, transforms=[GIVEN]).fit(Regression(), Clients())
