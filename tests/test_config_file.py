"""``config.yaml`` of a run that a Python program began."""

import inspect
import re
from functools import partial

import pytest
import torch
import yaml
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger, Logger
from torch import nn
from torch.utils.data import TensorDataset

import fedlight.algorithms
import fedlight.callbacks
import fedlight.penalties
import fedlight.perturbations
import fedlight.transforms
from fedlight import MAN, Checkpoint, Classifier, DatasetPartition, HessianSpectrum, ImageData
from fedlight.algorithms import FedAvgM, FedDyn
from fedlight.algorithms.base import Algorithm
from fedlight.callbacks.config_file import config_yaml
from fedlight.cli.command import main
from fedlight.data.federated import Federated
from fedlight.data.partition import IID
from fedlight.models import MLP
from fedlight.perturbations import SAM
from fedlight.perturbations.base import Perturbation
from fedlight.plugins import discover
from fedlight.run.loggers import read_metrics
from fedlight.server.sampling import Bernoulli
from fedlight.transforms import TopK
from fedlight.transforms.base import Transform
from fedlight.written import written
from tests.data.test_federated import Stock
from tests.helpers.tiny import Clients, Regression, quiet_trainer

SGD = partial(torch.optim.SGD, lr=0.2, momentum=0.5)


def classifier(**kwargs):
    seed_everything(3, verbose=False)
    return Classifier(MLP(64, 10, [8]), 10, SGD, **kwargs)


def digits():
    return ImageData("digits", 6, IID(), limit_samples=150)


class Silent(Logger):
    name = version = "silent"

    def __init__(self, level):
        super().__init__()

    def log_metrics(self, metrics, step=None):
        """Nothing."""

    def log_hyperparams(self, *args, **kwargs):
        """Nothing."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run in which nearly everything is set."""
    folder = tmp_path_factory.mktemp("python")
    trainer = quiet_trainer(
        folder,
        algorithm=FedDyn(alpha=0.05),
        perturbation=SAM(rho=0.02),
        sampler=Bernoulli(),
        callbacks=[MAN(zeta=0.1), EarlyStopping("val/loss", min_delta=0.0), Checkpoint(every_n_rounds=2)],
        transforms=TopK(0.5),
        logger=[CSVLogger(str(folder)), Silent(2)],
        gradient_clip_val=3.0,
        seed=3,
        max_rounds=2,
    )
    model = classifier(lr_scheduler=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9))
    trainer.fit(model, digits())
    return trainer.run_dir


def test_the_command_line_does_the_same_with_it(run, capsys):
    main(["fit", "-c", str(run / "config.yaml"), "--trainer.logger", "csv"])
    python, yaml_run = (
        [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_metrics(path / "metrics.csv")]
        for path in (run, run.with_name("version_1"))
    )
    assert len(python) == 2
    assert yaml_run == python
    theirs = yaml.safe_load((run.with_name("version_1") / "config.yaml").read_text())
    ours = yaml.safe_load((run / "config.yaml").read_text())
    for part in ("seed_everything", "algorithm", "perturbation", "data"):
        assert theirs[part] == ours[part]
    assert set(theirs["trainer"]) - set(ours["trainer"]) == {"logger"}


def test_it_says_what_it_leaves_out(run):
    text = (run / "config.yaml").read_text()
    assert "seed_everything(3) just before" in text
    assert re.findall("# Left out: .*", text) == [
        "# Left out: trainer.logger: a Silent keeps level neither in hparams nor as attributes of that name."
    ]
    assert "logger" not in yaml.safe_load(text)["trainer"]


class Hidden(Regression):
    def __init__(self, width=4):
        super().__init__(net=nn.Sequential(nn.Linear(3, width), nn.Linear(width, 1)))


class Open(Regression):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.save_hyperparameters()


class Sized(Clients):
    def __init__(self, sizes=(5, 6), **kwargs):
        super().__init__(sizes, **kwargs)


def not_written(model, data, **settings):
    return yaml.safe_load(config_yaml(quiet_trainer("x", **settings), model, data)).get("not_written", [])


class Weighted(Regression):
    def __init__(self, weight=None, make=None):
        super().__init__()
        self.weight, self.make = weight, make


def test_tensors_and_positional_arguments_are_not_written_as_their_class_alone():
    assert not_written(Weighted(torch.ones(2), partial(torch.optim.SGD, [])), Sized()) == [
        "model.make: a partial does not tell what it was made with",
        "model.weight: a Tensor does not tell what it was made with",
    ]


def test_what_cannot_be_written_is_refused_by_the_command_line(tmp_path, capsys):
    class Local(Callback):
        pass

    assert not_written(Open(lr=0.3, net=None), Sized()) == []
    sequential = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), 10, optimizer=lambda p: SGD(p))
    assert not_written(sequential, DatasetPartition(TensorDataset(torch.zeros(3, 1)), num_clients=2)) == [
        "model.net: a Sequential does not tell what it was made with",
        "model.optimizer: a lambda; functools.partial of a class can be written",
        "data.train: a TensorDataset does not tell what it was made with",
    ]
    early = EarlyStopping("val/loss", min_delta=0.1)  # keeps -0.1, which as an argument would mean something else
    assert not_written(Hidden(), Federated(Stock(), num_clients=3), callbacks=[early, Local()]) == [
        "trainer.callbacks.0: a EarlyStopping that is made with its attributes would be another one",
        f"trainer.callbacks.1: {Local.__qualname__} is defined in a function, and cannot be imported",
        "model: a Hidden keeps width neither in hparams nor as attributes of that name",
    ]
    trainer = quiet_trainer(tmp_path, max_rounds=1)
    trainer.fit(Hidden(), Clients())
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "-c", str(trainer.run_dir / "config.yaml")])  # with dtype besides, which no YAML has
    assert "remove `not_written`" in capsys.readouterr().err


def test_what_was_set_after_an_object_was_made(tmp_path):
    algorithm = FedDyn(alpha=0.05)
    algorithm.alpha = 0.3
    trainer = quiet_trainer(tmp_path, algorithm=algorithm)
    trainer.max_rounds = 9
    config = yaml.safe_load(config_yaml(trainer, Regression(), Sized((2, 3), batch_size=7)))
    assert config["algorithm"]["init_args"]["alpha"] == 0.3
    assert config["trainer"]["max_rounds"] == 9
    assert config["trainer"]["callbacks"] is None
    assert config["data"]["init_args"] == {"sizes": [2, 3], "batch_size": 7}


PLUGINS = [
    *discover(fedlight.algorithms, Algorithm).values(),
    *discover(fedlight.perturbations, Perturbation).values(),
    *discover(fedlight.transforms, Transform).values(),
    *discover(fedlight.callbacks, Callback).values(),
]


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda plugin: plugin.__name__)
def test_every_plugin_tells_what_it_was_made_with(plugin):
    lost, parameters = {}, inspect.signature(plugin).parameters
    needed = {name: 1 for name, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    config = written(plugin(**needed), "it", lost)
    assert not lost
    named = {name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert named <= set(config.get("init_args", {}))


def test_arguments_that_are_handed_on_are_written():
    assert written(FedAvgM(momentum=0.5), "", {})["init_args"]["momentum"] == 0.5
    found = written(HessianSpectrum(top_k=7), "", {})
    assert found["class_path"] == "fedlight.callbacks.hessian.HessianSpectrum"
    assert found["init_args"]["top_k"] == 7
