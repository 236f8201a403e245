"""Datasets and loaders of other projects: read sample by sample, and taken apart."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.fabric.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, default_collate, sampler

from fedlight.data.folders import in_order
from fedlight.seeding import preserved_global_rng, seed_global_rng

Collate = Callable[[list[Any]], Any]
_NONE = ("nan", "NaT", "<NA>")
LABELS = ("targets", "labels", "target", "label", "y")
"""What data call the classes of their samples."""


def read_batches(
    dataset: Dataset[Any],
    batches: Sequence[list[int]],
    seeds: Sequence[int],
    num_workers: int = 0,
    collate_fn: Collate | None = None,
) -> Iterator[Any]:
    """Yield batches of the samples at these positions, with or without worker processes.

    What the dataset and ``collate_fn`` draw from the generators of Python, NumPy and torch depends on the batch's seed
    alone, and the caller's own draws go on as if nothing had been read.
    """
    whole, items = _Batches(dataset, collate_fn or default_collate), list(zip(seeds, batches, strict=True))
    settings: dict[str, Any] = {"sampler": items, "num_workers": num_workers, "generator": torch.Generator()}
    yield from DataLoader(whole, batch_size=None, collate_fn=_unchanged, **settings)


class _Batches(Dataset[Any]):
    """A dataset whose items are the batches of another."""

    def __init__(self, dataset: Dataset[Any], collate: Collate) -> None:
        self.dataset, self.collate = dataset, collate

    def __getitem__(self, item: tuple[int, list[int]]) -> Any:
        seed, rows = item
        with preserved_global_rng(devices=False):
            seed_global_rng(seed, devices=False)
            several = getattr(self.dataset, "__getitems__", None)
            return self.collate(several(rows) if several else [self.dataset[row] for row in rows])


def _unchanged(batch: Any) -> Any:
    return batch


class Loaded(NamedTuple):
    """A map-style dataset, how its loader reads it (None where there is no loader), and the sizes of clients in it."""

    dataset: Any = None
    batch_size: int | None = None
    num_workers: int | None = None
    collate_fn: Collate | None = None
    sizes: list[int] | None = None


def picks_one(data: Any, collate_fn: Any) -> bool:
    """Whether a collate function gives one of the samples that it gets, as where each sample is a batch by itself."""
    if collate_fn in (None, default_collate):
        return False
    with preserved_global_rng(), suppress(Exception):  # what it cannot take is said where batches are made
        samples = [data[0], data[1]]
        made = {id(leaf) for leaf in tree_leaves(collate_fn(samples)) if not isinstance(leaf, str | int | float)}
        return bool(made) and any(made <= {id(leaf) for leaf in tree_leaves(sample)} for sample in samples)
    return False


def is_hf(data: Any) -> bool:
    """Whether it is a dataset of Hugging Face's ``datasets``, which need not be installed."""
    return hasattr(data, "column_names") and hasattr(data, "with_format")


def loaded(data: Any, what: str, clients: bool = False) -> Loaded:
    """Take a dataset, ``DataLoader`` or list with one apart; with ``clients`` also a list with one for each client.

    A sampler of some rows is kept; one that weighs them is named. ``what`` is how messages call it: a TypeError says
    what cannot be divided among clients, with the way out.
    """
    if isinstance(data, list | tuple) and all(isinstance(part, Dataset | DataLoader) or is_hf(part) for part in data):
        parts = [loaded(part, f"{what}[{i}]") for i, part in enumerate(data)]
        if not parts or (len(parts) == 1 and not clients):
            return parts[0] if parts else Loaded()
        if not clients or len({part[1:3] for part in parts}) != 1:
            raise TypeError(f"{what} is {len(parts)} loaders or datasets; give one{', or all alike' * clients}.")
        sets = [part.dataset for part in parts]
        joined: Any = ConcatDataset(sets)
        if all(is_hf(part) and part.format["type"] is None for part in sets):
            from datasets import concatenate_datasets

            try:
                joined = concatenate_datasets(sets)
            except ValueError as error:  # types, or names of classes, that are not those of the others
                raise TypeError(f"{what}: the clients' columns differ: {error}") from error
        return Loaded(joined, *parts[0][1:4], [len(part.dataset) for part in parts])
    dataset: Any = data.dataset if isinstance(data, DataLoader) else data
    if isinstance(dataset, IterableDataset) or (hasattr(dataset, "__iter__") and not hasattr(dataset, "__len__")):
        raise TypeError(
            f"{what} reads {type(dataset).__name__}, an iterable: its samples have no numbers, so they cannot be "
            "divided among clients. Use a dataset with __len__ and __getitem__ (a list of the samples is one), or a "
            "FederatedDataModule of your own whose client_dataset(i) gives the data of client i."
        )
    held = tree_leaves(dataset) if isinstance(dataset, Mapping | tuple) else []  # of tensors: it stands for a dataset
    kinds = {"f" if isinstance(p, Tensor) else p.dtype.kind if isinstance(p, np.ndarray) else "" for p in held}
    fits = dataset is None or (hasattr(dataset, "__getitem__") and not isinstance(dataset, str))
    if not (fits and kinds <= {*"biufc"}) or hasattr(dataset, "iloc"):
        found = f"{type(dataset).__name__}{' of strings or objects' if kinds & {*'USO'} else ''}"
        raise TypeError(f"{what} is a {found}; give one dataset, DataLoader or dict of tensors of it.")
    if clients and isinstance(data, list) and data and isinstance(data[0], tuple | list | Mapping):
        lengths = {tuple(getattr(leaf, "shape", ()))[:1] for leaf in tree_leaves(data[0])}
        if len(lengths) == 1 and lengths.isdisjoint({(), (1,)}):
            why = "though its arrays have one length. The data of each client are a TensorDataset(X, Y)."
            rank_zero_info(f"{what}: each of these {len(data)} {type(data[0]).__name__}s is one sample, {why}")
    if not isinstance(data, DataLoader):
        return Loaded(dataset)
    return _of_loader(data, what)


def _of_loader(data: DataLoader[Any], what: str) -> Loaded:
    """The dataset of a loader with the rows that its sampler draws, and how it reads them."""
    dataset: Any = data.dataset
    batches: Any = data.batch_sampler
    size = data.batch_size or getattr(batches, "batch_size", None) or (batches and len(next(iter(batches))))
    if not isinstance(size, int):
        raise TypeError(f"{what} is a DataLoader without a batch_size; give it one.")
    order: Any = getattr(batches, "sampler", data.sampler) if type(batches) is sampler.BatchSampler else batches
    name, drawn = type(order).__name__, len(order) if hasattr(order, "__len__") else len(dataset)
    rows = getattr(order, "indices", order if hasattr(order, "__getitem__") else None)
    if order is not batches and drawn < len(dataset):
        if rows is not None:
            return Loaded(Subset(dataset, [int(row) for row in rows]), size, data.num_workers, data.collate_fn)
        if not type(order).__module__.startswith("torch."):
            raise TypeError(f"{what}: its {name} draws {drawn} of {len(dataset)} samples; give a Subset of these.")
    elif hasattr(batches, "__len__") and order is batches:
        with preserved_global_rng():  # what it draws twice it has chosen, and not drawn by chance
            one, other = ({int(row) for batch in islice(batches, len(batches)) for row in batch} for _ in range(2))
        if one == other and len(one) < len(dataset):
            rank_zero_info(f"{what}: the {len(one)} of {len(dataset)} samples that its {name} draws.")
            return Loaded(Subset(dataset, sorted(one)), size, data.num_workers, data.collate_fn)
    usual = type(order) in (sampler.RandomSampler, sampler.SequentialSampler, sampler.SubsetRandomSampler)
    if not usual or drawn != len(dataset) or getattr(order, "replacement", False):
        rank_zero_warn(f"{what}: its {name} is not used; every client goes through its own samples in a random order.")
    if getattr(batches, "drop_last", False):
        rank_zero_info(f"{what}: its drop_last plays no part; the last batch of an epoch is kept, however small.")
    return Loaded(dataset, size, data.num_workers, data.collate_fn)


def numbered(values: Any, names: Sequence[str] = (), key: str = "") -> tuple[Tensor, list[str]]:
    """Classes or groups as ``[n]`` int64, and the names of strings, which are numbered by ``names`` or as they sort.

    With ``key``, of data that are known to be classes or groups, whole floating-point numbers are taken, too.
    """
    if not isinstance(values, Tensor):
        values = [_plain(value) for value in (values if getattr(values, "ndim", 1) == 1 else np.asarray(values))]
        lost = [i for i, v in enumerate(values) if v is None or (not isinstance(v, str | int) and str(v) in _NONE)]
        strings = [isinstance(value, str) for value in values]
        if lost or (any(strings) and not all(strings)):
            found = f"{len(lost)} samples have none, the first is {lost[0]}" if lost else "some are strings, others not"
            raise ValueError(f"`data.{key}`: {found}. Each sample has one integer, or one string.")
        if values and all(strings):
            names = list(names) or in_order(set(values))
            number = {name: i for i, name in enumerate(names)}
            return torch.tensor([number.get(value, len(names)) for value in values]), names
    try:
        tensor = (values if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))).cpu()
    except (TypeError, ValueError) as error:
        found = type(next(iter(values))).__name__
        raise ValueError(f"`data.{key}`: {found} is no class or group; give an integer or a string.") from error
    whole = bool(key) and tensor.is_floating_point() and bool((tensor == tensor.round()).all())
    if tensor.ndim != 1 or (tensor.is_floating_point() and not whole) or tensor.is_complex():
        found = f"{tensor.dtype} of shape {list(tensor.shape)}"
        raise ValueError(f"`data.{key}`: classes and groups are one integer per sample, or one string, got {found}.")
    return tensor.long(), list(names)


def label_of(sample: Any) -> Any:
    """The label of a sample: its last part, or what it calls so; None for what is no single value."""
    if isinstance(sample, list | tuple):
        label = sample[-1]
    else:
        held = sample if isinstance(sample, Mapping) else {key: getattr(sample, key, None) for key in LABELS}
        label = next((held[key] for key in LABELS if held.get(key) is not None), None)
    return _plain(label)


def class_names(data: Any) -> list[str]:
    """The names of classes by number, where a dataset or datamodule has them in ``classes``; others have numbers."""
    while isinstance(data, Subset):
        data = data.dataset
    names = getattr(data, "classes", None)
    return [str(name) for name in names] if isinstance(names, list | tuple | np.ndarray) else []


def _plain(value: Any) -> Any:
    """A value as Python has it, where it is one value."""
    value = value.item() if hasattr(value, "item") and np.shape(value) in ((), (1,)) else value
    return value.decode() if isinstance(value, bytes) else value
