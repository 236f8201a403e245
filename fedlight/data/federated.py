"""Any LightningDataModule, divided among clients."""

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.model_helpers import is_overridden

from fedlight.data.datamodule import Around, FederatedDataModule
from fedlight.data.dataset_partition import DatasetPartition
from fedlight.data.partition import Partitioner
from fedlight.data.reading import Loaded, loaded
from fedlight.seeding import derive_seed, preserved_global_rng, seed_global_rng

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
    name = "MyData" if data is None else type(data).__name__
    return (
        f"data: expected a FederatedDataModule that knows what each client has, found {data!r:.60}. A"
        f" LightningDataModule is divided by `fit(model, Federated({name}(...), num_clients=20,"
        f" partitioner=DirichletClients(0.3)))`, in YAML `{FEDERATED_YAML % name}`; datasets and DataLoaders by"
        f" `fit(model, DatasetPartition({name}, num_clients=20))`; these are in fedlight.data."
    )
