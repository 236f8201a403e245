"""Small networks with a dense Hessian to compare with, and matrices with a chosen spectrum."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.func import functional_call, hessian

from fedlight.analysis import HessianOperator, hessian_operator


class Task(LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("train/loss", loss)
        return loss


class Tied(nn.Module):
    """One square matrix is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))


def cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3))


def group_norm() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (6,)),
    "cnn_max_pooling": (cnn, (2, 6, 6)),
    "group_norm": (group_norm, (2, 6, 6)),
    "tied_weights": (Tied, (4,)),
}


@cache
def case(name: str) -> tuple[Task, Tensor, Tensor, Tensor]:
    """A module in float64, its data (30 samples), and its dense Hessian."""
    build, shape = NETS[name]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        module = Task(build()).double()
        x, y = torch.randn(30, *shape, dtype=torch.float64), torch.randint(0, 3, (30,))
    return module, x, y, dense_hessian(module.net, x, y)


def dense_hessian(net: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Tensor:
    """∇²L by torch.func over the flat vector of parameters; options are those of cross_entropy."""
    named = dict(net.named_parameters())
    lengths = [p.numel() for p in named.values()]

    def loss(flat: Tensor) -> Tensor:
        parts = zip(named, flat.split_with_sizes(lengths), strict=True)
        return F.cross_entropy(functional_call(net, {n: v.view_as(named[n]) for n, v in parts}, (x,)), y, **options)

    return hessian(loss)(torch.cat([p.detach().reshape(-1) for p in named.values()])).detach()


def operator(name: str, batch_size: int = 30, **options: Any) -> HessianOperator:
    module, x, y, _ = case(name)
    batches = list(zip(x.split(batch_size), y.split(batch_size), strict=True))
    return hessian_operator(module, batches, double=True, **options)


class Matrix:
    """A dense symmetric matrix as an operator; it counts its products."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.products = matrix, 0
        self.size, self.dtype, self.device = len(matrix), matrix.dtype, matrix.device

    @classmethod
    def with_spectrum(cls, eigenvalues: list[float], dtype: torch.dtype = torch.float64) -> "Matrix":
        rng = torch.Generator().manual_seed(7)
        size = len(eigenvalues)
        q = torch.linalg.qr(torch.randn(size, size, generator=rng, dtype=torch.float64)).Q
        matrix = (q * torch.tensor(eigenvalues, dtype=torch.float64)) @ q.T
        return cls(((matrix + matrix.T) / 2).to(dtype))

    def matvec(self, vector: Tensor) -> Tensor:
        self.products += 1
        return self.matrix @ vector

    def matmat(self, vectors: Tensor) -> Tensor:
        self.products += vectors.shape[1]
        return self.matrix @ vectors


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
