"""The interface between data and training: every client's dataset, those for validation and test."""

import math
import mmap
import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.serialization import set_default_mmap_options
from torch.utils._pytree import tree_leaves
from torch.utils.data import ConcatDataset, DataLoader, Dataset, default_collate

from fedlight.checks import check_whole
from fedlight.data.arrays import ArrayDataset, in_memory
from fedlight.seeding import generator
from fedlight.written import Remembers


class FederatedDataModule(Remembers, LightningDataModule):
    """Client i's dataset, and datasets for validation and test.

    A subclass loads and partitions its data in :meth:`setup`, sets ``num_clients`` and returns datasets from
    :meth:`client_dataset` and whichever of the others it has. Any map-style torch dataset will do; what is in memory
    (:func:`~fedlight.data.arrays.in_memory`) is read a batch at a time, and so much faster.

    The pooled data of all clients is there as ordinary loaders, so the same datamodule works in a plain
    ``lightning.pytorch.Trainer``: the central baseline.

    Args:
        batch_size: samples of a batch in local training.
        eval_batch_size: samples of a batch in evaluation; by default ``batch_size``.
        num_workers: worker processes of the loaders of datasets that are read sample by sample.
        collate_fn: makes a batch of a list of samples, for datasets that are read sample by sample.
        seed: seed of the order (and augmentation) of the pooled training data in a plain ``Trainer``.
        held_out_clients: clients that never train, a number or a fraction of all: the model is evaluated on their data
            as new ones, after ``trainer.personal``'s fine-tuning where there is one.

    Attributes:
        num_clients: N; valid after :meth:`setup`.
        new_clients: in a fit the clients that never train, by their number in the data; there they follow the N others.
    """

    num_clients: int
    held_out_clients: int | float = 0
    new_clients: Sequence[int] = ()

    def __init__(
        self,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        seed: int = 0,
        held_out_clients: int | float = 0,
    ) -> None:
        super().__init__()
        self.batch_size = self.eval_batch_size = check_whole("`data.batch_size`", batch_size)
        if eval_batch_size is not None:
            self.eval_batch_size = check_whole("`data.eval_batch_size`", eval_batch_size)
        self.num_workers, self.collate_fn, self.eval_collate_fn, self.seed = num_workers, collate_fn, collate_fn, seed
        self.held_out_clients = held = held_out_clients
        if isinstance(held, bool) or not 0 <= held < (1 if held % 1 else math.inf):
            raise ValueError(f"`data.held_out_clients`={held} must be a number of clients, or a fraction below 1.")

    def eval_batch_size_on(self, device: torch.device) -> int:
        """Samples of a batch in evaluation on a device: ``eval_batch_size``, unless a subclass knows better.

        It must not depend on the number of processes, which share the batches and give the same bits.
        """
        return self.eval_batch_size

    def setup(self, stage: str | None = None) -> None:
        """Load and partition the data. Called by every process and more than once; only the first call does work."""

    def client_dataset(self, client: int) -> Dataset[Any]:
        """The training data of client ``client``, of ``0 .. num_clients - 1``."""
        raise NotImplementedError(f"{type(self).__name__} must define client_dataset(client).")

    def client_size(self, client: int) -> int:
        """n_i, the number of training samples of a client."""
        return len(in_memory(self.client_dataset(client)))

    def val_dataset(self) -> Dataset[Any] | None:
        """What the model is evaluated on while it trains, or None."""
        return None

    def test_dataset(self) -> Dataset[Any] | None:
        """What the final model is evaluated on, or None."""
        return None

    def client_val_dataset(self, client: int) -> Dataset[Any] | None:
        """Held-out data with a client's own distribution, for accuracy per client; None where there is none."""
        return None

    def partition_counts(self) -> Tensor | None:
        """Samples of each class of each client, ``[num_clients, num_classes]`` int64; None if labels are unknown."""
        return None

    def pooled_dataset(self) -> Dataset[Any]:
        """The training data of all clients."""
        return ConcatDataset([self.client_dataset(client) for client in range(self.num_clients)])

    def train_dataloader(self) -> DataLoader[Any]:
        """The pooled training data, shuffled and augmented: for a plain ``Trainer``."""
        dataset, rng = self.pooled_dataset(), generator(self.seed, "pooled order")
        if isinstance(dataset, ArrayDataset):
            dataset = _Augmented(dataset, self.seed)
        reading: dict[str, Any] = {"num_workers": self.num_workers, "collate_fn": self.collate_fn}
        return DataLoader(dataset, self.batch_size, shuffle=True, generator=rng, **reading)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The validation data: for a plain ``Trainer``."""
        return self._eval_dataloader(self.val_dataset())

    def test_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The test data: for a plain ``Trainer``."""
        return self._eval_dataloader(self.test_dataset())

    def predict_dataloader(self) -> DataLoader[Any] | list[Any]:
        """What is predicted: the test data, unless a subclass says otherwise."""
        return self.test_dataloader()

    def _eval_dataloader(self, dataset: Dataset[Any] | None) -> DataLoader[Any] | list[Any]:
        if dataset is None:
            return []
        reading: dict[str, Any] = {"num_workers": self.num_workers, "collate_fn": self.eval_collate_fn}
        return DataLoader(dataset, batch_size=self.eval_batch_size, **reading)


def set_up(data: FederatedDataModule, stage: str | None) -> None:
    """Set up a datamodule, whose number of clients may be a whole one of any type.

    Raises:
        ValueError: if it is none.
    """
    data.setup(stage)
    found: Any = getattr(data, "num_clients", None)
    found = found.item() if hasattr(found, "item") else found
    if isinstance(found, float) and found.is_integer():
        data.num_clients = found = int(found)
    check_whole(f"data: {type(data).__name__}.num_clients", found)


def class_counts(data: FederatedDataModule) -> Tensor | None:
    """A datamodule's ``partition_counts`` as a tensor ``[num_clients, num_classes]`` int64; it may give an array.

    Raises:
        MisconfigurationException: if it has no row for each client.
    """
    found = data.partition_counts()
    counts = None if found is None else torch.as_tensor(found).long()
    if counts is not None and (counts.ndim != 2 or len(counts) != data.num_clients):
        what = f"{list(counts.shape)}; it must be [{data.num_clients} clients, classes]"
        raise MisconfigurationException(f"data: {type(data).__name__}.partition_counts() has the shape {what}.")
    return counts


def first_samples(datamodule: FederatedDataModule, client: int, count: int, start: int = 0) -> Any:
    """A batch of a client's first samples, from ``start`` on.

    Raises:
        MisconfigurationException: if they hold NaN or infinity.
    """
    dataset = in_memory(datamodule.client_dataset(client), datamodule.collate_fn)
    rows = list(range(start, min(start + count, len(dataset))))
    if isinstance(dataset, ArrayDataset):
        batch: Any = dataset.batch(torch.tensor(rows, device=dataset.device))
    else:
        try:
            batch = (datamodule.collate_fn or default_collate)([dataset[i] for i in rows])
        except Exception as error:
            raise MisconfigurationException(
                f"data: client {client}'s samples {start} to {rows[-1]} make no batch: {type(error).__name__}: {error}."
                " They need one shape, of numbers, arrays or tensors; or give a collate_fn."
            ) from error
    if not all(v.isfinite().all() for v in tree_leaves(batch) if isinstance(v, Tensor)):
        raise MisconfigurationException(f"data: the first samples of client {client} hold NaN or infinity.")
    return batch


class _Augmented(ArrayDataset):
    """A dataset whose batches are augmented as a loader reads them."""

    def __init__(self, dataset: ArrayDataset, seed: int) -> None:
        self._set(dataset.storage, dataset.indices, dataset.transform)
        self._seed = seed
        self._generators: dict[int, torch.Generator] = {}

    def __getitems__(self, indices: list[int], draws: dict[str, Tensor] | None = None) -> list[Any]:
        worker = torch.utils.data.get_worker_info()
        # A worker's seed differs from epoch to epoch and comes from the loader's own generator.
        key = 0 if worker is None else worker.seed
        rng = self._generators.setdefault(key, generator(self._seed, "pooled augmentation", key))
        return super().__getitems__(indices, self.draw(len(indices), rng))


class Around:
    """Base of datamodules around another one: names that they have not are the other's, as modules may read them."""

    _other: str

    def __getattr__(self, name: str) -> Any:
        other = None if name.startswith("_") else vars(self).get(self._other)
        if other is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(other, name)

    @property
    def hparams(self) -> Any:
        """The other's."""
        return vars(self)[self._other].hparams


def share_among_processes(fabric: Fabric, data: FederatedDataModule) -> int:
    """Let the processes of each machine hold once what the datasets of a datamodule store in memory.

    The first process of a machine writes the tensors to a file in the folder for temporary files, and all of them map
    it into their memory in place of their own copy. The file has no name any more when this returns.

    Shared are the first client's, the validation and the test dataset, and so what else is a view of their storage,
    where they are in memory. Every process must call it, with data that are the same. Returned are the bytes.
    """
    if fabric.world_size == 1:
        return 0
    datasets = [in_memory(dataset, data.eval_collate_fn) for dataset in (data.val_dataset(), data.test_dataset())]
    datasets = [in_memory(data.client_dataset(0), data.collate_fn), *datasets]
    storages = list({id(d.storage): d.storage for d in datasets if isinstance(d, ArrayDataset)}.values())
    tensors = [tensor for storage in storages for tensor in storage.leaves]
    layout = [(str(t.dtype), tuple(t.shape)) for t in tensors]
    path = _write(tensors) if fabric.local_rank == 0 else None
    everyone: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(everyone, (fabric.node_rank, layout, path))
    files = {node: found for node, _, found in everyone if found is not None}
    possible = all(other == layout and node in files for node, other, _ in everyone)
    if possible:
        with set_default_mmap_options(mmap.MAP_SHARED):
            mapped = iter(torch.load(files[fabric.node_rank], mmap=True))
        for storage in storages:
            storage.replace([next(mapped) for _ in storage.leaves])
    torch.distributed.barrier()
    if path is not None:
        os.unlink(path)
    return sum(t.nbytes for t in tensors) if possible else 0


def _write(tensors: list[Tensor]) -> str | None:
    """The file; None where there is no room for it."""
    file = None
    try:
        with tempfile.NamedTemporaryFile(prefix="fedlight-data-", delete=False) as file:
            torch.save(tensors, file)
    except (OSError, RuntimeError):  # torch's own, where it cannot write on
        if file is not None:
            os.unlink(file.name)
        return None
    return file.name
