"""Data of a federation in which every site has its own."""

from typing import Any

from torch.utils.data import Dataset, Subset

from fedlight.data.datamodule import FederatedDataModule
from fedlight.data.held_out import Wrapping

_NOTHING: Dataset[Any] = Subset([], [])  # type: ignore[arg-type]


class RemoteData(FederatedDataModule):
    """What the server knows of data that are at the sites: n_i of every client, and the size of a batch."""

    def __init__(self, sizes: list[int], batch_size: int) -> None:
        super().__init__(batch_size)
        self.num_clients, self.sizes = len(sizes), sizes

    def client_dataset(self, client: int) -> Dataset[Any]:
        """Nothing: it is elsewhere."""
        return _NOTHING

    def client_size(self, client: int) -> int:
        """n_i."""
        return self.sizes[client]


class OwnData(Wrapping):
    """A site's own data, as those of one ``client`` among others, of whom the site has nothing."""

    def __init__(self, data: FederatedDataModule, client: int, num_clients: int) -> None:
        super().__init__(data)
        self._client, self.num_clients = client, num_clients

    def setup(self, stage: str | None = None) -> None:
        """Load the site's data, which must be those of one client."""
        super().setup(stage)
        if self.data.num_clients != 1:
            raise ValueError(f"`data` of a site must have one client, and has {self.data.num_clients}.")

    def client_dataset(self, client: int) -> Dataset[Any]:
        """The site's training data; nothing for other clients."""
        return self.data.client_dataset(0) if client == self._client else _NOTHING

    def client_size(self, client: int) -> int:
        """n_i; 0 for other clients."""
        return self.data.client_size(0) if client == self._client else 0

    def client_val_dataset(self, client: int) -> Dataset[Any] | None:
        """The site's held-out data."""
        if client != self._client:
            return None
        return self.data.client_val_dataset(0) or self.data.val_dataset()
