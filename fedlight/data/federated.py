"""Datamodules around others: a stock one divided; without clients that never train; all data as one client's."""

from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import Dataset

from fedlight.data.arrays import ArrayDataset, in_memory
from fedlight.data.datamodule import Around, FederatedDataModule, class_counts, set_up
from fedlight.data.dataset_partition import DatasetPartition
from fedlight.data.partition import Partitioner
from fedlight.data.reading import Loaded, loaded
from fedlight.seeding import derive_seed, generator, preserved_global_rng, seed_global_rng

FEDERATED_YAML = "data: {class_path: Federated, init_args: {datamodule: {class_path: %s}, num_clients: 20}}"
_NOT_CALLED = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer", "state_dict")


class Federated(Around, DatasetPartition):
    """A stock ``LightningDataModule`` whose training set is divided among clients.

    Its hooks are called as Lightning calls them. The training loader's batch size, workers and ``collate_fn`` are those
    of local training, and the order of samples is fedlight's; validation and test loaders are used as they are. What
    ``setup`` draws from the global generators, as ``random_split`` does, depends on ``seed`` alone.

    Example::

        trainer.fit(model, Federated(MyDataModule(), num_clients=20, partitioner=DirichletClients(0.3)))

    Args:
        datamodule: the datamodule.
        num_clients: N; None for one client per natural group, with ``NaturalGroups``.
        partitioner: which client gets which samples; by default ``IID()``, or ``NaturalGroups()`` of ``groups``.
        targets: column or attribute of its training set that holds classes; by default as in ``DatasetPartition``.
        groups: column or attribute that holds natural groups, for ``NaturalGroups``.
        seed: seed of the partition, and of what ``setup`` draws.
        held_out_clients: clients that never train, a number or a fraction of all, and are evaluated as new ones.
    """

    _other = "datamodule"

    def __init__(
        self,
        datamodule: LightningDataModule,
        num_clients: int | None = 20,
        partitioner: Partitioner | None = None,
        targets: str | None = None,
        groups: str | None = None,
        seed: int = 0,
        held_out_clients: int | float = 0,
    ) -> None:
        more: dict[str, Any] = {"seed": seed, "held_out_clients": held_out_clients}
        super().__init__([], None, None, num_clients, partitioner, targets, groups, **more)
        name = type(datamodule).__name__
        if isinstance(datamodule, FederatedDataModule):
            raise TypeError(f"`data.datamodule` is a {name}, which is federated already: use it as it is.")
        if ignored := [hook for hook in _NOT_CALLED if is_overridden(hook, datamodule, LightningDataModule)]:
            why = f"{', '.join(ignored)}, which are not called. Move them to the LightningModule."
            raise MisconfigurationException(f"data: {name} overrides {why}")
        self.datamodule = datamodule
        self._stages: set[str] = set()

    def prepare_data(self) -> None:
        """The datamodule's."""
        self.datamodule.trainer = self.trainer
        self.datamodule.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Set up the datamodule for the stage, and for ``fit`` in any case: clients are parts of its training set."""
        wanted = ("fit", stage or "fit", "test" if stage == "predict" else "fit")
        new = [name for name in dict.fromkeys(wanted) if name not in self._stages]
        if new:
            self.datamodule.trainer, self.partition = self.trainer, None
            with preserved_global_rng():
                for name in new:
                    seed_global_rng(derive_seed(self.seed, "datamodule"))
                    self.datamodule.setup(name)
                    self._stages.add(name)
                self._take(*map(self._loader, ("train", "val", "test")))
        super().setup(stage)

    def _loader(self, name: str) -> Loaded:
        method = f"{name}_dataloader"
        known = is_overridden(method, self.datamodule, LightningDataModule)
        if not known or (name == "test" and "test" not in self._stages):
            return Loaded()
        return loaded(getattr(self.datamodule, method)(), f"data: {type(self.datamodule).__name__}.{method}()")

    def predict_dataloader(self) -> Any:
        """The datamodule's, or else the test data."""
        own = is_overridden("predict_dataloader", self.datamodule, LightningDataModule)
        return self.datamodule.predict_dataloader() if own else self.test_dataloader()

    def teardown(self, stage: str) -> None:
        """The datamodule's, for every stage that it was set up for; the next call sets it up again."""
        for name in sorted(self._stages):
            self.datamodule.teardown(name)
        self._stages.clear()


def not_federated(data: object) -> str:
    """What a trainer says of data that does not tell what each client has."""
    cls: type = data if isinstance(data, type) else type(data)
    name = "MyData" if data is None else cls.__name__
    ways = [
        f"A LightningDataModule is divided by `fit(model, Federated({name}(...), num_clients=20,"
        f" partitioner=DirichletClients(0.3)))`, in YAML `{FEDERATED_YAML % name}`",
        "A dataset, a DataLoader, arrays are divided by `fit(model, DatasetPartition(train, val=val, num_clients=20))`",
    ]
    fitting = ways if data is None else ways[:1] if issubclass(cls, LightningDataModule) else ways[1:]
    what = f"expected a FederatedDataModule that knows what each client has, found {data!r:.60}"
    return f"data: {what}. {'. '.join(fitting)}. These are in fedlight.data."


_AS_GIVEN = ("prepare_data", "teardown", "eval_batch_size_on", "val_dataset", "test_dataset", "predict_dataloader")
"""What the other datamodule does itself."""


class Wrapping(Around, FederatedDataModule):
    """Base of datamodules that give the ``data`` of another one, which still divides them, to other clients."""

    _other = "data"

    def __init__(self, data: FederatedDataModule) -> None:
        LightningDataModule.__init__(self)  # how batches are made is the other's, who may know it after setup alone
        self.data = data
        for name in _AS_GIVEN:
            setattr(self, name, getattr(data, name))

    def setup(self, stage: str | None = None) -> None:
        """Load the data."""
        set_up(self.data, stage)


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
        counts = class_counts(self.data)
        return None if counts is None else counts.sum(0, keepdim=True)

    def pooled_dataset(self) -> Dataset[Any]:
        """The training data of all clients."""
        return self.client_dataset(0)


def draw_clients(data: FederatedDataModule) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The clients that train, of which some must be left, and those that ``held_out_clients`` keeps out of it."""
    total, wanted = data.num_clients, data.held_out_clients
    count = max(1, round(wanted * total)) if wanted % 1 else int(wanted)
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
        counts = class_counts(self.data)
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
