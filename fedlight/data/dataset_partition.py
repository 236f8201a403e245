"""Any torch dataset, divided among clients."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from fedlight.data.arrays import ArrayDataset, in_memory
from fedlight.data.partition import IID, Partitioner
from fedlight.data.partitioned import PartitionedDataModule

_LABELS = ("labels", "label", "targets", "target", "y")


class DatasetPartition(PartitionedDataModule):
    """Any map-style torch datasets; the training data is divided among clients.

    Example::

        data = DatasetPartition(MyText("train"), test=MyText("test"), num_clients=50, partitioner=DirichletClients(0.3))

    What is in memory is read a batch at a time: an ``ArrayDataset``, a ``TensorDataset``, a ``Subset`` of these, and a
    dict or tuple of tensors, which may stand for a dataset. Others are read sample by sample.

    Args:
        train: the training data.
        test: the test data.
        val: the validation data; by default the test data.
        num_clients: N; None for one client per natural group, with ``NaturalGroups``.
        partitioner: which client gets which samples; by default ``IID()``.
        targets: class of each training sample; by default what ``.targets`` or ``.labels`` of the dataset say, the last
            tensor of a ``TensorDataset`` or tuple, or ``labels`` or ``y`` of a dict, through ``Subset`` and
            ``ConcatDataset``.
        groups: natural group of each training sample, for ``NaturalGroups``.
        batch_size: samples of a batch in local training.
        eval_batch_size: samples of a batch in evaluation; by default ``batch_size``.
        num_workers: worker processes of the loaders.
        collate_fn: makes a batch of a list of samples.
        seed: seed of the partition.
    """

    def __init__(
        self,
        train: Dataset,  # type: ignore[type-arg]  # jsonargparse wants the bare class
        test: Dataset | None = None,  # type: ignore[type-arg]
        val: Dataset | None = None,  # type: ignore[type-arg]
        num_clients: int | None = 20,
        partitioner: Partitioner | None = None,
        targets: Sequence[int] | None = None,
        groups: Sequence[int] | None = None,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(num_clients, partitioner or IID(), batch_size, eval_batch_size, num_workers, collate_fn, seed)
        self._train, self._test, self._val = train, test, val if val is not None else test
        self._targets, self._groups = targets, groups
        self._val_targets: Tensor | None = None

    def setup(self, stage: str | None = None) -> None:
        """Find the labels and divide the training data among the clients."""
        if self.partition is not None:
            return
        self._train, self._test, self._val = (
            in_memory(d, self.collate_fn) for d in (self._train, self._test, self._val)
        )
        size = len(self._train)  # type: ignore[arg-type]
        if size == 0:
            raise ValueError("`data.train` is empty.")
        targets = find_targets(self._train) if self._targets is None else _integers(self._targets)
        groups = None if self._groups is None else _integers(self._groups)
        for key, values in (("targets", targets), ("groups", groups)):
            if values is not None and len(values) != size:
                raise ValueError(f"`data.{key}` has {len(values)} entries, but the training data has {size} samples.")
        self._val_targets = None if self._val is None else find_targets(self._val)
        self.divide(size, targets, groups=groups)

    def client_dataset(self, client: int) -> Dataset[Any]:
        """The training data of a client."""
        return _rows(self._train, self.client_rows(client))

    def pooled_dataset(self) -> Dataset[Any]:
        """The training data of all clients."""
        return self._train

    def val_dataset(self) -> Dataset[Any] | None:
        """The validation data, or the test data if there is none."""
        return self._val

    def test_dataset(self) -> Dataset[Any] | None:
        """The test data."""
        return self._test

    def client_val_dataset(self, client: int) -> Dataset[Any] | None:
        """The part of the validation data with the client's class proportions, as in ``ImageData``; None if unknown."""
        if self._val is None or self._val_targets is None:
            return None
        rows = self.held_out_rows(client, self._val_targets)
        return _rows(self._val, rows) if len(rows) else None


def find_targets(dataset: Dataset[Any]) -> Tensor | None:
    """The class of each sample as the dataset itself tells it, ``[n]`` int64; None if it does not."""
    if isinstance(dataset, Subset):
        inner = find_targets(dataset.dataset)
        return None if inner is None else inner[torch.as_tensor(dataset.indices)]
    if isinstance(dataset, ConcatDataset):
        parts = [find_targets(part) for part in dataset.datasets]
        known = [part for part in parts if part is not None]
        return torch.cat(known) if len(known) == len(parts) else None
    if isinstance(dataset, ArrayDataset):
        tree = dataset.storage.build(dataset.storage.leaves)
        names = [name for name in _LABELS if isinstance(tree, dict) and name in tree]
        found: Any = (tree[names[0]] if names else dataset.targets)[dataset.positions(torch.arange(len(dataset)))]
    elif isinstance(dataset, TensorDataset):
        found = dataset.tensors[-1]
    else:
        found = getattr(dataset, "targets", getattr(dataset, "labels", None))
    try:
        return None if found is None else _integers(found)
    except (TypeError, ValueError, RuntimeError):
        return None  # regression, boxes, text: no classes


def _integers(values: Sequence[int] | Tensor) -> Tensor:
    tensor = torch.as_tensor(values).cpu()
    if tensor.ndim != 1 or tensor.is_floating_point() or tensor.is_complex():
        raise ValueError(
            f"Classes and groups are one integer per sample, got {tensor.dtype} of shape {list(tensor.shape)}."
        )
    return tensor.long()


def _rows(dataset: Dataset[Any], rows: Tensor) -> Dataset[Any]:
    if isinstance(dataset, ArrayDataset):
        return dataset.view(dataset.positions(rows), dataset.transform)
    return Subset(dataset, rows.tolist())
