"""Datamodules around another one: without the clients that never train, and with the data of all as one client's."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fedlight.data.arrays import ArrayDataset, in_memory
from fedlight.data.datamodule import Around, FederatedDataModule
from fedlight.seeding import generator

_AS_GIVEN = ("prepare_data", "teardown", "eval_batch_size_on", "val_dataset", "test_dataset", "predict_dataloader")
"""What the other datamodule does itself."""


class Wrapping(Around, FederatedDataModule):
    """Base of datamodules that give the ``data`` of another one, which still divides them, to other clients."""

    _other = "data"

    def __init__(self, data: FederatedDataModule) -> None:
        super().__init__(data.batch_size, data.eval_batch_size, data.num_workers, data.collate_fn, data.seed)
        self.data = data
        for name in _AS_GIVEN:
            setattr(self, name, getattr(data, name))

    def setup(self, stage: str | None = None) -> None:
        """Load the data; only then it may know how batches are made."""
        self.data.setup(stage)
        for name in ("batch_size", "eval_batch_size", "num_workers", "collate_fn", "eval_collate_fn"):
            setattr(self, name, getattr(self.data, name))


class PooledData(Wrapping):
    """One client that has the training data of all clients of another datamodule: for ``trainer.centralized``."""

    num_clients = 1
    _pooled: Dataset[Any] | None = None

    def client_dataset(self, client: int) -> Dataset[Any]:
        """The training data of all clients; there is client 0 only."""
        if client != 0:
            raise IndexError(f"There is no client {client}: pooled data have one.")
        self._pooled = self._pooled or self.data.pooled_dataset()
        return self._pooled

    def partition_counts(self) -> Tensor | None:
        """Samples of each class, ``[1, num_classes]``; None if labels are unknown."""
        counts = self.data.partition_counts()
        return None if counts is None else counts.sum(0, keepdim=True)

    def pooled_dataset(self) -> Dataset[Any]:
        """The training data of all clients."""
        return self.client_dataset(0)


def draw_clients(data: FederatedDataModule) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The clients that train, of which some must be left, and those that ``held_out_clients`` keeps out of it."""
    total, wanted = data.num_clients, data.held_out_clients
    count = max(1, round(wanted * total)) if isinstance(wanted, float) and wanted else int(wanted)
    if count >= total:
        raise ValueError(f"`data.held_out_clients`={wanted} leaves none of {total} clients to train. Lower it.")
    drawn = torch.randperm(total, generator=generator(data.seed, "held_out_clients")).tolist()
    return tuple(sorted(drawn[count:])), tuple(sorted(drawn[:count]))


class HeldOut(Wrapping):
    """The clients of another datamodule without those that its ``held_out_clients`` keeps out of training.

    Those that train are clients ``0 .. num_clients - 1``, in the order that they have in the data, and the new ones
    follow. Which they are is drawn from (``data.seed``, "held_out_clients").
    """

    def setup(self, stage: str | None = None) -> None:
        """Load the data, and draw who is held out."""
        super().setup(stage)
        trained, self.new_clients = draw_clients(self.data)
        self.num_clients, self._clients = len(trained), [*trained, *self.new_clients]

    def client_dataset(self, client: int) -> Dataset[Any]:
        """The training data of a client; of a new one, what it is fine-tuned on."""
        return self.data.client_dataset(self._clients[client])

    def client_size(self, client: int) -> int:
        """n_i."""
        return self.data.client_size(self._clients[client])

    def client_val_dataset(self, client: int) -> Dataset[Any] | None:
        """Held-out data of a client."""
        return self.data.client_val_dataset(self._clients[client])

    def partition_counts(self) -> Tensor | None:
        """Samples of each class of each client that trains, ``[num_clients, num_classes]``."""
        counts = self.data.partition_counts()
        return None if counts is None else counts[self._clients[: self.num_clients]]

    def pooled_dataset(self) -> Any:
        """The training data of the clients that train; of data in memory a view."""
        parts = [in_memory(self.client_dataset(client), self.collate_fn) for client in range(self.num_clients)]
        arrays = [part for part in parts if isinstance(part, ArrayDataset) and part.storage is parts[0].storage]
        if len(arrays) < len(parts):
            return super().pooled_dataset()
        return arrays[0].view(torch.cat([a.positions(torch.arange(len(a))) for a in arrays]), arrays[0].transform)


def training_data(data: FederatedDataModule, centralized: bool) -> FederatedDataModule:
    """What a trainer trains on: the data without the clients that it holds out, as one client's if ``centralized``."""
    data = HeldOut(data) if data.held_out_clients else data
    return PooledData(data) if centralized else data


def given_data(data: Any) -> Any:
    """What :meth:`training_data` was made of."""
    return given_data(data.data) if isinstance(data, Wrapping) else data
