"""A dataset in one place, divided among clients."""

from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import Subset

from fedlight.checks import check_objects, check_whole
from fedlight.data.arrays import ArrayDataset
from fedlight.data.datamodule import FederatedDataModule
from fedlight.data.partition import NaturalGroups, Partitioner, apportion, by_client, rows_by_class
from fedlight.seeding import generator


class Partition:
    """Each client's rows ``[n_i]``, in one vector of all and where each client's begin. Cheap for 100,000 clients."""

    def __init__(self, parts: list[Tensor]) -> None:
        self.sizes = torch.tensor([len(part) for part in parts])
        self.rows = torch.cat(parts)
        self._ends = self.sizes.cumsum(0)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, client: int) -> Tensor:
        if not 0 <= client < len(self):
            raise IndexError(f"There is no client {client}; there are {len(self)}.")
        end = int(self._ends[client])
        return self.rows[end - int(self.sizes[client]) : end]

    def counts(self, labels: Tensor, num_labels: int) -> Tensor:
        """How often each label occurs at each client, ``[N, num_labels]``; ``labels`` has one entry per row."""
        clients = torch.repeat_interleave(torch.arange(len(self)), self.sizes)
        flat = torch.bincount(clients * num_labels + labels[self.rows], minlength=len(self) * num_labels)
        return flat.view(len(self), num_labels)


def match_proportions(counts: Tensor, labels: Tensor, rng: torch.Generator) -> Partition:
    """Divide held-out rows among clients so that each has its training data's proportions.

    The rows of a label go to the clients in proportion to how many training samples of that label each has, to the
    nearest row. Rows of a label that no client has are left out; a client with few samples may get none. ``counts`` are
    the training samples of each label at each client, ``[N, C]``, and ``labels`` those of the held-out rows.
    """
    shuffled, sizes = rows_by_class(labels, rng)
    rows, owners = [shuffled[:0]], [shuffled[:0]]
    for label, held in enumerate(torch.split(shuffled, sizes.tolist())):
        clients = torch.randperm(len(counts), generator=rng)
        if label < counts.shape[1] and (weights := counts[clients, label]).sum() > 0:
            rows.append(held)
            owners.append(torch.repeat_interleave(clients, apportion(len(held), weights)))
    return Partition(by_client(torch.cat(rows), torch.cat(owners), len(counts)))


class PartitionedDataModule(FederatedDataModule):
    """Base of datamodules that hold all data in one place and divide it among clients.

    A subclass sets ``_train`` (and ``_val``, ``_test``, and ``_strata`` where labels are known) in ``setup``, and
    calls :meth:`divide` once.

    Args:
        num_clients: N; None for one client per natural group, with ``NaturalGroups``.
        partitioner: which client gets which samples.
        batch_size: samples of a batch in local training.
        *others: what else :class:`~fedlight.data.FederatedDataModule` takes.
        **more: the same by name; ``seed`` is that of the partition.

    Attributes:
        partition: the rows of each client; None before ``setup``.
        num_classes: C; None before ``setup`` or where labels are unknown.
    """

    def __init__(
        self, num_clients: int | None, partitioner: Partitioner, batch_size: int = 32, *others: Any, **more: Any
    ) -> None:
        super().__init__(batch_size, *others, **more)
        if num_clients is not None:
            self.num_clients = check_whole("`data.num_clients`", num_clients)
        elif not isinstance(partitioner, NaturalGroups):
            raise ValueError("`data.num_clients` may be null only with `data.partitioner: NaturalGroups`.")
        check_objects({"data.partitioner": partitioner})
        self.partitioner = partitioner
        self.partition: Partition | None = None
        self.num_classes: int | None = None
        self._train: Any = None
        self._val: Any = None
        self._test: Any = None
        self._strata: tuple[Tensor, Tensor] | None = None  # classes, or finer labels, of training and validation data
        self._counts: Tensor | None = None
        self._held_out: Partition | None = None

    def divide(
        self, num_samples: int, targets: Tensor | None, num_classes: int | None = None, groups: Tensor | None = None
    ) -> None:
        """Draw the partition of ``num_samples`` training samples.

        Args:
            num_samples: n.
            targets: their classes ``[n]``, or None if these are unknown.
            num_classes: C; by default one more than the largest target.
            groups: their natural groups ``[n]``, if there are any.

        Raises:
            ValueError: if the partitioner needs labels and there are none, or cannot do what is asked.
        """
        if targets is None and self.partitioner.needs_labels:
            raise ValueError(
                f"`data.partitioner: {type(self.partitioner).__name__}` needs the class of each sample; "
                "give `data.targets`, or a dataset with `.targets` or `.labels`, or choose one that needs none, as IID."
            )
        targets = self._classes(targets, num_classes)
        if not hasattr(self, "num_clients"):
            self.num_clients = 1 if groups is None else len(torch.unique(groups))
        labels = torch.zeros(num_samples, dtype=torch.int64) if targets is None else targets
        parts = self.partitioner(labels, self.num_clients, generator(self.seed, "partition"), groups)
        self.partition, self._held_out, self._counts = Partition(parts), None, None
        if targets is not None:
            self.num_classes = num_classes or 1 + int(targets.max())
            self._counts = self.partition.counts(targets, self.num_classes)

    def _classes(self, targets: Tensor | None, num_classes: int | None) -> Tensor | None:
        """The targets if they number classes; what else they are, as an integer to regress, is not counted by class."""
        if targets is None or not len(targets):
            return targets
        low, high, count = int(targets.min()), int(targets.max()), len(torch.unique(targets))
        if low >= 0 and (num_classes is not None or high < max(1000, 100 * count)):
            return targets
        row, why = (targets.argmin(), "below 0") if low < 0 else (targets.argmax(), f"and there are {count} labels")
        text = f"`data.targets`: sample {int(row)} has label {int(targets[row])}, {why}"
        if self.partitioner.needs_labels:
            way_out = "Number them so, leave out samples without one, or choose `data.partitioner: IID`."
            raise ValueError(f"{text}: {type(self.partitioner).__name__} needs classes 0, 1, ... {way_out}")
        rank_zero_info(f"{text}: they number no classes, so nothing is counted or held out by class.")
        self._strata = None
        return None

    def stratify(self, targets: tuple[Tensor, Tensor] | None, groups: tuple[Tensor, Tensor] | None = None) -> None:
        """Say by what the validation data is divided among clients: a natural client has its own group's.

        Args:
            targets: classes of the training and of the validation data, or None if these are unknown.
            groups: their natural groups, if there are any.
        """
        self._strata = targets
        if groups is None:
            return
        known = torch.isin(groups[1], groups[0])
        if isinstance(self.partitioner, NaturalGroups) and bool(known.any()):
            names, rows = torch.unique(groups[0]), torch.nonzero(known).flatten()
            own, rng = torch.searchsorted(names, groups[1][known]), generator(self.seed, "client validation")
            parts = self.partitioner.deal(own, self.num_clients, rng, self.num_clients // len(names))
            self._held_out = Partition([rows[part] for part in parts])
        elif targets and isinstance(self.partitioner, NaturalGroups):
            rank_zero_info("data: no held-out sample is of a client that trains; each gets some of its classes.")
        elif targets and bool(torch.isin(groups[0], groups[1]).all()):
            classes = 1 + max(int(t.max()) for t in targets)
            self._strata = groups[0] * classes + targets[0], groups[1] * classes + targets[1]

    def client_rows(self, client: int) -> Tensor:
        """The rows of a client in the training data, ``[n_i]``."""
        if self.partition is None:
            raise RuntimeError(f"{type(self).__name__}.setup() comes before anything else.")
        return self.partition[client]

    def client_size(self, client: int) -> int:
        """n_i, the number of training samples of a client."""
        return len(self.client_rows(client))

    def partition_counts(self) -> Tensor | None:
        """Samples of each class of each client, ``[num_clients, num_classes]`` int64; None if labels are unknown."""
        return self._counts

    def client_dataset(self, client: int) -> Any:
        """The training data of a client; of data in memory a view."""
        return _rows(self._train, self.client_rows(client))

    def pooled_dataset(self) -> Any:
        """The training data of all clients."""
        return self._train

    def val_dataset(self) -> Any:
        """The validation data, or the test data if there is none."""
        return self._val

    def test_dataset(self) -> Any:
        """The test data."""
        return self._test

    def client_val_dataset(self, client: int) -> Any:
        """The part of the validation data that has the class proportions of the client's own training data.

        The samples of each class are divided among the clients in proportion to how many training samples of that class
        each has (of that class and natural group, where the validation data has the same groups); a natural client has
        those of its group. So no sample is shared, evaluating all clients reads the validation data once, and the same
        seed gives the same samples. None for a client that is too small to get any, and where classes are unknown.
        """
        if self.partition is not None and self._strata is not None and self._held_out is None:
            counts = self.partition.counts(self._strata[0], 1 + int(self._strata[0].max()))
            self._held_out = match_proportions(counts, self._strata[1], generator(self.seed, "client validation"))
        rows = torch.zeros(0) if self._held_out is None else self._held_out[client]
        return _rows(self._val, rows) if len(rows) else None


def _rows(dataset: Any, rows: Tensor) -> Any:
    if isinstance(dataset, ArrayDataset):
        return dataset.view(dataset.positions(rows), dataset.transform)
    return Subset(dataset, rows.tolist())
