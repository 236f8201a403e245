"""Datasets in memory that are read a batch at a time."""

from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from fedlight.data.augment import BatchTransform


class _Storage:
    """The tensors that all datasets of a datamodule share, and their copies on other devices, made once each."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets
        self._copies: dict[torch.device, _Storage] = {inputs.device: self}
        self._refused: dict[torch.device, bool] = {}

    def replace(self, inputs: Tensor, targets: Tensor) -> None:
        """Keep the same numbers elsewhere."""
        self.inputs, self.targets = inputs, targets
        self._copies.clear()
        self._copies[inputs.device] = self

    @property
    def nbytes(self) -> int:
        return self.inputs.nbytes + self.targets.nbytes

    def fits(self, device: torch.device) -> bool:
        """Whether it is, or may be copied, there: half of what a device has free is for other things."""
        if device in self._copies or device.type != "cuda":
            return True
        if device not in self._refused:
            free = torch.cuda.mem_get_info(device)[0]
            self._refused[device] = self.nbytes > free / 2
            if self._refused[device]:
                rank_zero_warn(
                    f"data: {self.nbytes / 1e9:.1f} GB do not fit on {device}, which has {free / 1e9:.1f} GB free. They"
                    " stay in main memory, and a client's are copied when it trains."
                )
        return not self._refused[device]

    def to(self, device: torch.device) -> "_Storage":
        if device not in self._copies:
            copy = _Storage(self.inputs.to(device), self.targets.to(device))
            copy._copies = self._copies
            self._copies[device] = copy
        return self._copies[device]

    def __getstate__(self) -> dict[str, Any]:
        return {"inputs": self.inputs, "targets": self.targets}  # a worker process or a file needs no copies

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


class ArrayDataset(Dataset[tuple[Tensor, Tensor]]):
    """Images (or any tensors) in memory, read a batch at a time.

    The datasets of all clients are views of one storage: :meth:`view` and :meth:`pooled` copy nothing, and :meth:`to`
    moves the storage once for all of them.

    Args:
        inputs: ``[n_total, ...]``; images are ``[n_total, C, H, W]`` uint8.
        targets: ``[n_total]`` or ``[n_total, ...]``.
        indices: the rows that this dataset consists of, ``[n]`` int64; None for all.
        transform: what turns a batch of stored inputs into what the model sees; None leaves them as they are.

    Raises:
        ValueError: if inputs and targets differ in length or devices.
    """

    def __init__(
        self, inputs: Tensor, targets: Tensor, indices: Tensor | None = None, transform: BatchTransform | None = None
    ) -> None:
        if len(inputs) != len(targets):
            raise ValueError(
                f"There are {len(inputs)} inputs, but {len(targets)} targets; each input needs one target."
            )
        if inputs.device != targets.device:
            raise ValueError(f"Inputs are on {inputs.device}, but targets on {targets.device}.")
        self._storage = _Storage(inputs, targets)
        self.indices = indices if indices is None else indices.to(inputs.device)
        self.transform = transform if transform is None else transform.to(inputs.device)

    @property
    def inputs(self) -> Tensor:
        """All stored inputs ``[n_total, ...]``, those of other clients included."""
        return self._storage.inputs

    @property
    def targets(self) -> Tensor:
        """All stored targets ``[n_total]``, those of other clients included."""
        return self._storage.targets

    @property
    def device(self) -> torch.device:
        """Where the storage is."""
        return self.inputs.device

    def __len__(self) -> int:
        return len(self.targets) if self.indices is None else len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"There is no sample {index} in a dataset of {len(self)}.")
        inputs, targets = self.batch(torch.tensor([index % len(self)], device=self.device))
        return inputs[0], targets[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        """What a ``DataLoader`` calls for a batch: one gather, then a list that any collate function takes."""
        inputs, targets = self.batch(torch.tensor(indices, device=self.device))
        return list(zip(inputs.unbind(), targets.unbind(), strict=True))

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The augmentation's random numbers for ``n`` samples, in order: CPU tensors ``[n]``; ``{}`` for none."""
        return {} if self.transform is None else self.transform.draw(n, generator)

    def batch(self, rows: Tensor, draws: dict[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Gather, augment and normalise a batch, on the device of the storage and without waiting for it.

        Only tensor operations of static shape: this can be captured in a CUDA graph, compiled, and run under ``vmap``.

        Args:
            rows: positions in this dataset ``[B]`` int64, on the device of the storage.
            draws: what :meth:`draw` gave, cut to these ``B`` samples, on the same device; None: no augmentation.

        Returns:
            Inputs ``[B, ...]`` as the model sees them (images: float32, normalised), and targets ``[B]``.
        """
        rows = rows if self.indices is None else self.indices[rows]
        inputs = self.inputs[rows]
        return inputs if self.transform is None else self.transform(inputs, draws), self.targets[rows]

    def positions(self, rows: Tensor) -> Tensor:
        """The rows of the storage at these positions: ``d.batch(r)`` is ``d.pooled().batch(d.positions(r))``."""
        return rows if self.indices is None else self.indices[rows]

    def pooled(self) -> "ArrayDataset":
        """The whole storage with this dataset's transform: one dataset for an engine that serves many clients."""
        return self.view(None, self.transform)

    def view(self, indices: Tensor | None, transform: BatchTransform | None) -> "ArrayDataset":
        """Other rows of the same storage, or another transform; nothing is copied."""
        other = object.__new__(ArrayDataset)
        other._storage = self._storage
        other.indices = indices if indices is None else indices.to(self.device)
        other.transform = transform if transform is None else transform.to(self.device)
        return other

    def to(self, device: torch.device | str) -> "ArrayDataset":
        """The same dataset on a device. The storage is moved by the first call and shared by all datasets after it."""
        other = object.__new__(ArrayDataset)
        other._storage = self._storage.to(_with_index(torch.device(device)))
        other.indices = self.indices if self.indices is None else self.indices.to(other.device)
        other.transform = self.transform if self.transform is None else self.transform.to(other.device)
        return other

    def fits(self, device: torch.device | str) -> bool:
        """Whether :meth:`to` can be used: whether there is room on the device for the storage."""
        return self._storage.fits(_with_index(torch.device(device)))

    def near(self, device: torch.device | str) -> "ArrayDataset":
        """The same samples on a device, whether or not the storage fits there.

        Where it does not, these samples alone are copied: gathered in pinned memory, and sent from there while the
        device goes on with what it has to do.
        """
        if self.fits(device):
            return self.to(device)
        inputs, targets = (_sent(stored, self.indices, torch.device(device)) for stored in (self.inputs, self.targets))
        return ArrayDataset(inputs, targets, None, self.transform)

    def part(self, begin: int, end: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """The samples ``begin`` to ``end``, without augmentation, as :meth:`batch` gives them, on a device."""
        if self.fits(device):
            return self.to(device).batch(torch.arange(begin, end, device=device))
        rows = self.positions(torch.arange(begin, end))
        return self.view(rows, self.transform).near(device).batch(torch.arange(end - begin, device=device))


def _sent(stored: Tensor, rows: Tensor | None, device: torch.device) -> Tensor:
    """Some rows of a tensor in main memory, on a device."""
    if rows is None:
        return stored.to(device, copy=True)
    room = torch.empty((len(rows), *stored.shape[1:]), dtype=stored.dtype, pin_memory=device.type == "cuda")
    return torch.index_select(stored, 0, rows, out=room).to(device, non_blocking=True)


def _with_index(device: torch.device) -> torch.device:
    """``cuda`` is ``cuda:<current>``: both names must find the same copy."""
    return torch.device(device.type, torch.cuda.current_device()) if str(device) == "cuda" else device
