"""Modules and data that train in milliseconds, and a short way to train them."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from fedlight.algorithms import FedAvg
from fedlight.data import DatasetPartition
from fedlight.data.arrays import ArrayDataset
from fedlight.data.datamodule import FederatedDataModule
from fedlight.trainer import FederatedTrainer

SIZES = (5, 12, 8, 3)


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers that depend on the seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Regression(LightningModule):
    """A linear model of three inputs with squared error, the same weights every time.

    Args:
        lr: learning rate of plain SGD.
        net: another network of three inputs and one output.
    """

    def __init__(self, lr: float = 0.1, net: nn.Module | None = None) -> None:
        super().__init__()
        self.save_hyperparameters("lr")
        self.lr = lr
        self.net = nn.Linear(3, 1) if net is None else net
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters()):
                parameter.copy_(seeded(*parameter.shape, seed=i) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[:, 0]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.mse_loss(self(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val/loss", F.mse_loss(self(x), y))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("test/loss", F.mse_loss(self(x), y))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Clients(FederatedDataModule):
    """A linear function with noise, other inputs at every client.

    Args:
        sizes: samples of each client.
        batch_size: samples of a batch.
        dtype: type of inputs and targets.
    """

    def __init__(
        self, sizes: tuple[int, ...] = SIZES, batch_size: int = 4, dtype: torch.dtype = torch.float32, **kwargs: Any
    ) -> None:
        super().__init__(batch_size=batch_size, **kwargs)
        self.num_clients = len(sizes)
        self.datasets: list[Dataset[Any]] = []
        for client, size in enumerate(sizes):
            x = seeded(size, 3, seed=100 + client, dtype=dtype) + client / 4
            self.datasets.append(self.dataset(x, x @ x.new_tensor([1.0, -2.0, 0.5]) + seeded(size, seed=client) / 10))
        x = seeded(10, 3, seed=99, dtype=dtype)
        self.held_out = self.dataset(x, x @ x.new_tensor([1.0, -2.0, 0.5]))

    def dataset(self, x: Tensor, y: Tensor) -> Dataset[Any]:
        return ArrayDataset(x, y.to(x.dtype))

    def client_dataset(self, client: int) -> Dataset[Any]:
        return self.datasets[client]

    def val_dataset(self) -> Dataset[Any]:
        return self.held_out

    def test_dataset(self) -> Dataset[Any]:
        return self.held_out


class Samples(Dataset[tuple[Tensor, Tensor]]):
    """Inputs and targets, read sample by sample."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


class Drawing(Samples):
    """Adds noise of every generator that user code may read to each sample."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = super().__getitem__(index)
        return x + torch.rand(3) + random.random(), y + np.random.rand()


def two_classes(count: int = 40, **settings: Any) -> FederatedDataModule:
    """Four clients with points of two classes; those that all are evaluated on are the same."""
    x = seeded(count, 3)
    data = TensorDataset(x, (x[:, 0] > 0).long())
    return DatasetPartition(data, val=data, **{"test": data, "num_clients": 4, "batch_size": 5, **settings})


def quiet_trainer(folder: Path, **settings: Any) -> FederatedTrainer:
    """A trainer of three rounds with two clients each on the CPU, without progress; a setting may be overridden."""
    defaults: dict[str, Any] = {"max_rounds": 3, "clients_per_round": 2, "accelerator": "cpu", "devices": 1}
    return FederatedTrainer(**{**defaults, "enable_progress_bar": False, "default_root_dir": folder, **settings})


def weights(module: nn.Module) -> Tensor:
    """All parameters and floating-point buffers of a module in one vector."""
    tensors = [*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())]
    return torch.cat([t.detach().reshape(-1) for t in tensors]).clone()


class Keep(FedAvg):
    """FedAvg that keeps the results of every round."""

    def __init__(self):
        super().__init__()
        self.rounds, self._now = [], []

    def client_update(self, received, client, result):
        self._now.append(result)
        return super().client_update(received, client, result)

    def aggregate(self, server, total):
        self.rounds.append(self._now)
        self._now = []
        return super().aggregate(server, total)
