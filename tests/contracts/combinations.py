"""Every algorithm with every perturbation and penalty that it can have, found by discovery, on a tiny problem."""

from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor, nn
from torch.nn import functional as F

import fedlight.algorithms
from fedlight.algorithms.base import Algorithm
from fedlight.data.arrays import ArrayDataset
from fedlight.data.datamodule import FederatedDataModule
from fedlight.penalties.man import MAN
from fedlight.perturbations import ASAM, SAM, Perturbation
from fedlight.plugins import discover
from fedlight.server.sampling import Sampler
from fedlight.trainer import FederatedTrainer

ALGORITHMS = discover(fedlight.algorithms, Algorithm)
PERTURBATIONS: dict[str, type[Perturbation] | None] = {"none": None, "SAM": SAM, "ASAM": ASAM}
SIZES = (3, 10, 14, 6, 11)
"""No batch of four leaves a last one of a single sample, which BatchNorm refuses."""


@dataclass(frozen=True)
class Combination:
    """One row of the contract's table."""

    algorithm: str
    perturbation: str
    penalty: str

    def __str__(self):
        return f"{self.algorithm}-{self.perturbation}-{self.penalty}"

    @property
    def alone(self) -> bool:
        """Whether there is no perturbation beside the algorithm."""
        return self.perturbation == "none"

    @property
    def quick(self) -> bool:
        """Whether every run of the tests has it: each algorithm with SAM and MAN, and some with less.

        The twins and identities of ``tests/algorithms`` train with every algorithm alone.
        """
        own = ALGORITHMS[self.algorithm]().perturbation is not None
        all_of_it = self.penalty == "MAN" and (own or self.perturbation == "SAM")
        alone = self.alone and self.algorithm in ("SCAFFOLD", "FedDyn", "FedOpt", "FedVARP", "MOON")
        return all_of_it or alone or self.algorithm == "FedAvg"


def combinations() -> list[Combination]:
    """All that can be combined: an algorithm that brings a perturbation of its own takes no other."""
    return [
        Combination(name, perturbation, penalty)
        for name, cls in ALGORITHMS.items()
        for perturbation in (PERTURBATIONS if cls().perturbation is None else ("none",))
        for penalty in ("plain", "MAN")
    ]


class Logistic(LightningModule):
    """Multinomial logistic regression: convex, also with MAN on its logits.

    Args:
        normalise: put a BatchNorm layer before it, for algorithms that treat such layers.
        optimizer: what it is trained with.
    """

    def __init__(self, normalise: bool = False, optimizer: type[torch.optim.Optimizer] = torch.optim.SGD) -> None:
        super().__init__()
        self.optimizer = optimizer
        rng = torch.Generator().manual_seed(3)
        self.normalise = nn.BatchNorm1d(4) if normalise else nn.Identity()
        self.logits = nn.Linear(4, 3)
        with torch.no_grad():
            self.logits.weight.copy_(torch.randn(3, 4, generator=rng) / 2)
            self.logits.bias.zero_()

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.logits(self.normalise(x)), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters(), lr=0.1)  # type: ignore[call-arg]


class Clients(FederatedDataModule):
    """Linear classes, other inputs at every client.

    Attributes:
        asked: clients whose data was asked for in training; before it, a few are looked at.
    """

    def __init__(self, sizes: tuple[int, ...] = SIZES) -> None:
        super().__init__(batch_size=4)
        rng = torch.Generator().manual_seed(5)
        self.sizes, self.num_clients = sizes, len(sizes)
        owner = torch.repeat_interleave(torch.tensor(sizes))
        x = torch.randn(len(owner), 4, generator=rng) + torch.randn(len(sizes), 4, generator=rng)[owner]
        y = (x @ torch.randn(4, 3, generator=rng)).argmax(1)
        self._all = ArrayDataset(x, y)
        self._rows = torch.arange(len(owner)).split(sizes)
        self.asked: set[int] = set()

    def client_size(self, client: int) -> int:
        return self.sizes[client]

    def client_dataset(self, client: int) -> ArrayDataset:
        self.asked.add(client)
        return self._all.view(self._rows[client], None)

    def loss(self, model: LightningModule) -> float:
        """The mean training loss over all clients' samples."""
        with torch.no_grad():
            return float(model.training_step((self._all.inputs, self._all.targets)))


class Listed(Sampler):
    """Samples the clients that it was told to."""

    def __init__(self, *rounds: tuple[int, ...]) -> None:
        self.rounds = rounds

    def sample(self, round: int, rng: torch.Generator) -> list[int]:
        return list(self.rounds[round])


ROUNDS = ((0, 2, 3), (1, 3))
"""Client 4 is never sampled."""


def model_for(combination: Combination) -> LightningModule:
    """The convex model; with BatchNorm, or another optimizer, for algorithms that ask for it."""
    algorithm = ALGORITHMS[combination.algorithm]
    return Logistic(algorithm.buffers == "local", (*algorithm.optimizers, torch.optim.SGD)[0])


def trainer_for(combination: Combination, root: Path, rounds=ROUNDS, **settings) -> FederatedTrainer:
    """A trainer with the combination's parts."""
    perturbation = PERTURBATIONS[combination.perturbation]
    defaults = {
        "max_rounds": len(rounds),
        "clients_per_round": 1,
        "sampler": Listed(*rounds),
        "accelerator": "cpu",
        "devices": 1,
        "engine": "eager",
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "enable_plots": False,
        "client_val_every_n_rounds": 0,
        "default_root_dir": root,
        "name": str(combination),
        "callbacks": [MAN(0.1, layers=["logits"])] if combination.penalty == "MAN" else [],
    }
    return FederatedTrainer(
        algorithm=ALGORITHMS[combination.algorithm](),
        perturbation=None if perturbation is None else perturbation(),
        **{**defaults, **settings},
    )


def outcome(trainer: FederatedTrainer) -> dict[str, Tensor]:
    """All that the server knows after a run, and every client's rows."""
    federation = trainer._session.federation
    state = federation.state
    out = {f"server/{k}": v for k, v in state.algorithm.items()}
    out |= {f"perturbation/{k}": v for k, v in state.perturbation.items()}
    out |= {f"buffers/{k}": v for k, v in state.buffers.items()} | {f"views/{k}": v for k, v in state.views.items()}
    for client in federation.store.clients():
        for part in ("algorithm", "perturbation", "personal", "latest", "last_update", "buffers"):
            row = federation.store.get(client, part) or {}
            out |= {f"client/{client}/{part}/{k}": v for k, v in row.items()}
    return {k: v.clone() for k, v in out.items()}


def run(combination: Combination, root: Path, data: Clients | None = None, ckpt_path=None, **settings):
    """Train; returns the trainer, the module and the data."""
    data = data or Clients()
    model = model_for(combination)
    trainer = trainer_for(combination, root, **settings)
    trainer.callbacks.append(LambdaCallback(on_train_start=lambda *_: data.asked.clear()))
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return trainer, model, data
