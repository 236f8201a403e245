"""The data that an analysis looks at: a sample of rows, cut into batches and shared among processes."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from fedlight.checks import check_whole
from fedlight.data.arrays import ArrayDataset
from fedlight.data.reading import picks_one, read_batches
from fedlight.penalties.batches import batch_size as size_of
from fedlight.seeding import derive_seed, generator


class Batches(Sequence[Any]):
    """Batches by position: gathered when they are asked for, or kept.

    Attributes:
        sizes: samples of each.
    """

    def __init__(self, get: Callable[[int], Any], sizes: Sequence[int]) -> None:
        self._get, self.sizes = get, list(sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self.sizes):
            raise IndexError(index)
        return self._get(index)


def analysis_batches(
    data: Dataset[Any] | Iterable[Any] | None,
    *,
    device: torch.device,
    max_samples: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    transfer: Callable[[Any], Any] | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
) -> Batches:
    """This process's batches of a data set, without augmentation.

    Args:
        data: an :class:`ArrayDataset` (gathered batch by batch on the device), any map-style dataset (read once and
            kept on the device), or an iterable of batches (kept; the first ``max_samples`` samples are used).
        device: where to compute.
        max_samples: how many samples of a dataset to draw at random, without replacement; None for all.
        batch_size: samples of a batch, 64 by default. The result does not depend on it.
        seed: seed of the draw. The same samples are drawn for every model and in every round.
        rank: of this process.
        world_size: processes that share the data.
        transfer: moves a batch to the device; by default every tensor in it is moved.
        collate_fn: makes a batch of a list of samples of a map-style dataset.

    Raises:
        ValueError: if there is no data, or ``max_samples`` or ``batch_size`` is below 1.
    """
    for key, value in (("max_samples", max_samples), ("batch_size", batch_size)):
        check_whole(f"`{key}`", 1 if value is None else value)
    move = transfer if transfer is not None else partial(move_data_to_device, device=device)
    if data is None:
        raise ValueError("There is no data to measure the Hessian on: `data: val` needs validation data.")
    if isinstance(data, IterableDataset):
        raise TypeError(f"{type(data).__name__} gives single samples; hand over a DataLoader with batches of them.")
    if not isinstance(data, Dataset):
        return _of_iterable(data, move, max_samples, rank, world_size)
    total = len(data)  # type: ignore[arg-type]
    if total == 0:
        raise ValueError("There is no data to measure the Hessian on: the dataset is empty.")
    rows = torch.arange(total)
    if max_samples is not None and max_samples < total:
        rows = torch.randperm(total, generator=generator(seed, "hessian"))[:max_samples].sort().values
    alone = picks_one(data, collate_fn)  # each sample is a batch
    every = torch.split(rows, 1 if alone else max(1, min(batch_size or 64, math.ceil(len(rows) / world_size))))
    mine = range(rank, len(every), world_size)
    parts = [every[i] for i in mine]
    if isinstance(data, ArrayDataset):
        return _of_arrays(data, parts, device, move)
    seeds = [derive_seed(seed, "hessian", i) for i in mine]
    read = read_batches(data, [part.tolist() for part in parts], seeds, collate_fn=collate_fn)
    kept = [move(batch) for batch in read]
    return Batches(kept.__getitem__, [size_of(batch) for batch in kept] if alone else [len(part) for part in parts])


def _of_arrays(data: ArrayDataset, parts: list[Tensor], device: torch.device, move: Callable[[Any], Any]) -> Batches:
    sizes = [len(part) for part in parts]
    ends = list(accumulate(sizes))
    drawn = data.view(data.positions(torch.cat([torch.arange(0), *parts])), data.transform)
    drawn = drawn.to(device) if drawn.fits(device) else drawn  # which every product reads, but never all at once
    return Batches(lambda index: move(drawn.part(ends[index] - sizes[index], ends[index], device)), sizes)


def _of_iterable(
    data: Iterable[Any], move: Callable[[Any], Any], max_samples: int | None, rank: int, world_size: int
) -> Batches:
    kept, sizes, left = [], [], math.inf if max_samples is None else max_samples
    for number, batch in enumerate(data):
        if left <= 0:
            break
        size = size_of(batch)
        if size > left:
            batch = apply_to_collection(batch, Tensor, partial(_first, size=size, left=int(left)))
            size = size_of(batch)  # graphs stay together
        left -= size
        if number % world_size == rank:
            kept.append(move(batch))
            sizes.append(size)
    return Batches(kept.__getitem__, sizes)


def _first(leaf: Tensor, size: int, left: int) -> Tensor:
    return leaf[:left] if leaf.ndim and len(leaf) == size else leaf
