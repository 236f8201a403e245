"""Reading a dataset sample by sample."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from fedlight.seeding import preserved_global_rng, seed_global_rng

Collate = Callable[[list[Any]], Any]


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
