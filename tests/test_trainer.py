"""The round loop: identities with training that is written out by hand."""

import copy
from dataclasses import replace

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F

from fedlight.algorithms.fedavg import FedAvg
from fedlight.algorithms.fedopt import FedAdam
from fedlight.algorithms.fedprox import FedProx
from fedlight.algorithms.scaffold import SCAFFOLD
from fedlight.callbacks import MAN
from fedlight.callbacks.checkpoint import Checkpoint
from fedlight.engines.client_loop import ClientLoop
from fedlight.personal import Ditto
from fedlight.seeding import generator
from fedlight.server.incoming import Report, round_metrics
from fedlight.server.sampling import Bernoulli, RoundRobin, draw_subset
from tests.helpers.tiny import SIZES, Clients, Keep, Regression, Samples, quiet_trainer, weights


def fit(tmp_path, model=None, data=None, **settings):
    model = Regression() if model is None else model
    trainer = quiet_trainer(tmp_path, **settings)
    trainer.fit(model, Clients() if data is None else data)
    return weights(model)


class ByHand(Clients):
    """The same clients, read sample by sample."""

    def dataset(self, x, y):
        return Samples(x, y)


def local_training(model, dataset, round, client, epochs, lr, seed=0, batch_size=4):
    """The plainest loop that there is, in the order that the seed, the round and the client give."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    rng = generator(seed, "order", round, client)
    for _ in range(epochs):
        for rows in torch.randperm(len(dataset), generator=rng).split(batch_size):
            x = torch.stack([dataset[int(i)][0] for i in rows])
            y = torch.stack([dataset[int(i)][1] for i in rows])
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()


@pytest.mark.parametrize("data", [Clients, ByHand])
@pytest.mark.parametrize("seed", [0, 7])
def test_one_client_with_all_data_is_central_training(tmp_path, data, seed):
    data = data(sizes=(22,))
    central = Regression(lr=0.05)
    local_training(central, data.client_dataset(0), 0, 0, epochs=3, lr=0.05, seed=seed)
    settings = {"max_rounds": 1, "clients_per_round": 1, "local_epochs": 3, "seed": seed}
    assert torch.equal(fit(tmp_path, Regression(lr=0.05), data, **settings), weights(central))


def test_rounds_by_hand(tmp_path):
    """Two rounds of FedAvg over two of four clients, with everything but the order of the data written out."""
    data, expected = Clients(), weights(Regression())
    for round in range(2):
        clients = draw_subset(4, 2, generator(0, "sampling", round)).tolist()
        total, mean = sum(SIZES[i] for i in clients), torch.zeros(4, dtype=torch.float64)
        for client in clients:
            model = Regression()
            nn.utils.vector_to_parameters(expected.clone(), model.parameters())
            local_training(model, data.client_dataset(client), round, client, epochs=2, lr=0.1)
            mean += SIZES[client] / total * weights(model).double()
        expected = mean.float()  # sums are exact, and rounded once
    assert torch.equal(fit(tmp_path, max_rounds=2, local_epochs=2), expected)


def test_fedprox_without_its_term_is_fedavg_and_with_it_is_not(tmp_path):
    averaged = fit(tmp_path, algorithm=FedAvg())
    assert torch.equal(fit(tmp_path, algorithm=FedProx(mu=0.0)), averaged)
    assert not torch.equal(fit(tmp_path, algorithm=FedProx(mu=0.5)), averaged)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tmp_path):
    torch.manual_seed(1)
    first = fit(tmp_path, seed=3)
    torch.manual_seed(2)
    assert torch.equal(fit(tmp_path, seed=3), first)
    assert not torch.equal(fit(tmp_path, seed=4), first)


def test_training_leaves_the_global_random_numbers_alone(tmp_path):
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fit(tmp_path, Regression(net=net))
    assert torch.equal(torch.rand(3), expected)


def test_dropout_depends_on_the_seed_alone(tmp_path):
    def dropout():
        return Regression(net=nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1)))

    torch.manual_seed(1)
    first = fit(tmp_path, dropout(), seed=2)
    torch.manual_seed(2)
    torch.rand(10)
    assert torch.equal(fit(tmp_path, dropout(), seed=2), first)
    plain = Regression(net=nn.Sequential(nn.Linear(3, 8), nn.Identity(), nn.Linear(8, 1)))
    assert not torch.equal(fit(tmp_path, plain, seed=2), first)


def test_how_a_client_trains_does_not_depend_on_who_else_does(tmp_path):
    """With a mean over one client alone the others are not there: a client's update is its own."""
    model = Regression(net=nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1)))
    updates = {}

    for k in (1, 4):
        keep = Keep()
        settings = {"algorithm": keep, "clients_per_round": k, "max_rounds": 1}
        fit(tmp_path, copy.deepcopy(model), **settings)
        updates[k] = {r.client: r.params for r in keep.rounds[0]}
    ((client, alone),) = updates[1].items()
    assert torch.equal(alone, updates[4][client])


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_local_steps_are_optimizer_steps_over_as_many_epochs_as_needed(tmp_path, steps):
    data, model = Clients(sizes=(10,)), Regression()
    fit(tmp_path, model, data, clients_per_round=1, max_rounds=1, local_steps=steps)
    expected, rng, taken = Regression(), generator(0, "order", 0, 0), 0
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    x, y = data.client_dataset(0).batch(torch.arange(10))
    while taken < steps:
        for rows in torch.randperm(10, generator=rng).split(4):
            if taken < steps:
                optimizer.zero_grad()
                F.mse_loss(expected(x[rows]), y[rows]).backward()
                optimizer.step()
                taken += 1
    assert torch.equal(weights(model), weights(expected))


def test_global_step_counts_the_local_steps_of_all_clients(tmp_path):
    trainer = quiet_trainer(tmp_path, clients_per_round=4, max_rounds=2, local_epochs=3)
    trainer.fit(Regression(), Clients())
    assert trainer.global_step == 2 * 3 * sum(-(-n // 4) for n in SIZES)
    assert trainer.current_round == 2


@pytest.mark.parametrize(("limit", "steps"), [(1, 4), (2, 7), (0.5, 4), (1.0, 8), (None, 8)])
def test_limit_train_batches_is_a_number_or_a_fraction(tmp_path, limit, steps):
    """Clients have 5, 12, 8 and 3 samples: 2, 3, 2 and 1 batches of four."""
    trainer = quiet_trainer(tmp_path, clients_per_round=4, max_rounds=1, limit_train_batches=limit)
    trainer.fit(Regression(), Clients())
    assert trainer.global_step == steps


def test_accumulated_batches_are_one_large_batch(tmp_path):
    """Equal batches whose gradients are averaged give the gradient of their union, which the order makes."""
    kwargs = {"sizes": (16, 8), "dtype": torch.float64}
    small = fit(tmp_path, Regression(), Clients(batch_size=2, **kwargs), accumulate_grad_batches=4, precision="64-true")
    large = fit(tmp_path, Regression(), Clients(batch_size=8, **kwargs), precision="64-true")
    torch.testing.assert_close(small, large, rtol=0, atol=1e-14)


def test_an_incomplete_group_of_batches_is_averaged_over_what_it_has(tmp_path):
    data = Clients(sizes=(12,), dtype=torch.float64)  # three batches of four: a pair, and one alone
    settings = {"clients_per_round": 1, "max_rounds": 1, "precision": "64-true"}
    trainer = quiet_trainer(tmp_path, accumulate_grad_batches=2, **settings)
    model, expected = Regression(), Regression().double()
    trainer.fit(model, data)
    assert trainer.global_step == 2
    x, y = data.client_dataset(0).batch(torch.randperm(12, generator=generator(0, "order", 0, 0)))
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    for rows in (slice(0, 8), slice(8, 12)):
        optimizer.zero_grad()
        F.mse_loss(expected(x[rows]), y[rows]).backward()
        optimizer.step()
    torch.testing.assert_close(weights(model), weights(expected), rtol=0, atol=1e-14)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_is_torchs(tmp_path, algorithm):
    data, expected = Clients(sizes=(4,)), Regression()
    settings = {"gradient_clip_val": 0.3, "gradient_clip_algorithm": algorithm}
    found = fit(tmp_path, data=data, clients_per_round=1, max_rounds=1, **settings)
    x, y = data.client_dataset(0).batch(torch.randperm(4, generator=generator(0, "order", 0, 0)))
    F.mse_loss(expected(x), y).backward()
    before = torch.cat([p.grad.reshape(-1) for p in expected.parameters()])
    assert before.norm() > 0.3
    clip = nn.utils.clip_grad_norm_ if algorithm == "norm" else nn.utils.clip_grad_value_
    clip(expected.parameters(), 0.3)
    torch.optim.SGD(expected.parameters(), lr=0.1).step()
    torch.testing.assert_close(found, weights(expected), rtol=0, atol=1e-7)


class Adam(Regression):
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def test_optimizer_state_starts_anew_for_each_client_and_round(tmp_path):
    """With one step of Adam from fresh state every entry moves by the learning rate; with old state it would not."""
    data, keep = Clients(sizes=(4, 4)), Keep()
    fit(tmp_path, Adam(), data, algorithm=keep, max_rounds=3)
    starts = [r.update.abs() for results in keep.rounds for r in results]
    assert len(starts) == 6
    torch.testing.assert_close(torch.stack(starts), torch.full((6, 4), 0.01), rtol=1e-4, atol=0)


def test_the_module_holds_the_servers_model_afterwards(tmp_path):
    model = Regression()
    trainer = quiet_trainer(tmp_path)
    trainer.fit(model, Clients())
    assert torch.equal(weights(model), trainer._session.federation.params)
    assert all(p.grad is None for p in model.parameters())
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert len(storages) == len(list(model.parameters()))
    with pytest.raises(RuntimeError, match="not attached"):
        _ = model.trainer


def test_a_second_fit_starts_a_new_run_from_the_present_weights(tmp_path):
    model, trainer = Regression(), quiet_trainer(tmp_path, max_rounds=2)
    trainer.fit(model, Clients())
    first, folder = weights(model), trainer.run_dir
    trainer.fit(model, Clients())
    assert trainer.run_dir != folder
    assert trainer.current_round == 2
    again = Regression()
    nn.utils.vector_to_parameters(first, again.parameters())
    assert torch.equal(weights(model), fit(tmp_path, again, max_rounds=2))


def test_no_rounds_leave_the_model_as_it_is(tmp_path):
    assert torch.equal(fit(tmp_path, max_rounds=0), weights(Regression()))


def test_fast_dev_run_writes_nothing(tmp_path):
    model = Regression()
    trainer = quiet_trainer(tmp_path / "runs", fast_dev_run=True, max_rounds=50, local_epochs=5, clients_per_round=4)
    trainer.fit(model, Clients())
    assert trainer.current_round == 1
    assert trainer.global_step == 2
    assert not torch.equal(weights(model), weights(Regression()))
    assert not (tmp_path / "runs").exists()
    assert trainer.test(model, Clients())[0].keys() == {"test/loss"}


def test_a_number_for_fast_dev_run_is_that_of_the_batches(tmp_path):
    trainer = quiet_trainer(tmp_path, fast_dev_run=2, local_steps=7)
    trainer.fit(Regression(), Clients(sizes=(12, 12, 12), batch_size=4))
    assert (trainer.current_round, trainer.global_step) == (1, 2 * 2)
    with pytest.raises(MisconfigurationException, match="trainer.fast_dev_run=-1 must be"):
        quiet_trainer(tmp_path, fast_dev_run=-1)


def test_samplers_choose_who_trains(tmp_path):
    def chosen_by(**settings):
        keep = Keep()
        fit(tmp_path, algorithm=keep, **settings)
        return [[r.client for r in results] for results in keep.rounds]

    chosen = chosen_by(sampler=RoundRobin(), max_rounds=3, clients_per_round=3)
    assert chosen == [[0, 1, 2], [0, 1, 3], [0, 2, 3]]
    chosen = chosen_by(sampler=Bernoulli(), max_rounds=20, clients_per_round=2)
    assert {len(c) for c in chosen} > {2}
    assert all(c == sorted(set(c)) and c for c in chosen)


def test_an_empty_client_is_never_sampled(tmp_path):
    keep = Keep()
    fit(tmp_path, data=Clients(sizes=(4, 0, 4, 0, 4)), algorithm=keep, clients_per_round=1.0, max_rounds=3)
    assert [[r.client for r in results] for results in keep.rounds] == [[0, 2, 4]] * 3


def test_a_client_that_diverges_is_left_out_and_counted(tmp_path):
    data = Clients()
    data.datasets[1] = data.dataset(torch.full((4, 3), 1e25), torch.zeros(4))
    model = Regression()
    trainer = quiet_trainer(tmp_path, clients_per_round=4, max_rounds=1, views=["server"])
    with pytest.warns(UserWarning, match=r"round 1: left out clients \[1\], whose update is NaN or infinite"):
        trainer.fit(model, data)
    without = Clients(sizes=(5, 0, 8, 3))
    without.datasets[2:] = data.datasets[2:]
    assert torch.equal(weights(model), fit(tmp_path, data=without, clients_per_round=1.0, max_rounds=1))
    assert trainer.callback_metrics["clients/left_out"] == 1
    assert trainer.callback_metrics["clients/trained"] == 3


def test_buffers_that_are_not_finite_leave_a_client_out_too(tmp_path):
    data = Clients(sizes=(4, 4))
    data.datasets[1] = data.dataset(torch.full((4, 3), 2e19) * torch.tensor([[1.0], [-1], [1], [-1]]), torch.zeros(4))
    model = Regression(net=nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)))
    trainer = quiet_trainer(tmp_path, max_rounds=1)
    with pytest.warns(UserWarning, match=r"left out clients \[1\]"):
        trainer.fit(model, data)
    assert weights(model).isfinite().all()


def test_when_all_diverge_the_run_stops_and_the_last_checkpoint_stays(tmp_path):
    class Diverging(Regression):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (float("nan") if self.current_epoch == 2 else 1)

    trainer = quiet_trainer(tmp_path, max_rounds=5, callbacks=Checkpoint(max_overhead=1))
    with pytest.raises(FloatingPointError, match="round 3: the update of every client .* Lower the learning rate"):
        trainer.fit(Diverging(), Clients())
    saved = torch.load(trainer.run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["fedlight"]["server"]["round"] == 2
    assert torch.equal(saved["fedlight"]["server"]["algorithm"]["params"], fit(tmp_path, max_rounds=2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clients_per_round": 5}, r"trainer.clients_per_round=5 must lie between 1 and data.num_clients=4"),
        ({"clients_per_round": 0}, r"trainer.clients_per_round=0"),
        ({"clients_per_round": 1.5}, r"trainer.clients_per_round=1.5 .* fraction"),
        ({"clients_per_round": float("nan")}, r"trainer.clients_per_round=nan"),
        ({"max_rounds": -1}, r"trainer.max_rounds=-1 must be a whole number of at least 0"),
        ({"max_rounds": 2.5}, r"trainer.max_rounds=2.5"),
        ({"max_rounds": None}, r"trainer.max_rounds=None must be a whole number"),
        ({"seed": None}, r"trainer.seed=None must be a whole number"),
        ({"check_val_every_n_rounds": None}, r"trainer.check_val_every_n_rounds=None must be a whole number"),
        ({"default_root_dir": None}, r"trainer.default_root_dir='None' must name a folder"),
        ({"name": ""}, r"trainer.name='' must name a folder"),
        ({"local_epochs": 0}, r"trainer.local_epochs=0"),
        ({"local_epochs": 1, "local_steps": 1}, r"trainer.local_epochs and trainer.local_steps exclude each other"),
        ({"accumulate_grad_batches": 0}, r"trainer.accumulate_grad_batches=0"),
        ({"limit_train_batches": 0}, r"trainer.limit_train_batches=0 must be a whole number of batches, or a fraction"),
        ({"limit_val_batches": 1.5}, r"trainer.limit_val_batches=1.5"),
        ({"gradient_clip_val": True}, r"trainer.gradient_clip_val=True must be a number"),
        ({"clients_per_round": "3"}, r"trainer.clients_per_round='3' must be a number"),
        ({"gradient_clip_val": -1.0}, r"trainer.gradient_clip_val=-1.0 must be positive"),
        ({"views": ["selected"]}, r"trainer.views=\['selected'\] must hold 'server'"),
        ({"views": ["server", "best"]}, r"trainer.views"),
        ({"name": "../up"}, r"trainer.name='../up' must name a folder"),
        ({"name": "a\0b"}, r"trainer.name='a.x00b' must name a folder"),
        ({"name": "a" * 300}, r"trainer.name='a{40}...' must name a folder, in 255 bytes at most"),
        ({"name": "é" * 200}, r"trainer.name='é{40}...' must name a folder"),
        ({"default_root_dir": "runs/a\0b"}, r"trainer.default_root_dir='runs/a.x00b' must name a folder"),
        ({"default_root_dir": "runs/" + "b" * 300 + "/c"}, r"trainer.default_root_dir='runs/bb.*' must name a folder"),
        ({"seed": -1}, r"trainer.seed=-1"),
        ({"engine": "warp"}, r"trainer.engine='warp' must be one of \['auto', 'cuda_graph', 'eager'"),
        ({"accelerator": "abacus"}, r"trainer.accelerator='abacus'.*is not possible here"),
        ({"accelerator": "tpu"}, r"trainer.accelerator='tpu'.*is not possible here: Requirement 'torch_xla"),
        ({"accelerator": "cpu", "devices": 0}, r"trainer.devices=0.*is not possible here"),
        ({"precision": "8-true"}, r"trainer.precision='8-true'.*is not possible here"),
        ({"client_state": "moon"}, r"trainer.client_state='moon'"),
        ({"buffers": "keep"}, r"trainer.buffers='keep'"),
        ({"gradient_clip_algorithm": "mean"}, r"trainer.gradient_clip_algorithm='mean'"),
        ({"algorithm": "FedDyn"}, r"algorithm: 'FedDyn' is no object. Give one of the class, as FedDyn\(\)"),
        ({"callbacks": [MAN]}, r"callbacks: <class .*MAN'> is no object. Give one of the class, as MAN\(\)"),
        ({"personal": Ditto}, r"personal: <class .*Ditto'> is no object"),
    ],
)
def test_impossible_settings_are_refused_by_name_and_leave_nothing(tmp_path, settings, message):
    with pytest.raises(MisconfigurationException, match=message):
        quiet_trainer(tmp_path, **settings).fit(Regression(), Clients())
    assert not list(tmp_path.glob("default/version_*"))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Regression, "model: <class .*Regression'> is no object"),
        (torch.nn.ReLU(), "ReLU is no LightningModule, as Cla"),
    ],
)
def test_what_is_no_module_is_refused_by_name(tmp_path, model, message):
    with pytest.raises(MisconfigurationException, match=message):
        quiet_trainer(tmp_path).fit(model, Clients())


def test_a_gpu_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MisconfigurationException, match="trainer.accelerator='cuda'.*is not possible here"):
        quiet_trainer(tmp_path, accelerator="cuda").fit(Regression(), Clients())


def test_validate_and_test_report_the_views_of_a_checkpoint(tmp_path, capsys):
    model, trainer = Regression(), quiet_trainer(tmp_path, max_rounds=2, clients_per_round=1)
    trainer.fit(model, Clients())
    capsys.readouterr()
    (found,) = trainer.test(Regression(), Clients(), ckpt_path="last")
    assert set(found) == {"test/loss", "test/loss_selected", "test/loss_all"}
    state = trainer._session.federation.state
    x, y = Clients().held_out.batch(torch.arange(10))
    for view, params in state.views.items():
        other = Regression()
        nn.utils.vector_to_parameters(params, other.parameters())
        with torch.no_grad():
            expected = [F.mse_loss(other(x[r]), y[r]).double() * len(x[r]) for r in torch.arange(10).split(4)]
        suffix = "" if view == "server" else f"_{view}"
        assert found[f"test/loss{suffix}"] == pytest.approx(float(sum(expected)) / 10, rel=1e-12)
    assert found["test/loss"] != found["test/loss_all"]
    assert f"test/loss_all       {found['test/loss_all']:.4f}\n" in capsys.readouterr().out
    (validated,) = trainer.validate(Regression(), Clients(), ckpt_path="best", verbose=False)
    assert set(validated) == {"val/loss", "val/loss_selected", "val/loss_all"}
    assert capsys.readouterr().out == ""
    (alone,) = trainer.validate(model, Clients())
    assert set(alone) == {"val/loss"}


@pytest.mark.parametrize("rounds", [2, 6])
@pytest.mark.parametrize("method", [FedAvg(), SCAFFOLD(), FedAdam(weighted=False), FedAdam()])
def test_the_mean_of_all_clients_is_weighted_as_the_methods_own_and_counts_those_that_never_trained(
    tmp_path, monkeypatch, method, rounds
):
    """Sizes 5, 12, 8 and 3, one client a round: after two rounds the others count with the first model."""
    latest, train = [weights(Regression())] * 4, ClientLoop.train

    def keep(self, *args):
        result = train(self, *args)
        latest[result.client] = result.params
        return result

    monkeypatch.setattr(ClientLoop, "train", keep)
    trainer = quiet_trainer(tmp_path, algorithm=method, sampler=RoundRobin(), clients_per_round=1, max_rounds=rounds)
    trainer.fit(Regression(), Clients())
    n = torch.tensor((5, 12, 8, 3) if method.mean_by == "samples" else (1, 1, 1, 1), dtype=torch.float64)
    expected = ((n / n.sum()) @ torch.stack(latest).double()).float()
    torch.testing.assert_close(trainer._session.federation.state.views["all"], expected, rtol=1e-6, atol=1e-7)


def test_anything_but_a_federated_datamodule_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="data: expected a FederatedDataModule .* found None"):
        quiet_trainer(tmp_path).fit(Regression())


def test_learning_happens(tmp_path):
    model = Regression(lr=0.05)
    trainer = quiet_trainer(tmp_path, max_rounds=60, clients_per_round=4, local_epochs=2)
    trainer.fit(model, Clients())
    truth = torch.tensor([1.0, -2.0, 0.5])
    assert float((weights(model)[:3] - truth).norm()) < 0.05 < float((weights(Regression())[:3] - truth).norm())


@pytest.mark.parametrize("method", [FedAvg(), SCAFFOLD(), SCAFFOLD(weighting="equal")])
def test_views_are_the_servers_model_where_that_is_their_mean(tmp_path, method):
    """All clients take part, and a step of 1: the server, the selected and all have the same weights."""
    trainer = quiet_trainer(tmp_path, algorithm=method, clients_per_round=4, max_rounds=2)
    trainer.fit(Regression(), Clients())
    views = trainer._session.federation.state.views
    assert torch.equal(views["server"], views["selected"])
    torch.testing.assert_close(views["server"], views["all"], rtol=1e-6, atol=1e-7)


def test_one_client_does_not_drift_from_itself():
    one = Report(0, True, 3.0, 1.0 + 1e-15, 3, 1, 0, 8, None, {}, {})  # its norm is rounded otherwise than the mean's
    mean = torch.tensor([1.0], dtype=torch.float64)
    assert round_metrics([one], mean)["clients/drift"] == 0
    assert round_metrics([one, replace(one, square=3.0)], mean)["clients/drift"] == pytest.approx(1.0)
