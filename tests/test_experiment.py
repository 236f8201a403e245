"""What describes an experiment: the same for the same, another for each setting that changes what is trained."""

import inspect
import math
from enum import IntEnum
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, SequentialLR, StepLR
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset, Subset

import fedlight.algorithms
import fedlight.data
import fedlight.perturbations
from fedlight.algorithms.base import Algorithm
from fedlight.algorithms.fedopt import FedOpt
from fedlight.data.datamodule import FederatedDataModule
from fedlight.data.federated import PooledData
from fedlight.data.partition import Partitioner
from fedlight.models import MLP, Classifier
from fedlight.penalties.man import MAN
from fedlight.perturbations.base import Perturbation
from fedlight.plugins import discover
from fedlight.run.experiment import differences, plain
from tests.helpers.tiny import Clients, Regression, quiet_trainer, seeded

PLUGINS = [
    cls
    for package, base in (
        (fedlight.algorithms, Algorithm),
        (fedlight.perturbations, Perturbation),
        (fedlight.data, Partitioner),
    )
    for cls in discover(package, base).values()
    if not inspect.isabstract(cls)
]


def experiment(data=None, model=None, **settings):
    trainer = quiet_trainer(Path(), fast_dev_run=True, **settings)
    trainer.fit(model or Regression(), data or Clients())
    return trainer._session.experiment


def other(value):
    """Another value of a setting's type that it accepts, too."""
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else value / 2 if value else 0.25


@pytest.mark.parametrize("plugin", [*PLUGINS, MAN], ids=lambda cls: cls.__name__)
def test_every_setting_of_a_plugin_is_part_of_it(plugin):
    for name, parameter in inspect.signature(plugin).parameters.items():
        if isinstance(parameter.default, bool | int | float):
            made, again = plugin(), plugin()
            changed = plugin(**{name: other(parameter.default)})
            own = [plain([m, getattr(m, "perturbation", None)]) for m in (made, again, changed)]
            assert differences(own[0], own[1]) == {}
            assert differences(own[0], own[2]) != {}, name


class Custom:
    """Its settings are called as its arguments, or not; what it counts is no setting."""

    def __init__(self, mu=0.1, rho=0.2, **rest):
        self.mu, self._rho = mu, rho
        self.count = 0


class Renamed(Custom):
    def __init__(self, strength=1.0, **rest):
        super().__init__(**rest)
        self.lam = strength


def test_a_class_of_ones_own():
    one, two = Custom(), Custom(rho=0.3)
    one.count = 7
    assert plain(one) == {"class_path": "Custom", "mu": 0.1, "rho": 0.2}
    assert differences(plain(one), plain(Custom())) == {}
    assert differences(plain(one), plain(two), "algorithm") == {"algorithm.rho": [0.2, 0.3]}
    assert differences(plain(Renamed()), plain(Renamed(2.0)), "a") == {"a.lam": [1.0, 2.0]}
    assert differences(plain(Renamed()), plain(Renamed(rho=2.0)), "a") == {"a.rho": [0.2, 2.0]}


class Kind(IntEnum):
    SMALL, LARGE = 1, 2


def decay(gamma):
    return lambda round: gamma**round


@pytest.mark.parametrize(
    ("one", "same", "changed"),
    [
        (lambda r: 0.9**r, lambda r: 0.9**r, lambda r: 0.8**r),
        (decay(0.9), decay(0.9), decay(0.8)),
        (lambda r: math.cos(r), lambda r: math.cos(r), lambda r: math.sin(r)),
        (partial(max, 0.1, key=abs), partial(max, 0.1, key=abs), partial(min, 0.1, key=abs)),
        (partial(torch.optim.SGD, lr=0.1), partial(torch.optim.SGD, lr=0.1), partial(torch.optim.SGD, lr=0.2)),
        (torch.optim.SGD, torch.optim.SGD, torch.optim.Adam),
        (torch.relu, torch.relu, torch.tanh),
        ({"b", "a"}, {"a", "b"}, {"a", "c"}),
        (torch.arange(5.0), torch.arange(5.0) + 1e-9, torch.arange(5.0).flip(0)),
        (np.float64(0.1), 0.1, 0.2),
        (torch.float32, torch.float32, torch.float64),
        (Kind.SMALL, 1, Kind.LARGE),
        (torch.__version__, str(torch.__version__), "0.4"),
        (0.1, 0.1, 0.10001),
        (float("nan"), float("nan"), 0.0),
        (None, None, 0),
        ([1, [2, (3,)]], [1, [2, [3]]], [1, [2, (4,)]]),
        ([1, 2], [1, 2], [1, 2, 3]),
        (nn.Linear(2, 3), nn.Linear(2, 3), nn.Linear(2, 4)),
    ],
)
def test_plain_values_are_stable_and_tell_what_differs(one, same, changed):
    values = [plain(v) for v in (one, same, changed)]
    # What lambdas are called after is where they stand.
    assert "0x" not in repr(values)
    # A checkpoint holds them as they are: a class of its own, as that of torch's version, could not be read.
    assert {type(leaf) for leaf in tree_leaves(values)} <= {bool, int, float, str, type(None)}
    assert differences(values[0], values[1], "k") == {}
    assert differences(values[0], values[2], "k") != {}


def test_the_command_line_and_python_make_the_same_of_an_optimizer():
    class Instantiator:
        pass

    def call(instantiator, cls, *args, **kwargs):
        return cls(*args, **kwargs)

    written = FedOpt(partial(call, Instantiator(), torch.optim.SGD, lr=0.5, momentum=0.0, nesterov=False))
    assert differences(plain(written), plain(FedOpt(partial(torch.optim.SGD, lr=0.5)))) == {}
    assert differences(plain(written), plain(FedOpt(partial(torch.optim.SGD, lr=0.6)))) != {}


def test_what_refers_to_itself_ends():
    loop = [1]
    loop.append(loop)
    assert differences(plain(loop), plain(loop)) == {}


class Scheduled(Regression):
    def __init__(self, milestone=2, gamma=0.1, interval="round", decay=0.5):
        super().__init__()
        self.settings = milestone, gamma, interval, decay

    def configure_optimizers(self):
        milestone, gamma, interval, decay = self.settings
        optimizer = super().configure_optimizers()
        warm = LambdaLR(optimizer, lambda r: 1 - decay ** (r + 1))
        scheduler = SequentialLR(optimizer, [warm, StepLR(optimizer, 3, gamma)], [milestone])
        return [optimizer], [{"scheduler": scheduler, "interval": interval}]


def test_schedules():
    base = experiment(model=Scheduled())
    assert differences(base, experiment(model=Scheduled())) == {}
    for changed in ({"milestone": 3}, {"gamma": 0.2}, {"interval": "epoch"}, {"decay": 0.4}):
        found = differences(base, experiment(model=Scheduled(**changed)))
        assert found, changed
        assert all(key.startswith("optimizer.") for key in found)


class Parts(FederatedDataModule):
    """Subsets of one dataset that is read sample by sample."""

    def __init__(self, whole, rows):
        super().__init__(batch_size=2)
        self.whole, self.rows, self.num_clients = whole, rows, len(rows)

    def client_dataset(self, client):
        return Subset(self.whole, self.rows[client])


class Noisy(Dataset):
    """Augments by a generator that is seeded from outside (``np.random``), or by one of its own."""

    def __init__(self, rng=None, shift=0.0):
        self.rng, self.shift = rng, shift

    def __len__(self):
        return 8

    def __getitem__(self, index):
        noise = (np.random if self.rng is None else self.rng).normal(size=3)
        return torch.tensor(noise + index + self.shift).float(), torch.tensor(float(index))


def test_every_clients_indices_are_part_of_it():
    base = experiment(Parts(Noisy(), [[0, 1], [2, 3], [4, 5, 6, 7]]))
    assert differences(base, experiment(Parts(Noisy(), [[0, 1], [2, 3], [4, 5, 6, 7]]))) == {}
    swapped = differences(base, experiment(Parts(Noisy(), [[0, 1], [2, 4], [3, 5, 6, 7]])))
    assert "data.partition" in swapped
    shifted = differences(base, experiment(Parts(Noisy(shift=1.0), [[0, 1], [2, 3], [4, 5, 6, 7]])))
    assert {key.split(".")[1] for key in shifted} == {"samples"}


def test_data_that_is_random_by_itself_can_be_continued():
    one = experiment(Parts(Noisy(np.random.default_rng()), [[0, 1], [2, 3]]))
    two = experiment(Parts(Noisy(np.random.default_rng()), [[0, 1], [2, 3]]))
    assert one["data"]["samples"] == [None] * 8
    assert differences(one, two) == {}


def test_clients_with_data_of_their_own():
    base = experiment(Clients())
    assert differences(base, experiment(Clients())) == {}
    moved = Clients()
    moved.datasets = [type(d)(d.inputs + 1e-3, d.targets) for d in moved.datasets]
    assert any(key.startswith("data.samples") for key in differences(base, experiment(moved)))
    swapped = Clients()
    swapped.datasets[1], swapped.datasets[2] = swapped.datasets[2], swapped.datasets[1]
    assert "data.partition" in differences(base, experiment(swapped))
    held_out = Clients()  # validation is no part of what is trained
    held_out.held_out = held_out.dataset(seeded(4, 3), torch.zeros(4))
    assert differences(base, experiment(held_out)) == {}


def test_pooled_data():
    assert isinstance(PooledData(Clients()), FederatedDataModule)
    base = experiment(Clients(), centralized=True)
    assert differences(base, experiment(Clients(), centralized=True)) == {}
    assert differences(base, experiment(Clients((5, 12, 8, 4)), centralized=True)) != {}


class Frozen(Regression):
    def __init__(self, which):
        super().__init__(net=nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1)))
        self.net[which].requires_grad_(False)


def test_the_model():
    base = experiment(model=Frozen(0))
    found = differences(base, experiment(model=Frozen(1)))
    assert found["model.trained.0"] == ["net.1.weight", "net.0.weight"]

    def net(p, activation):
        return Regression(net=nn.Sequential(nn.Linear(3, 3), activation, nn.Dropout(p), nn.Linear(3, 1)))

    base = experiment(model=net(0.1, nn.ReLU()))
    assert differences(base, experiment(model=net(0.2, nn.ReLU()))) != {}
    assert differences(base, experiment(model=net(0.1, nn.GELU()))) != {}
    hparams = [Classifier(MLP(3, 2), 2, label_smoothing=s).hparams for s in (0.0, 0.1)]
    assert differences(plain(hparams[0]), plain(hparams[1])) == {"label_smoothing": [0.0, 0.1]}


def test_a_batch_is_not_all_of_them(tmp_path):
    found = []
    for limit in (1, 1.0):
        trainer = quiet_trainer(tmp_path, max_rounds=0, limit_train_batches=limit)
        trainer.fit(Regression(), Clients())
        found.append(trainer._session.experiment)
    assert differences(*found) == {"trainer.limit_train_batches": ["1", "None"]}
