"""Plays the rounds of a twin's problem with the whole of fedlight: module, datamodule, trainer and engine."""

import tempfile

import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn

from fedlight.algorithms import FedAvg
from fedlight.data.arrays import ArrayDataset
from fedlight.data.datamodule import FederatedDataModule
from fedlight.server.sampling import Sampler
from fedlight.trainer import FederatedTrainer

from . import networks
from .twins import Problem

BATCH = 10


def longer():
    """Six rounds of five unequal clients, of which two or three take part; 2 to 4 local steps."""
    return Problem(
        sizes=(15, 20, 30, 30, 40),
        rounds=((0, 2), (1, 3, 4), (0, 4), (1, 2, 3), (2, 4), (0, 1, 4)),
        lrs=(0.1, 0.09, 0.08, 0.07, 0.06, 0.05),
        steps=(2, 2, 3, 3, 4),
    )


class Quadratic(LightningModule):
    """The loss ½(w − b)ᵀA(w − b) of each sample (A, b), w being all parameters."""

    def __init__(self, problem, batch_norm=False):
        super().__init__()
        with_norm = nn.Linear(2, 1, bias=False), nn.BatchNorm1d(1)
        self.net, self.lrs = nn.Sequential(*with_norm) if batch_norm else nn.Linear(3, 1), problem.lrs
        with torch.no_grad():
            parts = torch.tensor(problem.start).split([p.numel() for p in self.net.double().parameters()])
            for parameter, part in zip(self.net.parameters(), parts, strict=True):
                parameter.copy_(part.view_as(parameter))

    def training_step(self, batch):
        a, b = batch
        d = torch.cat([p.reshape(-1) for p in self.net.parameters()]) - b
        return 0.5 * (d * (a @ d.unsqueeze(-1)).squeeze(-1)).sum(1).mean()

    def configure_optimizers(self):
        optimizer, lrs = torch.optim.SGD(self.parameters(), lr=1.0), self.lrs
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: lrs[min(t, len(lrs) - 1)])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rate, "interval": "round"}}


class Clients(FederatedDataModule):
    """Client i has n_i times the sample (A_i, b_i)."""

    def __init__(self, problem):
        super().__init__(batch_size=BATCH)
        self.num_clients, self.problem = len(problem.sizes), problem

    def client_dataset(self, client):
        a, b = self.problem.hessians[client], self.problem.centers[client]
        return ArrayDataset(*(torch.tensor(x).repeat(self.problem.sizes[client], *(1,) * x.ndim) for x in (a, b)))


class Listed(Sampler):
    """The clients of the problem's rounds."""

    def __init__(self, rounds):
        self.rounds = rounds

    def sample(self, round, rng):
        return list(self.rounds[round])


class Models(Callback):
    """Keeps the server's model after each round, as arrays."""

    def __init__(self):
        self.found = []

    def on_round_end(self, trainer, module):
        self.found.append(trainer.federation.params.double().cpu().numpy().copy())


def fit(problem, algorithm=None, perturbation=None, **settings):
    """The server's model after each round of a problem."""
    module = Quadratic(problem, getattr(algorithm, "personal", None) is not None)
    return train(module, Clients(problem), problem.rounds, algorithm, perturbation, **settings)


def fit_network(algorithm, optimizer=None, perturbation=None, **settings):
    """The same of the network, which this optimizer trains."""
    settings["local_epochs"] = networks.STEPS
    return train(networks.Network(optimizer), networks.Points(), networks.ROUNDS, algorithm, perturbation, **settings)


def train(module, data, rounds, algorithm, perturbation, **settings):
    """The server's model after each round."""
    models = Models()
    with tempfile.TemporaryDirectory() as folder:
        defaults = {"accelerator": "cpu", "devices": 1, "precision": "64-true", "enable_checkpointing": False}
        quiet = {"logger": False, "enable_progress_bar": False, "enable_plots": False, "default_root_dir": folder}
        trainer = FederatedTrainer(
            algorithm or FedAvg(), perturbation, len(rounds), len(rounds[0]), Listed(rounds),
            callbacks=[models], **{**defaults, **quiet, **settings},
        )  # fmt: skip
        trainer.fit(module, data)
    return models.found
