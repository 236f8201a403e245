"""Small problems that every engine must solve alike."""

from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from fedlight.data.arrays import ArrayDataset
from fedlight.data.augment import BatchTransform
from fedlight.data.datamodule import FederatedDataModule
from fedlight.run.loggers import read_metrics
from fedlight.trainer import FederatedTrainer

EQUAL = (8, 8, 8, 8)
UNEQUAL = (5, 12, 9, 14)
"""With batches of four: two, three and four steps an epoch, and last batches of one, two, four."""


class Images(FederatedDataModule):
    """Random images, augmented; labels depend on them.

    Args:
        sizes: samples of each client.
        batch_size: samples of a batch.
        shared: whether all clients' datasets are views of one storage.
    """

    def __init__(self, sizes: tuple[int, ...] = UNEQUAL, batch_size: int = 4, shared: bool = True) -> None:
        super().__init__(batch_size, eval_batch_size=16)
        rng = torch.Generator().manual_seed(1)
        n = sum(sizes)
        x = torch.randint(0, 256, (n, 1, 6, 6), dtype=torch.uint8, generator=rng)
        y = x.float().mean((1, 2, 3)).argsort().argsort() * 3 // n
        transform = BatchTransform([0.5], [0.3], flip=0.5, crop_padding=1)
        self.num_clients = len(sizes)
        self._all = ArrayDataset(x, y, transform=transform)
        rows = torch.arange(n).split(sizes)
        self._clients = [self._all.view(r, transform) for r in rows]
        if not shared:
            self._clients = [ArrayDataset(x[r], y[r], transform=transform) for r in rows]
        self._val = self._all.view(None, BatchTransform([0.5], [0.3]))

    def client_dataset(self, client: int) -> ArrayDataset:
        return self._clients[client]

    def val_dataset(self) -> ArrayDataset:
        return self._val


class Net(LightningModule):
    """A small network; what it does besides is set by keyword.

    Args:
        optimizer: ``optimizer(params) -> Optimizer``.
        scheduler: ``scheduler(optimizer)``, stepped at ``interval``.
        interval: ``step``, ``epoch`` or ``round``.
        norm: with a BatchNorm layer.
        dropout: probability.
        groups: give biases a parameter group of their own, with twice the learning rate.
    """

    def __init__(self, optimizer=None, scheduler=None, interval="round", norm=False, dropout=0.0, groups=False) -> None:
        super().__init__()
        torch_rng = torch.Generator().manual_seed(2)
        self.conv, self.act1 = nn.Conv2d(1, 3, 3), nn.ReLU()
        self.norm = nn.BatchNorm2d(3) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.fc1, self.act2, self.fc2 = nn.Linear(48, 5), nn.Tanh(), nn.Linear(5, 3)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=torch_rng) / 3)
        self.make = optimizer or (lambda params: torch.optim.SGD(params, lr=0.1))
        self.scheduler, self.interval, self.groups = scheduler, interval, groups

    def forward(self, x: Tensor) -> Tensor:
        a = self.act1(self.norm(self.conv(x)))
        return self.fc2(self.act2(self.fc1(self.dropout(a.flatten(1)))))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        logits = self(x)
        self.log("train/accuracy", (logits.argmax(1) == y).float().mean(), batch_size=len(y))
        self.log("train/largest", logits.max(), reduce_fx="max")
        self.log("train/batches", 1.0, reduce_fx="sum")
        return F.cross_entropy(logits, y)

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        x, y = batch
        self.log("val/loss", F.cross_entropy(self(x), y))

    def configure_optimizers(self):
        params = list(self.parameters())
        if self.groups:
            biases = [p for p in params if p.ndim == 1]
            params = [{"params": [p for p in params if p.ndim > 1]}, {"params": biases, "lr": 0.25}]
        optimizer = self.make(params)
        if self.scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.scheduler(optimizer), "interval": self.interval},
        }


class Recurrent(Net):
    """With dropout between two recurrent layers, which cuDNN draws."""

    def __init__(self, **settings) -> None:
        super().__init__(**settings)
        self.rnn = nn.LSTM(6, 6, num_layers=2, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.rnn(x[:, 0])[0][:, None])


def train(root: Path, engine, net: dict | None = None, data: dict | None = None, **settings):
    """Train for two rounds in float64; all that the server knows afterwards, and the rows of ``metrics.csv``."""
    defaults = {
        "max_rounds": 2,
        "clients_per_round": 4,
        "local_epochs": 2,
        "accelerator": "cpu",
        "devices": 1,
        "precision": "64-true",
        "default_root_dir": root,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
    }
    if "local_steps" in settings:
        del defaults["local_epochs"]
    trainer = FederatedTrainer(engine=engine, **{**defaults, **settings})
    trainer.fit(Net(**(net or {})), Images(**(data or {})))
    federation = trainer._session.federation
    state = federation.state
    out = {f"server/{k}": v for k, v in state.algorithm.items()} | {f"view/{k}": v for k, v in state.views.items()}
    out |= {f"perturbation/{k}": v for k, v in state.perturbation.items()}
    out |= {f"buffers/{k}": v for k, v in state.buffers.items()}
    for client in federation.store.clients():
        for part in ("algorithm", "perturbation", "latest"):
            out |= {f"{client}/{part}/{k}": v for k, v in (federation.store.get(client, part) or {}).items()}
    rows = read_metrics(trainer.run_dir / "metrics.csv")
    kept = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]
    return {k: v.clone() for k, v in out.items()}, kept
