"""Datasets in memory that are read a batch at a time."""

from collections.abc import Hashable, Iterator, Sequence
from functools import partial
from operator import is_
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from lightning.fabric.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.data import Dataset, Subset, TensorDataset, default_collate

from fedlight.data.augment import BatchTransform
from fedlight.data.reading import Collate, read_batches

_MOST_BYTES = 2**31
"""A dataset is read into memory as a whole if it needs less."""
_GATHERED_BYTES = 2**20
"""Of a client's batches, so much is gathered at once."""


class _Storage:
    """The tensors that all datasets of a datamodule share, and their copies on other devices, made once each.

    They are the ``leaves`` of a tree that is made as ``spec`` says; ``build`` makes such a tree of other leaves.
    """

    def __init__(self, tree: Any) -> None:
        leaves, self.spec = tree_flatten(tree)
        self.leaves = [leaf if isinstance(leaf, Tensor) else torch.as_tensor(_native(leaf)) for leaf in leaves]
        if len({(*leaf.shape[:1], leaf.device) for leaf in self.leaves}) != 1 or not self.leaves[0].ndim:
            found = ", ".join(f"{list(leaf.shape)} on {leaf.device}" for leaf in self.leaves)
            raise ValueError(f"Tensors of a dataset need an entry for each sample, and one device; found {found}.")
        flat = type(tree) in (tuple, list) and len(tree) == len(leaves) and all(map(is_, tree, leaves))
        self.build = type(tree) if flat else partial(tree_unflatten, treespec=self.spec)
        self._copies: dict[torch.device, _Storage] = {self.device: self}
        self._refused: dict[torch.device, bool] = {}

    def replace(self, leaves: list[Tensor]) -> None:
        """Keep the same numbers elsewhere."""
        self.leaves = leaves
        self._copies.clear()
        self._copies[self.device] = self

    @property
    def device(self) -> torch.device:
        return self.leaves[0].device

    @property
    def kind(self) -> Any:
        """What samples are made of: structure, shapes and types."""
        return self.spec, [(leaf.shape[1:], leaf.dtype) for leaf in self.leaves]

    def fits(self, device: torch.device) -> bool:
        """Whether it is, or may be copied, there: half of what a device has free is for other things."""
        if device in self._copies or device.type != "cuda":
            return True
        if device not in self._refused:
            free = torch.cuda.mem_get_info(device)[0]
            needed = sum(leaf.nbytes for leaf in self.leaves)
            self._refused[device] = needed > free / 2
            if self._refused[device]:
                found = f"{needed / 1e9:.1f} GB do not fit on {device}, which has {free / 1e9:.1f} GB free"
                rank_zero_warn(f"data: {found}. They stay in main memory, and a client's are copied when it trains.")
        return not self._refused[device]

    def to(self, device: torch.device) -> "_Storage":
        if device not in self._copies:
            copy = _Storage(self.build([leaf.to(device) for leaf in self.leaves]))
            copy._copies = self._copies
            self._copies[device] = copy
        return self._copies[device]

    def __reduce__(self) -> Any:
        return _Storage, (self.build(self.leaves),)  # a worker process or a file needs no copies


def _native(array: Any) -> Any:
    """A NumPy array in this machine's byte order that does not run backwards, as torch takes it."""
    return array.astype(array.dtype.newbyteorder("="), "C", copy=False) if isinstance(array, np.ndarray) else array


class ArrayDataset(Dataset[Any]):
    """Images (or any tensors) in memory, read a batch at a time.

    The datasets of all clients are views of one storage: :meth:`view` and :meth:`pooled` copy nothing, and :meth:`to`
    moves the storage once for all of them. :meth:`of` makes one of other than inputs and targets.

    Args:
        inputs: ``[n_total, ...]``; images are ``[n_total, C, H, W]`` uint8.
        targets: ``[n_total]`` or ``[n_total, ...]``.
        indices: the rows that this dataset consists of, ``[n]`` int64; None for all.
        transform: what turns a batch of stored inputs into what the model sees; None leaves them as they are.

    Raises:
        ValueError: if tensors differ in length or devices.
    """

    def __init__(
        self, inputs: Tensor, targets: Tensor, indices: Tensor | None = None, transform: BatchTransform | None = None
    ) -> None:
        self._set(_Storage((inputs, targets)), indices, transform)

    @classmethod
    def of(cls, tree: Any) -> "ArrayDataset":
        """A dataset of a dict, list or tuple of tensors ``[n_total, ...]``, nested or not; batches are made like it."""
        return cls._over(_Storage(tree), None, None)

    @classmethod
    def _over(cls, storage: _Storage, indices: Tensor | None, transform: BatchTransform | None) -> "ArrayDataset":
        dataset: ArrayDataset = object.__new__(ArrayDataset)
        dataset._set(storage, indices, transform)
        return dataset

    def _set(self, storage: _Storage, indices: Tensor | None, transform: BatchTransform | None) -> None:
        self.storage = storage
        self.indices = indices if indices is None else indices.to(storage.device)
        self.transform = transform if transform is None else transform.to(storage.device)

    @property
    def inputs(self) -> Tensor:
        """All stored inputs ``[n_total, ...]``, those of other clients included: the first tensor."""
        return self.storage.leaves[0]

    @property
    def targets(self) -> Tensor:
        """All stored targets ``[n_total]``, those of other clients included: the last tensor."""
        return self.storage.leaves[-1]

    @property
    def device(self) -> torch.device:
        """Where the storage is."""
        return self.storage.device

    def __len__(self) -> int:
        return len(self.inputs) if self.indices is None else len(self.indices)

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"There is no sample {index} in a dataset of {len(self)}.")
        return self.__getitems__([index % len(self)])[0]

    def __getitems__(self, indices: list[int], draws: dict[str, Tensor] | None = None) -> list[Any]:
        """What a ``DataLoader`` calls for a batch: one gather, then a list that any collate function takes."""
        leaves = self.leaves(torch.tensor(indices, device=self.device), draws)
        return [self.storage.build(list(sample)) for sample in zip(*(leaf.unbind() for leaf in leaves), strict=True)]

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The augmentation's random numbers for ``n`` samples, in order: CPU tensors ``[n]``; ``{}`` for none."""
        return {} if self.transform is None else self.transform.draw(n, generator)

    def batch(self, rows: Tensor, draws: dict[str, Tensor] | None = None) -> Any:
        """Gather, augment and normalise a batch, on the device of the storage and without waiting for it.

        Only tensor operations of static shape: this can be captured in a CUDA graph, compiled, and run under ``vmap``.

        Args:
            rows: positions in this dataset ``[B]`` int64, on the device of the storage.
            draws: what :meth:`draw` gave, cut to these ``B`` samples, on the same device; None: no augmentation.

        Returns:
            Inputs ``[B, ...]`` as the model sees them (images: float32, normalised), and targets ``[B]``; or what the
            dataset was made :meth:`of`.
        """
        return self.storage.build(self.leaves(rows, draws))

    def leaves(self, rows: Tensor, draws: dict[str, Tensor] | None = None) -> list[Tensor]:
        """The tensors of :meth:`batch`, in the order of the storage's."""
        rows = self.positions(rows)
        leaves = [leaf[rows] for leaf in self.storage.leaves]
        if self.transform is not None:
            leaves[0] = self.transform(leaves[0], draws)
        return leaves

    def batches(self, rows: Tensor, edges: Sequence[tuple[int, int]], draws: dict[str, Tensor]) -> Iterator[Any]:
        """:meth:`batch` of pieces of ``rows``, one after the other; on a CPU several small ones are gathered at once.

        Args:
            rows: positions in this dataset ``[n]`` int64, on the device of the storage.
            edges: where each batch begins and ends in ``rows``; it begins where the one before ends.
            draws: what :meth:`draw` gave for all ``rows``, on the same device.
        """
        size = max(end - begin for begin, end in edges) * sum(leaf[:1].nbytes for leaf in self.storage.leaves)
        together = max(1, _GATHERED_BYTES // max(1, size)) if self.device.type == "cpu" else 1
        rows = self.positions(rows)
        for first in range(0, len(edges), together):
            part = edges[first : first + together]
            sizes = [end - begin for begin, end in part]
            gathered = [leaf[rows[part[0][0] : part[-1][1]]].split(sizes) for leaf in self.storage.leaves]  # type: ignore[no-untyped-call]
            for (begin, end), leaves in zip(part, zip(*gathered, strict=True), strict=True):
                own = [leaf.detach() for leaf in leaves]  # what is done to one batch is not done to the others
                if self.transform is not None:
                    own[0] = self.transform(own[0], {name: value[begin:end] for name, value in draws.items()})
                yield self.storage.build(own)

    def positions(self, rows: Tensor) -> Tensor:
        """The rows of the storage at these positions: ``d.batch(r)`` is ``d.pooled().batch(d.positions(r))``."""
        return rows if self.indices is None else self.indices[rows]

    def pooled(self) -> "ArrayDataset":
        """The whole storage with this dataset's transform: one dataset for an engine that serves many clients."""
        return self.view(None, self.transform)

    def view(self, indices: Tensor | None, transform: BatchTransform | None) -> "ArrayDataset":
        """Other rows of the same storage, or another transform; nothing is copied."""
        return self._over(self.storage, indices, transform)

    def first(self, samples: int) -> "ArrayDataset":
        """The first samples of this dataset."""
        return self.view(self.positions(torch.arange(samples, device=self.device)), self.transform)

    def to(self, device: torch.device | str) -> "ArrayDataset":
        """The same dataset on a device. The storage is moved by the first call and shared by all datasets after it."""
        storage = self.storage.to(_with_index(torch.device(device)))
        return self if storage is self.storage else self._over(storage, self.indices, self.transform)

    def fits(self, device: torch.device | str) -> bool:
        """Whether :meth:`to` can be used: whether there is room on the device for the storage."""
        return self.storage.fits(_with_index(torch.device(device)))

    def near(self, device: torch.device | str) -> "ArrayDataset":
        """The same samples on a device, whether or not the storage fits there.

        Where it does not, these samples alone are copied: gathered in pinned memory, and sent from there while the
        device goes on with what it has to do.
        """
        if self.fits(device):
            return self.to(device)
        sent = [_sent(leaf, self.indices, torch.device(device)) for leaf in self.storage.leaves]
        return self._over(_Storage(self.storage.build(sent)), None, self.transform)

    def part(self, begin: int, end: int, device: torch.device | str) -> Any:
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


_known: "WeakKeyDictionary[Any, tuple[list[tuple[int, int]], ArrayDataset | None]]" = WeakKeyDictionary()


def in_memory(data: Any, collate_fn: Collate | None = None, read: bool = False) -> Any:
    """The samples of a dataset as an :class:`ArrayDataset`, if they are tensors in memory; else the dataset itself.

    These are a ``TensorDataset``, a dict or tuple of tensors, and a ``Subset`` of one of these. Nothing is copied, and
    batches are those of a loader; another ``collate_fn`` than torch's own wants samples. With ``read`` any dataset is
    read as a whole (twice) whose samples torch collates to tensors, if they do not depend on random numbers.
    """
    own = collate_fn not in (None, default_collate)
    if own and isinstance(data, ArrayDataset):
        raise ValueError("data: an ArrayDataset makes batches itself, so collate_fn has no part: give a TensorDataset.")
    if isinstance(data, dict | tuple):
        arrays = ArrayDataset.of(data)
        return Subset(arrays, range(len(arrays))) if own else arrays
    if own or isinstance(data, ArrayDataset):
        return data
    if type(data) is Subset:
        whole, rows = in_memory(data.dataset, None, read), torch.as_tensor(data.indices)
        if rows.dtype == torch.bool:
            raise ValueError("data: a Subset has numbers of rows, and this one a mask. Give mask.nonzero().flatten().")
        return whole.view(whole.positions(rows.long()), whole.transform) if isinstance(whole, ArrayDataset) else data
    tensors = data.tensors if type(data) is TensorDataset else ()
    if not tensors and not (read and isinstance(data, Hashable)):
        return data
    state = [(id(t), 0 if t.is_inference() else t._version) for t in tensors]  # others, or other numbers in them
    if data not in _known or _known[data][0] != state:
        _known[data] = state, ArrayDataset.of([t.contiguous() for t in tensors]) if tensors else _read(data)
    return _known[data][1] or data


def _read(data: Any) -> ArrayDataset | None:
    """All samples of a dataset, if they are tensors of one shape and do not depend on the seed."""
    try:
        first = next(read_batches(data, [[0]], [0]))
        if sum(leaf.nbytes for leaf in tree_leaves(first)) * len(data) > _MOST_BYTES:
            return None
        rank_zero_info(f"data: {type(data).__name__} is read into memory, for an engine that records the local step.")
        one, other = read_batches(data, [list(range(len(data)))] * 2, [0, 1])
        same = [torch.equal(a, b) for a, b in zip(tree_leaves(one), tree_leaves(other), strict=True)]
    except (AttributeError, TypeError, ValueError, RuntimeError):  # what is no tensor, or does not stack
        return None
    return ArrayDataset.of(one) if all(same) else None
