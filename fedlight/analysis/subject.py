"""What an analysis takes from a trainer: a model, its data, and the processes that share the work."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Subset, sampler
from torch.utils.data.distributed import DistributedSampler

from fedlight.analysis.hessian import hessian_operator
from fedlight.analysis.memory import free_memory
from fedlight.analysis.operators import HessianOperator
from fedlight.analysis.task import TaskLoss
from fedlight.module.parameters import load_flat_parameters, load_tensors
from fedlight.seeding import seed_global_rng

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

DataName = Literal["train", "val", "clients"]
Weights = tuple[Tensor, dict[str, Tensor]]
"""Flat parameters ``[P]`` and buffers."""
_EVENLY = sampler.RandomSampler, sampler.SequentialSampler, DistributedSampler
"""What draws every row equally often."""


@dataclass(frozen=True)
class Subject:
    """A model with its data.

    Attributes:
        module: the model.
        device: where to compute.
        train: gives the training data of all clients.
        val: gives the validation data, or None.
        clients: gives the training data of each client that has any; None where there are no clients.
        weights: parameters and buffers by view; empty where the module holds what is to be measured.
        transfer: moves a batch to the device.
        collate_fn: makes a batch of samples of training data.
        val_collate_fn: the same of validation data.
        rank: of this process.
        world_size: processes that share the data.
        operator: makes the Hessian where the data are elsewhere, of a task loss, the view, samples and seed.
    """

    module: LightningModule
    device: torch.device
    train: Callable[[], Dataset[Any]]
    val: Callable[[], Dataset[Any] | None]
    transfer: Callable[[Any], Any]
    clients: Callable[[], dict[int, Dataset[Any]]] | None = None
    weights: dict[str, Weights] = field(default_factory=dict)
    collate_fn: Callable[[list[Any]], Any] | None = None
    val_collate_fn: Callable[[list[Any]], Any] | None = None
    rank: int = 0
    world_size: int = 1
    operator: Callable[[TaskLoss, str, int | None, int], HessianOperator] | None = None

    def loss(self, view: str = "server", double: bool = False) -> TaskLoss:
        """The task loss at the weights of a view, on a copy of the module."""
        loss = TaskLoss(self.module, torch.float64 if double else torch.float32, self.device)
        if view in self.weights:
            params, buffers = self.weights[view]
            load_flat_parameters(loss.module, params)
            load_tensors(loss.module, buffers)
        return loss

    def data(self, name: DataName) -> Dataset[Any] | None:
        """The data that the model's own figures are measured on: for ``clients`` the training data of all of them."""
        return self.val() if name == "val" else self.train()

    def total(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes, the same bits in each."""
        value = value.clone()
        torch.distributed.all_reduce(value)
        return value

    def reading(self, name: DataName) -> dict[str, Any]:
        """Arguments of the analyses: how batches are made of samples."""
        return {"transfer": self.transfer, "collate_fn": self.val_collate_fn if name == "val" else self.collate_fn}

    def options(self, name: DataName, max_samples: int | None, seed: int) -> dict[str, Any]:
        """Arguments of the analyses: how batches are drawn and read, and how processes share the work."""
        out = {"max_samples": max_samples, "seed": seed, **self.reading(name)}
        if self.world_size > 1:
            out |= {"rank": self.rank, "world_size": self.world_size, "reduce": self.total}
            if self.device.type == "cpu":  # the processes share the machine's memory
                out["graph_memory"] = free_memory(self.device) // (4 * self.world_size)
        return out

    def hessian(
        self, data: DataName, view: str, max_samples: int | None, double: bool, seed: int
    ) -> tuple[TaskLoss, HessianOperator]:
        """The loss and its Hessian at the weights of a view; every process has its share of the data."""
        seed_global_rng(seed)  # for a dataset that draws when it is read
        loss = self.loss(view, double)
        if self.operator is not None:
            return loss, self.operator(loss, view, max_samples, seed)
        options = self.options(data, max_samples, seed)
        return loss, hessian_operator(loss.module, self.data(data), loss=loss, **options)


def is_federated(trainer: Any) -> bool:
    """Whether a trainer is fedlight's, and not a stock one of Lightning."""
    return hasattr(trainer, "current_round")


def output_folder(trainer: Any) -> Path | None:
    """Where a run's files go; None where it writes none. Every process must call it."""
    if is_federated(trainer):
        return None if trainer.run_dir is None else Path(trainer.run_dir)
    return Path(trainer.log_dir) if trainer.loggers and trainer.log_dir is not None else None


def subject_of(trainer: Any, module: LightningModule) -> Subject:
    """What either kind of trainer trains."""
    return federated_subject(trainer) if is_federated(trainer) else plain_subject(trainer, module)


def federated_subject(trainer: Any) -> Subject:
    """The server's model, the selected clients' and the mean of all, with the clients' data."""
    data, federation = trainer.datamodule, trainer.federation
    state = federation.state
    views = state.views
    if trainer.state.fn == "fit" and not trainer.views.is_last:  # swa may come yet
        views = dict.fromkeys(federation.views, views["server"]) | views
    return Subject(
        module=trainer.lightning_module,
        device=trainer.strategy.root_device,
        train=data.pooled_dataset,
        val=data.val_dataset,
        clients=lambda: {c: data.client_dataset(c) for c in range(data.num_clients) if data.client_size(c)},
        weights={view: (params, state.buffers) for view, params in views.items()},
        transfer=trainer.evaluator.transfer,
        collate_fn=data.collate_fn,
        val_collate_fn=data.eval_collate_fn,
        rank=trainer.global_rank,
        world_size=trainer.world_size,
        operator=getattr(trainer, "remote_operator", None),
    )


def plain_subject(trainer: "Trainer", module: LightningModule) -> Subject:
    """The module of a stock Lightning Trainer, with the datasets behind its loaders."""

    def transfer(batch: Any) -> Any:
        """As Lightning's evaluation does: hooks, which a datamodule may have too, may augment in training."""
        before = trainer.state.stage, module.training
        trainer.validating, module.training = True, False
        try:
            batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
            return trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        finally:
            trainer.state.stage, module.training = before

    def only(loaders: Any) -> Any:
        return loaders[0] if isinstance(loaders, list | tuple) and len(loaders) == 1 else loaders

    def dataset(loader: Any, key: str) -> Dataset[Any]:
        if not isinstance(loader, DataLoader):
            found = f"found {type(loader).__name__}. Give measure_hessian a list of batches after training instead."
            raise MisconfigurationException(f"`data: {key}` needs one DataLoader, {found}")
        if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
            raise MisconfigurationException(
                f"`data: {key}` needs a dataset of numbered samples of which its DataLoader makes batches, found"
                f" {type(loader.dataset).__name__}. Give measure_hessian a list of batches after training instead."
            )
        batches: Any = loader.batch_sampler
        order = batches.sampler if type(batches) is BatchSampler else batches
        order = getattr(getattr(order, "dataset", None), "_sampler", order)  # in DDP
        rows = getattr(order, "indices", order if hasattr(order, "__getitem__") else None)
        if rows is None and not isinstance(order, _EVENLY):
            what = f"every row counts once in it, however often {type(order).__name__} draws it"
            rank_zero_warn(f"`data: {key}`: {what}. To weigh them so, give measure_hessian a list of its batches.")
        return loader.dataset if rows is None else Subset(loader.dataset, sorted({*map(int, tree_leaves([*rows]))}))

    train, val = trainer.train_dataloader, only(trainer.val_dataloaders)
    return Subject(
        module=module,
        device=trainer.strategy.root_device,
        train=lambda: dataset(train, "train"),
        val=lambda: dataset(val, "val") if trainer.val_dataloaders else None,
        transfer=transfer,
        collate_fn=getattr(train, "collate_fn", None),
        val_collate_fn=getattr(val, "collate_fn", None),
        rank=trainer.global_rank,
        world_size=trainer.world_size,
    )
