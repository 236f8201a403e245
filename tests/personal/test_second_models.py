"""Models of the clients' own, against loops of plain torch in float64 that are written from the papers."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch.nn import functional as F

from fedlight.algorithms import SCAFFOLD, FedDyn, FedInit, FedSWA
from fedlight.callbacks import ClientMetrics
from fedlight.engines.cuda_graph import CudaGraph
from fedlight.penalties.man import MAN
from fedlight.personal.apfl import APFL
from fedlight.personal.ditto import Ditto
from fedlight.personal.fine_tune import FineTune
from fedlight.personal.local_only import LocalOnly
from fedlight.personal.per_fedavg import PerFedAvg
from fedlight.personal.pfedme import PFedMe
from fedlight.perturbations import LESAM, SAM
from fedlight.run.loggers import read_metrics
from fedlight.seeding import generator
from tests.engines.tape import Tape
from tests.helpers.tiny import Clients, Regression, quiet_trainer, weights

SIZES, LR, ROUNDS = (5, 12, 8, 3), 0.1, 3


class Own(Clients):
    """One batch a client, so that the order of the samples says nothing; each has validation data of its own."""

    def __init__(self, **settings):
        super().__init__(SIZES, batch_size=16, dtype=torch.float64, **settings)

    def client_val_dataset(self, client):
        return self.client_dataset(client)


def fit(folder, personal, model=None, data=None, ckpt_path=None, **settings):
    settings = {"precision": "64-true", "clients_per_round": 4, "local_epochs": 2, **settings}
    model = Regression(LR) if model is None else model
    trainer = quiet_trainer(folder, personal=personal, **settings)
    trainer.fit(model, data or Own(), ckpt_path=ckpt_path)
    return trainer, model


def own(trainer, client):
    return trainer.federation.store.get(client, "personal")["params"]


class Plain:
    """The clients' losses of a linear model, weight and bias in one vector, and FedAvg on them."""

    def __init__(self):
        data, model = Own(), Regression(LR)
        self.data = [(d.inputs, d.targets) for d in data.datasets]
        self.start = weights(model).double()

    def loss(self, client, w):
        x, y = self.data[client]
        return F.mse_loss(x @ w[:3] + w[3], y)

    def gradient(self, client, w):
        w = w.clone().requires_grad_()
        return torch.autograd.grad(self.loss(client, w), w)[0]

    def trained(self, client, w, steps, pull=lambda v: 0):
        for _ in range(steps):
            w = w - LR * (self.gradient(client, w) + pull(w))
        return w

    def mean(self, models):
        return sum(n * w for n, w in zip(SIZES, models, strict=True)) / sum(SIZES)


@pytest.mark.parametrize(("lam", "length"), [(0.5, {}), (0.0, {"epochs": 1}), (2.0, {"steps": 3})])
def test_ditto_is_algorithm_1_of_its_paper(tmp_path, lam, length):
    plain, steps = Plain(), length.get("steps", length.get("epochs", 2))
    w, v = plain.start, [plain.start] * 4
    for _ in range(ROUNDS):
        v = [plain.trained(k, v[k], steps, lambda x, w=w: lam * (x - w)) for k in range(4)]
        w = plain.mean([plain.trained(k, w, 2) for k in range(4)])
    trainer, model = fit(tmp_path, Ditto(lam, **length))
    torch.testing.assert_close(weights(model), w)
    for client in range(4):
        torch.testing.assert_close(own(trainer, client), v[client])
    losses = torch.stack([plain.loss(k, v[k]) for k in range(4)])
    figures = read_metrics(trainer.run_dir / "metrics.csv")[-1]
    assert figures["clients/gradients"] == 4 * (2 + steps)
    assert figures["clients/personal_loss_mean"] == pytest.approx(float(losses.mean()))
    assert figures["clients/personal_loss_std"] == pytest.approx(float(losses.std(unbiased=False)))
    assert figures["clients/loss_mean"] == pytest.approx(sum(float(plain.loss(k, w)) for k in range(4)) / 4)


def test_lesam_follows_the_servers_way_wherever_a_training_starts(tmp_path):
    """FedInit starts beyond the server's model, and Ditto's own model where it was."""
    plain = Plain()
    w, before, last, v = plain.start, None, [plain.start] * 4, [plain.start] * 4
    for _ in range(ROUNDS):
        way = torch.zeros_like(w) if before is None else 0.3 * (before - w) / (before - w).norm()
        start = [w + 0.5 * (w - last[k]) if before is not None else w for k in range(4)]
        last = [s - LR * plain.gradient(k, s + way) for k, s in enumerate(start)]
        v = [x - LR * (plain.gradient(k, x + way) + 0.5 * (x - w)) for k, x in enumerate(v)]
        before, w = w, sum(last) / 4
    more = {"algorithm": FedInit(0.5), "perturbation": LESAM(0.3), "local_epochs": 1}
    trainer, model = fit(tmp_path, Ditto(0.5), **more)
    torch.testing.assert_close(weights(model), w)
    for client in range(4):
        torch.testing.assert_close(own(trainer, client), v[client])


@pytest.mark.parametrize("engine", ["eager", "vmap"])
def test_rates_that_fall_as_an_algorithm_asks_are_those_of_the_shared_model_alone(tmp_path, engine):
    plain, (trainer, _) = Plain(), fit(tmp_path, Ditto(0.5), max_rounds=1, algorithm=FedSWA(), engine=engine)
    for k in range(4):
        expected = plain.trained(k, plain.start, 2, lambda v: 0.5 * (v - plain.start))
        torch.testing.assert_close(own(trainer, k), expected)


def test_apfl_with_one_local_step_is_algorithm_1_of_its_paper(tmp_path):
    """The paper steps w_i and v_i in turn, v_i in the mixture with w_i as it was before that step."""
    plain, alpha = Plain(), 0.3
    w, v = plain.start, [plain.start] * 4
    for _ in range(ROUNDS):
        mixed = [alpha * v[k] + (1 - alpha) * w for k in range(4)]
        v = [v[k] - LR * alpha * plain.gradient(k, mixed[k]) for k in range(4)]
        w = plain.mean([plain.trained(k, w, 1) for k in range(4)])
    trainer, _ = fit(tmp_path, APFL(alpha), local_epochs=1)
    for client in range(4):
        torch.testing.assert_close(own(trainer, client), v[client])
    losses = [float(plain.loss(k, alpha * v[k] + (1 - alpha) * w)) for k in range(4)]
    assert float(trainer.callback_metrics["clients/personal_loss_mean"]) == pytest.approx(sum(losses) / 4, rel=1e-6)


def test_apfl_keeps_the_broadcast_model_in_its_mixture(tmp_path):
    plain, alpha = Plain(), 0.7
    w, v = plain.start, [plain.start] * 4
    for _ in range(2):
        for k in range(4):
            for _ in range(3):
                v[k] = v[k] - LR * alpha * plain.gradient(k, alpha * v[k] + (1 - alpha) * w)
        w = plain.mean([plain.trained(k, w, 2) for k in range(4)])
    trainer, _ = fit(tmp_path, APFL(alpha, steps=3), max_rounds=2)
    for client in range(4):
        torch.testing.assert_close(own(trainer, client), v[client])


def test_a_mixture_of_its_own_model_alone_is_ditto_without_a_pull(tmp_path):
    one, other = (fit(tmp_path, p)[0] for p in (APFL(1.0), Ditto(0.0)))
    for client in range(4):
        torch.testing.assert_close(own(one, client), own(other, client))


def test_local_only_is_sgd_on_each_clients_data(tmp_path):
    """Of four clients two take part in a round; nothing crosses, and the server's model is the mean of their own."""
    plain = Plain()
    trainer, model = fit(tmp_path, LocalOnly(), clients_per_round=2)
    v, last = [plain.start] * 4, []
    for round in range(ROUNDS):
        last = sampled(trainer, round)
        for k in last:
            v[k] = plain.trained(k, v[k], 2)
    torch.testing.assert_close(weights(model), sum(SIZES[k] * v[k] for k in last) / sum(SIZES[k] for k in last))
    row = read_metrics(trainer.run_dir / "metrics.csv")[-1]
    assert row["clients/personal_loss_mean"] == pytest.approx(sum(float(plain.loss(k, v[k])) for k in range(4)) / 4)
    assert row["comm/up_mb"] == row["comm/down_mb"] == 0


def sampled(trainer, round):
    return trainer.sampler.sample(round, generator(trainer.seed, "sampling", round))


def test_fine_tuning_is_for_evaluation_and_changes_no_bit_of_the_training(tmp_path):
    """Dropout, a penalty and a perturbation draw and look as they would without it; callbacks hear nothing of it."""
    heard = {}

    class Listens(Callback):
        def on_train_batch_end(self, trainer, *_):
            heard[trainer.settings["personal"] is None] = heard.get(trainer.settings["personal"] is None, 0) + 1

    def run(personal):
        net = torch.nn.Sequential(
            torch.nn.Linear(3, 4),
            torch.nn.BatchNorm1d(4),
            torch.nn.ReLU(),
            torch.nn.Dropout(0.5),
            torch.nn.Linear(4, 1),
        )
        settings = {"callbacks": [MAN(0.1), Listens()], "perturbation": SAM(), "algorithm": SCAFFOLD()}
        return fit(tmp_path, personal, Regression(0.01, net), clients_per_round=2, **settings)

    (tuned, model), (_, other) = run(FineTune(epochs=3)), run(None)
    assert torch.equal(weights(model), weights(other))
    assert heard[True] == heard[False]
    assert tuned.federation.store.get(0, "personal") is None
    rows = [read_metrics(folder / "metrics.csv") for folder in sorted(tuned.run_dir.parent.iterdir())]
    for row, expected in zip(*rows, strict=True):
        assert {k: row[k] for k in expected if "time" not in k} == {
            k: v for k, v in expected.items() if "time" not in k
        }
        assert row["clients/personal_loss_mean"] != row["clients/loss_mean"]


@pytest.mark.parametrize(("personal", "steps"), [(FineTune(), 1), (FineTune(steps=3), 3)])
def test_fine_tuned_models_and_those_of_new_clients_by_hand(tmp_path, personal, steps):
    plain, data = Plain(), Own(held_out_clients=1, seed=1)
    trainer, model = fit(tmp_path, personal, data=data, clients_per_round=3, callbacks=[ClientMetrics()])
    new, w = trainer.datamodule.new_clients[0], weights(model)
    losses = {k: float(plain.loss(k, plain.trained(k, w, steps))) for k in range(4)}
    figures = trainer.callback_metrics
    assert float(figures["clients/new_loss_mean"]) == pytest.approx(losses.pop(new), rel=1e-6)
    assert float(figures["clients/personal_loss_mean"]) == pytest.approx(sum(losses.values()) / 3, rel=1e-6)
    assert float(figures["clients/personal_loss_min"]) == pytest.approx(min(losses.values()), rel=1e-6)
    header = (trainer.run_dir / "clients.csv").read_text().splitlines()[0].split(",")
    assert {"val/loss", "personal_loss", "new_loss"} <= set(header)


def test_a_new_client_of_ditto_has_what_its_first_round_would_give(tmp_path):
    plain, data = Plain(), Own(held_out_clients=2, seed=1)
    trainer, model = fit(tmp_path, Ditto(0.5), data=data, clients_per_round=1)
    w = weights(model)
    losses = [plain.loss(k, plain.trained(k, w, 2, lambda v: 0.5 * (v - w))) for k in trainer.datamodule.new_clients]
    assert float(trainer.callback_metrics["clients/new_loss_mean"]) == pytest.approx(float(sum(losses)) / 2, rel=1e-6)


def test_a_client_that_has_not_trained_has_the_shared_model(tmp_path):
    trainer, _ = fit(tmp_path, Ditto(0.5), max_rounds=1, clients_per_round=1)
    found = trainer.client_val_metrics
    (trained,) = sampled(trainer, 0)
    for client, metrics in found.items():
        assert (metrics["personal_loss"] == pytest.approx(metrics["val/loss"], rel=1e-12)) == (client != trained)


@pytest.mark.parametrize(
    "personal",
    [
        lambda: APFL(0.4, steps=2, adaptive=True),
        pytest.param(lambda: Ditto(0.1), marks=pytest.mark.slow),
        pytest.param(lambda: PFedMe(5.0, 3), marks=pytest.mark.slow),
        pytest.param(lambda: PerFedAvg(0.05, 0.001), marks=pytest.mark.slow),
    ],
    ids=["apfl", "ditto", "pfedme", "per_fedavg"],
)
def test_it_goes_with_algorithm_perturbation_and_penalty_in_every_engine_and_resumes(tmp_path, personal):
    settings = {"algorithm": FedDyn(0.05), "gradient_clip_val": 1.0, "clients_per_round": 3}
    settings |= {"perturbation": SAM(0.1)} if personal().perturbation is None else {}
    net = lambda: torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))  # noqa: E731

    def run(name, engine="eager", **more):
        model = Regression(0.05, net())
        return fit(tmp_path, personal(), model, name=name, engine=engine, callbacks=[MAN(0.1)], **settings, **more)

    trainer, model = run("whole")
    run("parts", max_rounds=1)
    resumed, again = run("parts", ckpt_path="last")
    batched, _ = run("batched", engine="vmap")
    recorded, last = run("recorded", engine=CudaGraph(slots=2, recorder=Tape))
    rounding = {"rtol": 1e-5, "atol": 1e-6}  # there a learning rate is of float32
    torch.testing.assert_close(weights(last), weights(model), **rounding)
    assert torch.equal(weights(model), weights(again))
    for client in trainer.federation.store.clients() if not trainer.personal.adapts_all else ():
        assert torch.equal(own(trainer, client), own(resumed, client))
        torch.testing.assert_close(own(recorded, client), own(trainer, client), **rounding)
        torch.testing.assert_close(own(trainer, client), own(batched, client))
    metrics = [t.callback_metrics["clients/personal_loss_mean"] for t in (trainer, resumed, batched)]
    assert metrics[0] == metrics[1]
    torch.testing.assert_close(metrics[0], metrics[2])
    with pytest.raises(MisconfigurationException, match="trainer.personal"):
        fit(tmp_path, Ditto(0.7), Regression(0.05, net()), name="parts", ckpt_path="last", max_rounds=9, **settings)


def test_a_client_keeps_the_own_model_that_it_had(tmp_path):
    """Where its message is left out, and where its own training diverges."""
    data = Own()
    data.datasets[1] = data.dataset(torch.full((4, 3), 1e200, dtype=torch.float64), torch.zeros(4))
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.warns(UserWarning, match="client 1: its own model"),
    ):
        trainer, _ = fit(tmp_path, Ditto(0.5), data=data, max_rounds=1, client_val_every_n_rounds=0)
    assert trainer.federation.store.get(1, "personal") is None
    assert bool(own(trainer, 0).isfinite().all())
    with pytest.warns(UserWarning, match="its own model is not finite, and it keeps the one before"):
        trainer, model = fit(tmp_path, Ditto(1e30, steps=20), max_rounds=1, clients_per_round=1, seed=1)
    assert bool(weights(model).isfinite().all())
    assert trainer.federation.store.get(sampled(trainer, 0)[0], "personal") is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FineTune(epochs=0), "epochs=0 must be a whole number"),
        (lambda: FineTune(steps=1.5), "steps=1.5 must be a whole number"),
        (lambda: Ditto(0.1, epochs=1, steps=1), "exclude each other"),
        (lambda: Ditto(-1), "trainer.personal.lam"),
        (lambda: APFL(0), "trainer.personal.alpha"),
        (lambda: APFL(1.5), "trainer.personal.alpha"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises((ValueError, MisconfigurationException), match=message):
        make()


@pytest.mark.parametrize(
    "settings",
    [{"personal": Ditto(), "centralized": True}, {"personal": LocalOnly(), "algorithm": SCAFFOLD()}],
    ids=["no clients", "nothing that SCAFFOLD sees"],
)
def test_what_does_not_go_together_is_refused(tmp_path, settings):
    with pytest.raises(MisconfigurationException, match="trainer.personal"):
        quiet_trainer(tmp_path, **settings)


def test_fine_tuning_without_clients_data_to_evaluate_on_is_refused(tmp_path):
    data = Clients(SIZES, dtype=torch.float64)
    for settings in ({}, {"data": Own(), "client_val_every_n_rounds": 0}, {"data": Own(), "limit_val_batches": 0}):
        with pytest.raises(MisconfigurationException, match="FineTune is for evaluation alone, and nothing"):
            fit(tmp_path, FineTune(), **{"data": data, **settings})
