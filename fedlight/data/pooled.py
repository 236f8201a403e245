"""The data of all clients in one place: central training as the upper line of a study."""

from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from fedlight.data.datamodule import FederatedDataModule


class Wrapping(FederatedDataModule):
    """Base of datamodules that give the data of another one to other clients.

    Args:
        data: the datamodule; its own :meth:`setup` still divides the data.
    """

    def __init__(self, data: FederatedDataModule) -> None:
        super().__init__(data.batch_size, data.eval_batch_size, data.num_workers, data.collate_fn, data.seed)
        self.data = data
        for name in (
            "prepare_data",
            "teardown",
            "eval_batch_size_on",
            "val_dataset",
            "test_dataset",
            "predict_dataloader",
        ):
            setattr(self, name, getattr(data, name))  # as the other datamodule does it

    def setup(self, stage: str | None = None) -> None:
        """Load the data; only then it may know how batches are made."""
        self.data.setup(stage)
        for name in ("batch_size", "eval_batch_size", "num_workers", "collate_fn", "eval_collate_fn"):
            setattr(self, name, getattr(self.data, name))


class PooledData(Wrapping):
    """One client that has the training data of all clients of another datamodule.

    This is what ``trainer.centralized`` trains on.

    Args:
        data: the datamodule whose clients are pooled.
    """

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
