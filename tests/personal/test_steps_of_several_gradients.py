"""Methods whose local step takes several gradients, and APFL's alpha, against plain torch in float64."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback

from fedlight.algorithms import FedAvg, FedAvgM, FedSAM
from fedlight.personal import APFL, PerFedAvg, PFedMe
from fedlight.perturbations import SAM
from fedlight.run.loggers import read_metrics
from tests.helpers.half import scaled  # noqa: F401  (a fixture)
from tests.helpers.tiny import Clients, Regression, quiet_trainer, weights
from tests.personal.test_second_models import LR, ROUNDS, SIZES, Own, Plain, fit, own, sampled

DELTA = {"FO": None, "HF": 0.5}
SEEN = []
"""What clients have trained on: (client, batch), in order."""


class Sees(Callback):
    def on_client_start(self, trainer, module, client):
        self.client = client

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        SEEN.append((self.client, *(part.clone() for part in batch)))


def loss_on(x, y, w):
    return (x @ w[:3] + w[3] - y).square().mean()


def gradient_on(x, y, w):
    return 2 / len(x) * torch.cat([x, torch.ones(len(x), 1)], 1).T @ (x @ w[:3] + w[3] - y)


@pytest.mark.parametrize(("algorithm", "sizes"), [(FedAvg(0.7), SIZES), (FedAvgM(0.7, 0.0, weighted=False), [1] * 4)])
def test_pfedme_is_algorithm_1_of_its_paper(tmp_path, algorithm, sizes):
    """R = 2, K = 3, β = 0.7; with a plain mean, and with one by samples."""
    plain, lam, inner = Plain(), 2.0, 0.2
    w, own_models, ended = plain.start, {}, {}
    for _ in range(ROUNDS):
        for k in range(4):
            local = theta = w
            for _ in range(2):
                for _ in range(3):
                    theta = theta - inner * (plain.gradient(k, theta) + lam * (theta - local))
                local = local - LR * lam * (local - theta)
            ended[k], own_models[k] = local, theta
        w = (1 - 0.7) * w + 0.7 * sum(n * ended[k] for k, n in enumerate(sizes)) / sum(sizes)
    trainer, model = fit(tmp_path, PFedMe(lam, 3, inner), algorithm=algorithm)
    torch.testing.assert_close(weights(model), w)
    for k in range(4):
        torch.testing.assert_close(own(trainer, k), own_models[k])
    row = read_metrics(trainer.run_dir / "metrics.csv")[-1]
    assert row["clients/gradients"] == 4 * 2 * 3
    losses = [float(plain.loss(k, own_models[k])) for k in range(4)]
    assert row["clients/personal_loss_mean"] == pytest.approx(sum(losses) / 4)
    assert trainer.method_name == f"{type(algorithm).__name__}+PFedMe"


def test_with_many_inner_steps_pfedme_descends_the_moreau_envelope(tmp_path):
    """θ of ½‖Xθ − y‖²·2/n + λ/2‖θ − w‖² solves a linear system; so a new client's model does."""
    plain, lam, data = Plain(), 8.0, Own(held_out_clients=1, seed=1)
    settings = {"data": data, "clients_per_round": 3, "local_epochs": 1, "max_rounds": 1}
    trainer, model = fit(tmp_path, PFedMe(lam, 70, 0.04), **settings)

    def best(k, w):
        x, y = plain.data[k]
        x = torch.cat([x, torch.ones(len(x), 1)], 1)
        return torch.linalg.solve(2 / len(x) * x.T @ x + lam * torch.eye(4), 2 / len(x) * x.T @ y + lam * w)

    new, w = trainer.datamodule.new_clients[0], plain.start
    old = [k for k in range(4) if k != new]
    ended = {k: w - LR * lam * (w - best(k, w)) for k in old}
    expected = sum(SIZES[k] * ended[k] for k in old) / sum(SIZES[k] for k in old)
    torch.testing.assert_close(weights(model), expected)
    found = float(trainer.callback_metrics["clients/new_loss_mean"])
    assert found == pytest.approx(float(plain.loss(new, best(new, expected))), rel=1e-6)


@pytest.mark.parametrize("variant", ["FO", "HF"])
def test_per_fedavg_on_one_batch_is_the_gradient_of_the_model_after_a_step(tmp_path, variant):
    """FO treats the step as a constant. The losses are quadratic, so HF's difference is the Hessian itself."""
    plain, alpha = Plain(), 0.05
    w = plain.start
    for _ in range(2):
        models = []
        for k in range(4):
            local = w
            for _ in range(2):
                v = local.clone().requires_grad_()
                (g,) = torch.autograd.grad(plain.loss(k, v), v, create_graph=True)
                ahead = v - alpha * (g if variant == "HF" else g.detach())
                local = local - LR * torch.autograd.grad(plain.loss(k, ahead), v)[0]
            models.append(local)
        w = plain.mean(models)
    trainer, model = fit(tmp_path, PerFedAvg(alpha, DELTA[variant]), max_rounds=2)
    torch.testing.assert_close(weights(model), w)
    losses = [float(plain.loss(k, w - alpha * plain.gradient(k, w))) for k in range(4)]
    row = read_metrics(trainer.run_dir / "metrics.csv")[-1]
    assert row["clients/personal_loss_mean"] == pytest.approx(sum(losses) / 4)
    assert row["clients/gradients"] == 4 * 2 * {"FO": 2, "HF": 4}[variant]


@pytest.mark.parametrize("variant", ["FO", "HF"])
def test_per_fedavg_takes_each_gradient_on_a_batch_of_its_own(tmp_path, variant):
    """Clients have 3, 6, 4 and 2 batches of two; a step that has too few takes its gradients on all of them."""
    SEEN.clear()
    plain, alpha, count = Plain(), 0.05, {"FO": 2, "HF": 3}[variant]
    data = Own()
    data.batch_size = 2
    _, model = fit(
        tmp_path,
        PerFedAvg(alpha, DELTA[variant]),
        data=data,
        local_epochs=1,
        max_rounds=1,
        accumulate_grad_batches=count,
        callbacks=[Sees()],
        client_val_every_n_rounds=0,
    )
    models = []
    for k in range(4):
        w, batches = plain.start, [batch for client, *batch in SEEN if client == k]
        assert len(batches) == -(-SIZES[k] // 2)
        for i in range(0, len(batches), count):
            step = batches[i : i + count]
            means = [lambda v, b=b: gradient_on(*b, v) for b in step]
            if len(step) < count:
                means = [lambda v, step=step: sum(gradient_on(*b, v) for b in step) / len(step)] * count
            g = means[1](w - alpha * means[0](w))
            if variant == "HF":
                g = g - alpha * (means[2](w + g) - means[2](w - g)) / 2  # exact for any length of the difference
            w = w - LR * g
        models.append(w)
    torch.testing.assert_close(weights(model), plain.mean(models))


def test_passes_on_batches_of_their_own_are_the_same_under_vmap(tmp_path):
    def run(engine):
        data = Own()
        data.batch_size = 2
        settings = {"accumulate_grad_batches": 3, "client_val_every_n_rounds": 0, "max_rounds": 1, "engine": engine}
        return weights(fit(tmp_path, PerFedAvg(0.05, 0.001), data=data, gradient_clip_val=1.0, **settings)[1])

    torch.testing.assert_close(run("vmap"), run("eager"))


def test_the_alpha_of_apfl_is_equation_10_with_one_local_step(tmp_path):
    """Two of four clients train in a round; alpha follows the gradient at the v̄, v and w of the round's beginning."""
    plain, alphas, v, w = Plain(), [0.4] * 4, {}, Plain().start
    trainer, _ = fit(tmp_path, APFL(0.4, adaptive=True), local_epochs=1, clients_per_round=2, max_rounds=6)
    for round in range(6):
        ended = {}
        for k in sampled(trainer, round):
            v.setdefault(k, w)
            g = plain.gradient(k, alphas[k] * v[k] + (1 - alphas[k]) * w)
            step = float(g @ (v[k] - w))
            v[k], alphas[k] = v[k] - LR * alphas[k] * g, min(1.0, max(0.001, alphas[k] - LR * step))
            ended[k] = plain.trained(k, w, 1)
        w = sum(SIZES[k] * m for k, m in ended.items()) / sum(SIZES[k] for k in ended)
    assert len(set(alphas)) > 2  # they do move, and apart
    rows = [trainer.federation.store.get(k, "personal") for k in range(4)]
    assert [float(row["alpha"]) for row in rows] == pytest.approx(alphas)
    for k in range(4):
        torch.testing.assert_close(rows[k]["params"], v[k])
    losses = [float(plain.loss(k, alphas[k] * v[k] + (1 - alphas[k]) * w)) for k in range(4)]
    assert float(trainer.callback_metrics["clients/personal_loss_mean"]) == pytest.approx(sum(losses) / 4, rel=1e-6)


def test_the_alpha_of_apfl_stays_between_a_thousandth_and_one(tmp_path):
    start, moved = torch.tensor([0.0]), torch.tensor([2.0])
    for end, alpha in ((torch.tensor([90.0]), 1.0), (torch.tensor([-90.0]), 0.001)):
        result = type("Result", (), {"start": moved, "params": end, "num_steps": 1, "buffers": {}})
        assert float(APFL(0.5, adaptive=True).trained({}, result, start)["alpha"]) == pytest.approx(alpha)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PFedMe(0), "trainer.personal.lam"),
        (lambda: PFedMe(inner_steps=0), "trainer.personal.inner_steps"),
        (lambda: PFedMe(15, inner_lr=0.2), r"inner_lr·lam is 3; .* Lower inner_lr"),
        (lambda: PerFedAvg(0), "trainer.personal.alpha"),
        (lambda: PerFedAvg(delta=0), "trainer.personal.delta"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises((ValueError, MisconfigurationException), match=message):
        make()


@pytest.mark.parametrize(
    ("settings", "way"),
    [
        ({"perturbation": SAM()}, "PFedMe brings its own .* Remove `perturbation`, or `trainer.personal`"),
        ({"algorithm": FedSAM()}, "FedSAM brings its own .* Remove `trainer.personal`, or take the algorithm without"),
    ],
)
def test_another_perturbation_beside_its_own_is_refused_by_name(tmp_path, settings, way):
    with pytest.raises(MisconfigurationException, match=f"perturbation: {way}"):
        quiet_trainer(tmp_path, personal=PFedMe(), **settings)


@pytest.mark.usefixtures("scaled")
def test_a_gradient_that_overflows_in_16_bit_leaves_no_trace_in_theta(tmp_path):
    """The scale begins too large for these gradients; steps are skipped until it fits."""
    settings = {"precision": "32-true", "client_val_every_n_rounds": 0, "max_rounds": 1, "local_epochs": 6}
    trainer, model = fit(tmp_path, PFedMe(2.0, 3, 0.05), data=Clients((4, 4)), clients_per_round=2, **settings)
    assert trainer.federation.state.loss_scale < 65536
    assert not torch.equal(weights(model), weights(Regression(LR)))
    assert all(bool(own(trainer, k).isfinite().all()) for k in range(2))


def test_per_fedavg_trains_without_data_to_evaluate_clients_on(tmp_path):
    _, model = fit(tmp_path, PerFedAvg(), limit_val_batches=0, max_rounds=1)
    assert not torch.equal(weights(model), weights(Regression(LR)).double())
