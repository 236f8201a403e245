"""Aggregators and attacks on the problem of the contracts.

Run as a program (``python -m tests.contracts.hostile FOLDER``, in two processes) it trains each and saves the outcome.
"""

import sys
from pathlib import Path

import torch

from fedlight.algorithms import FedAvg, FedDyn
from fedlight.server.aggregators import GeometricMedian, Krum, Median
from fedlight.trainer import FederatedTrainer
from fedlight.transforms import ALIE, GaussianAttack, TopK
from tests.contracts.combinations import Clients, Listed, Logistic, outcome

ROUNDS = ((0, 1, 2, 3, 4), (0, 1, 2, 4), (0, 1, 2, 3, 4))
CASES = {
    "Median, ALIE": {"aggregator": Median(), "transforms": [ALIE(1.5, [1, 3]), TopK(0.5)]},
    "Krum": {"aggregator": Krum(0, keep=2)},
    "GeometricMedian": {
        "algorithm": FedDyn(),
        "aggregator": GeometricMedian(),
        "transforms": [GaussianAttack(5.0, [4])],
    },
}


def run(name, root, ckpt_path=None, **settings):
    """Train a case; BatchNorm's statistics follow the aggregator."""
    defaults = {"engine": "eager", "accelerator": "cpu", "devices": 1, "max_rounds": len(ROUNDS), "algorithm": FedAvg()}
    quiet = {"enable_progress_bar": False, "client_val_every_n_rounds": 0, "default_root_dir": root, "name": name}
    quiet |= {"sampler": Listed(*ROUNDS), "clients_per_round": 4, "enable_plots": False}
    trainer = FederatedTrainer(**{**defaults, **quiet, **CASES[name], **settings})
    trainer.fit(Logistic(normalise=True), Clients(), ckpt_path=ckpt_path)
    return trainer, outcome(trainer)


if __name__ == "__main__":
    found = {name: run(name, Path(sys.argv[1]), devices=2, enable_checkpointing=False)[1] for name in CASES}
    torch.save(found, Path(sys.argv[1]) / f"rank{torch.distributed.get_rank()}.pt")
