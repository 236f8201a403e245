"""Hostile clients: who they are, what they send, and that all others do what they did without them."""

import json
from collections import namedtuple

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import TensorDataset

from fedlight.algorithms import SCAFFOLD, FedAvg, FedDyn
from fedlight.data import DatasetPartition
from fedlight.data.arrays import ArrayDataset
from fedlight.models import Classifier
from fedlight.seeding import generator
from fedlight.server.aggregators import GeometricMedian
from fedlight.server.sampling import Uniform
from fedlight.transforms import ALIE, ClipUpdate, GaussianAttack, LabelFlip, Quantize, SignFlip
from fedlight.transforms.attack import Attack
from fedlight.transforms.base import check_chain
from fedlight.transforms.label_flip import _flipped
from tests.helpers.tiny import Clients, Regression, Samples, quiet_trainer, seeded, two_classes, weights

SIZES = (5, 12, 8, 3, 6)


class Arrived(FedAvg):
    """FedAvg that keeps what the server receives in each round: Δ_i by client."""

    def __init__(self):
        super().__init__()
        self.rounds = [{}]

    def contribution(self, message, sender):
        self.rounds[-1][sender.client] = message["update"].clone()
        return super().contribution(message, sender)

    def aggregate(self, server, total):
        self.rounds.append({})
        return super().aggregate(server, total)


def arrived(folder, *transforms, rounds=1, **settings):
    """What arrives in each round with these transforms, and the trainer."""
    algorithm = Arrived()
    given = {"max_rounds": rounds, "clients_per_round": 5, "precision": "64-true", "enable_plots": False, **settings}
    trainer = quiet_trainer(folder, algorithm=algorithm, transforms=list(transforms), **given)
    trainer.fit(Regression(), Clients(SIZES, dtype=torch.float64))
    return algorithm.rounds[:rounds], trainer


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    return arrived(tmp_path_factory.mktemp("honest"))[0][0]


@pytest.mark.parametrize(
    ("clients", "attackers"), [(1, 1), (4, 4), (1.0, 5), (0.2, 1), ([0, np.int64(3)], 2), (6, None), ((1, 2), None)]
)
def test_a_whole_number_of_attackers_is_no_part_of_all(clients, attackers):
    if attackers is None:
        with pytest.raises(MisconfigurationException, match=r"trainer\.transforms\.clients="):
            SignFlip(clients=clients).setup(5, seed=0)
    else:
        (attack := SignFlip(clients=clients)).setup(5, seed=0)
        assert len(attack.attackers) == attackers


def test_a_named_tuple_has_its_label_flipped():
    sample = namedtuple("Sample", "image label")("image", 0)
    assert _flipped(sample, 3) == sample._replace(label=2)


def sign(updates):
    return {c: -3.0 * updates[c] for c in (1, 3)}


def noise(updates):
    return {c: 0.5 * torch.randn(4, generator=generator(0, "transform", 0, c), dtype=torch.float64) for c in (1, 3)}


def little(updates):
    both = np.array([updates[c].numpy() for c in (1, 3)])
    return dict.fromkeys((1, 3), torch.tensor(both.mean(0) - 1.5 * both.std(0)))


@pytest.mark.parametrize(
    ("attack", "expected"),
    [(SignFlip(3.0, [1, 3]), sign), (GaussianAttack(0.5, [3, 1]), noise), (ALIE(1.5, [1, 3]), little)],
)
def test_attackers_send_what_the_paper_says_and_others_the_same_bits(tmp_path, honest, attack, expected):
    (found,), trainer = arrived(tmp_path, attack)
    for client, update in expected(honest).items():
        torch.testing.assert_close(found[client], update, rtol=0, atol=1e-12)
    assert all(torch.equal(found[c], honest[c]) for c in (0, 2, 4))
    name = type(attack).__name__
    assert trainer.facts["attack"] == f"{name} by 2 of 5 clients: [1, 3]"
    assert json.loads((trainer.run_dir / "attackers.json").read_text()) == {name: [1, 3]}


def test_one_colluder_alone_sends_its_update(tmp_path, honest):
    (found,), _ = arrived(tmp_path, ALIE(1.5, [2]))
    torch.testing.assert_close(found[2], honest[2], rtol=0, atol=1e-12)


def test_an_attack_by_clients_that_no_round_draws_is_said(tmp_path):
    class First(Uniform):
        def sample(self, round, rng):
            return [0, 1]

    attacks = {"transforms": [SignFlip(clients=[1, 2]), LabelFlip([2, 3])], "sampler": First(), "max_rounds": 1}
    with pytest.warns(
        UserWarning, match="LabelFlip never attacks, as of its 2 clients, none is drawn in 1 rounds"
    ) as w:
        quiet_trainer(tmp_path, **attacks).fit(Classifier(nn.Linear(3, 2), 2), two_classes())
    assert len(w) == 1


def test_what_comes_after_acts_on_what_attackers_send(tmp_path, honest):
    (found,), _ = arrived(tmp_path, SignFlip(1.0, [1]), GaussianAttack(1e6, [3]), ClipUpdate(0.1))
    assert [float(found[c].norm()) for c in range(5)] == pytest.approx([0.1] * 5)
    torch.testing.assert_close(found[1], -0.1 * honest[1] / honest[1].norm())
    with pytest.raises(MisconfigurationException, match=r"attacks come first, .* Write \['SignFlip', 'Quantize'\]"):
        check_chain([Quantize(), SignFlip()])


def test_a_part_of_the_clients_is_drawn_by_the_seed():
    def drawn(part, seed, cls=SignFlip):
        attack = cls(clients=part)
        attack.setup(40, seed)
        return attack.attackers

    assert [len(drawn(part, 0)) for part in (0.2, 0.26, 0.001, 1.0)] == [8, 10, 1, 40]
    assert drawn(0.2, 0) == drawn(0.2, 0, LabelFlip)  # several attacks are by the same clients
    assert drawn(0.2, 0) != drawn(0.2, 1)


def mean(folder, *transforms, name="run", **settings):
    model = Regression()
    data = Clients(SIZES, dtype=torch.float64)
    given = {"clients_per_round": 5, "max_rounds": 4, "precision": "64-true", "enable_plots": False, "name": name}
    ckpt_path = settings.pop("ckpt_path", None)
    trainer = quiet_trainer(folder, transforms=list(transforms), **{**given, **settings})
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return weights(model)


def test_neither_order_nor_interruption_changes_a_bit(tmp_path, monkeypatch):
    from fedlight.engines.eager import Eager

    chain = {"aggregator": GeometricMedian(), "algorithm": FedDyn(0.1)}
    whole = mean(tmp_path, ALIE(1.0, [0, 3]), **chain)
    mean(tmp_path, ALIE(1.0, [0, 3]), **chain, name="half", max_rounds=2)
    assert torch.equal(mean(tmp_path, ALIE(1.0, [0, 3]), **chain, name="half", ckpt_path="last"), whole)
    with pytest.raises(MisconfigurationException, match=r"trainer.transforms.0.z: 1.0 in the checkpoint, 2.0 here"):
        mean(tmp_path, ALIE(2.0, [0, 3]), **chain, name="half", ckpt_path="last", max_rounds=5)
    with pytest.raises(MisconfigurationException, match=r"trainer.aggregator: .*GeometricMedian.* None here"):
        mean(tmp_path, ALIE(1.0, [0, 3]), algorithm=FedDyn(0.1), name="half", ckpt_path="last", max_rounds=5)
    train = Eager.train
    monkeypatch.setattr(Eager, "train", lambda self, round, tasks: train(self, round, list(tasks)[::-1]))
    assert torch.equal(mean(tmp_path, ALIE(1.0, [0, 3]), **chain, name="reversed"), whole)


def as_samples(x, y):
    return Samples(x, y)


def as_dict(x, y):
    return ArrayDataset.of({"image": x, "label": y})


def as_tuple(x, y):
    return TensorDataset(x, y)


class Three(Regression):
    """Three classes, whatever batches are made of."""

    def __init__(self):
        super().__init__(net=torch.nn.Linear(3, 3))

    def training_step(self, batch, batch_idx):
        x, y = batch if isinstance(batch, list | tuple) else (batch["image"], batch["label"])
        return torch.nn.functional.cross_entropy(self.net(x), y, ignore_index=-1)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.training_step(batch, batch_idx))


def three_classes(kind, flip_by_hand=()):
    """Four clients of ten samples; the labels of some are 2 − y, but those that are ignored."""
    x, owner = seeded(40, 3), torch.arange(40) % 4
    y = (2 * x[:, 0]).round().clamp(-1, 1).long() + 1
    y[0], y[39] = 2, 0
    given = y.clone()
    for client in flip_by_hand:
        given[owner == client] = 2 - y[owner == client]
    data = [kind(x[owner == c], given[owner == c]) for c in range(4)]
    return DatasetPartition(data, val=kind(x, y), batch_size=5)


@pytest.mark.parametrize("kind", [as_tuple, as_samples, as_dict])
def test_flipped_labels_are_those_of_data_that_have_them_flipped(tmp_path, kind):
    def fit(name, data, *transforms, **settings):
        model = Three()
        given = {"clients_per_round": 4, "max_rounds": 2, "name": name, "enable_plots": False}
        trainer = quiet_trainer(tmp_path, transforms=list(transforms), **{**given, **settings})
        trainer.fit(model, data)
        return weights(model), dict(trainer.client_val_metrics)

    expected, _ = fit("by_hand", three_classes(kind, [1, 2]))
    found, evaluated = fit("attack", three_classes(kind), LabelFlip([1, 2]))
    assert torch.equal(found, expected)
    assert not torch.equal(found, fit("honest", three_classes(kind))[0])
    if kind is as_tuple:  # what they are evaluated on is as it was
        data, model = three_classes(kind), Three()
        data.setup()
        rows = data.client_val_dataset(1)
        x, y = rows.batch(torch.arange(len(rows)))
        torch.nn.utils.vector_to_parameters(found, model.parameters())
        assert evaluated[1]["val/loss"] == pytest.approx(model.training_step((x, y), 0).item(), rel=1e-5)
        torch.testing.assert_close(fit("vmap", three_classes(kind), LabelFlip([1, 2]), engine="vmap")[0], expected)


def test_labels_below_zero_stay_and_others_are_refused():
    flip = LabelFlip([0])
    flip.setup(1, 0, 3)
    found = flip.train_data(ArrayDataset(seeded(4, 2), torch.tensor([0, -1, 2, 1]))).targets
    assert found.tolist() == [2, -1, 0, 1]
    for targets in (seeded(4), torch.tensor([0, 1, 2, 3])):
        with pytest.raises(MisconfigurationException, match="LabelFlip takes labels that are whole numbers below 3"):
            flip.train_data(ArrayDataset(seeded(4, 2), targets))
    for data in (ArrayDataset.of({"x": seeded(4, 2), "class": torch.tensor([0, 1, 2, 1])}), [{"x": 1.0, "class": 2}]):
        with pytest.raises(
            MisconfigurationException, match=r"LabelFlip finds no label in a dict.* or called targets, lab"
        ):
            flip.train_data(data)
    assert len(flip.train_data([])) == 0


@pytest.mark.parametrize(
    ("settings", "data", "message"),
    [
        ({"transforms": [LabelFlip([0])]}, Clients(), "LabelFlip needs data that tell partition_counts"),
        ({"transforms": [SignFlip(clients=[0, 9])]}, Clients(), r"clients: there is no \[9\] among 4"),
        ({"transforms": [ALIE()], "algorithm": SCAFFOLD()}, Clients(), "ALIE is for a model's update, and SCAFFOLD"),
        ({"transforms": [SignFlip(clients=[3])], "centralized": True}, two_classes(), r"no \[3\] among 1"),
    ],
)
def test_what_cannot_be_is_refused_before_training(tmp_path, settings, data, message):
    with pytest.raises(MisconfigurationException, match=message):
        quiet_trainer(tmp_path, **settings).fit(Regression(), data)
    assert not list(tmp_path.glob("default/version_*"))


def test_settings_that_make_no_sense():
    for clients in (0.0, 1.5, [], -0.1):
        with pytest.raises(MisconfigurationException, match=r"transforms.clients=.* must be a list of clients, or a"):
            Attack(clients)
    with pytest.raises(ValueError, match="transforms.scale must be"):
        SignFlip(0)
    with pytest.raises(ValueError, match="transforms.std must be"):
        GaussianAttack(-1)
    with pytest.raises(ValueError, match="transforms.z must be"):
        ALIE(float("nan"))
