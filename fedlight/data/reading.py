"""Reading a dataset sample by sample."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from fedlight.seeding import derive_seed, preserved_global_rng, seed_global_rng

Collate = Callable[[list[Any]], Any]


def read_batches(
    dataset: Dataset[Any],
    batches: Sequence[list[int]],
    seed: tuple[int | str, ...],
    num_workers: int = 0,
    collate_fn: Collate | None = None,
    numbers: Sequence[int] | None = None,
) -> Iterator[Any]:
    """Yield batches of samples, with or without worker processes.

    What the dataset and ``collate_fn`` draw from the generators of Python, NumPy and torch depends on the seed and the
    number of the batch alone, and the caller's own draws go on as if nothing had been read.

    Args:
        dataset: gives samples.
        batches: which samples make each batch.
        seed: arguments of :func:`~fedlight.seeding.derive_seed`.
        num_workers: processes that read.
        collate_fn: makes a batch of a list of samples.
        numbers: of the batches; by default 0, 1, 2, ...
    """
    seeds = [derive_seed(*seed, n) for n in (range(len(batches)) if numbers is None else numbers)]  # type: ignore[arg-type]
    yield from DataLoader(
        _Batches(dataset, collate_fn or default_collate),
        batch_size=None,
        sampler=list(zip(seeds, batches, strict=True)),
        num_workers=num_workers,
        collate_fn=_unchanged,
        generator=torch.Generator(),
    )


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
