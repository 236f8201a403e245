"""In which order a client goes through its data, drawn ahead for a round; its batches; which steps several share."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fedlight.data.arrays import ArrayDataset
from fedlight.data.reading import read_batches
from fedlight.engines.base import ClientTask, LocalTraining
from fedlight.module.step import IndexedBatch
from fedlight.seeding import derive_seed


def num_batches(num_samples: int, batch_size: int, limit: int | float | None) -> int:
    """Batches of one local epoch; the last one may be smaller.

    Args:
        num_samples: n_i.
        batch_size: samples of a batch.
        limit: at most so many (an int), or that fraction of them (a float), at least one.
    """
    batches = math.ceil(num_samples / batch_size)
    if limit is None:
        return batches
    return max(1, int(batches * limit)) if isinstance(limit, float) else min(batches, limit)


class BatchOrder:
    """The batches of one client in one round, by epoch, as positions in its dataset.

    Attributes:
        order: all positions in the order in which they are used, ``[total]``.
        epochs: for each local epoch the ``(begin, end)`` slices of ``order`` that are its batches.
        steps_per_epoch: optimizer steps of each epoch.
    """

    def __init__(self, num_samples: int, training: LocalTraining, rng: torch.Generator) -> None:
        per_epoch = num_batches(num_samples, training.batch_size, training.limit_batches)
        accumulate = training.accumulate_grad_batches
        left = math.inf if training.steps is None else training.steps
        epochs = math.inf if training.epochs is None else training.epochs
        orders: list[Tensor] = []
        self.epochs: list[list[tuple[int, int]]] = []
        self.steps_per_epoch: list[int] = []
        offset = 0
        while left > 0 and len(self.epochs) < epochs:
            batches = int(min(per_epoch, left * accumulate))
            used = min(num_samples, batches * training.batch_size)
            orders.append(torch.randperm(num_samples, generator=rng)[:used])
            edges = [*range(offset, offset + used, training.batch_size), offset + used]
            self.epochs.append(list(pairwise(edges)))
            self.steps_per_epoch.append(math.ceil(batches / accumulate))
            offset += used
            left -= self.steps_per_epoch[-1]
        self.order = torch.cat(orders) if len(orders) > 1 else orders[0]

    def steps(self, accumulate: int) -> list[tuple[int, tuple[int, ...]]]:
        """For each optimizer step where its samples begin in :attr:`order`, and the sizes of its batches."""
        groups = (batches[i : i + accumulate] for batches in self.epochs for i in range(0, len(batches), accumulate))
        return [(group[0][0], tuple(end - begin for begin, end in group)) for group in groups]

    @property
    def num_steps(self) -> int:
        """S, optimizer steps of the round."""
        return sum(self.steps_per_epoch)


def batch_order(round: int, task: ClientTask, training: LocalTraining) -> BatchOrder:
    """The plan of a client's training, from the generator of (seed, "order", round, client)."""
    size = len(task.dataset)  # type: ignore[arg-type]
    if task.length is not None:
        training = replace(training, epochs=task.length[0], steps=task.length[1])
    return BatchOrder(size, training, task.generator(training.seed, "order", round))


def draws_of(round: int, task: ClientTask, plan: BatchOrder, training: LocalTraining) -> dict[str, Tensor]:
    """The random numbers of the augmentation of a client's samples in memory, in their order: ``[total]``, by name."""
    if not isinstance(task.dataset, ArrayDataset) or task.dataset.transform is None:
        return {}
    drawn = task.dataset.draw(len(plan.order), task.generator(training.seed, "augment", round))
    return {name: value.to(training.fabric.device) for name, value in drawn.items()}


def batch_reader(
    round: int,
    task: ClientTask,
    plan: BatchOrder,
    training: LocalTraining,
    transfer: Callable[[Any], Any],
    convert: Callable[[Any], Any],
) -> Callable[[int], Iterator[IndexedBatch]]:
    """A function that yields the batches of one local epoch, on the device."""
    dataset: Dataset[Any] = task.dataset
    if isinstance(dataset, ArrayDataset):
        dataset, order = dataset.near(training.fabric.device), plan.order.to(training.fabric.device)
        draws = draws_of(round, task, plan, training)

    def read(epoch: int) -> Iterator[Any]:
        if isinstance(dataset, ArrayDataset):
            return dataset.batches(order, plan.epochs[epoch], draws)
        batches = [plan.order[begin:end].tolist() for begin, end in plan.epochs[epoch]]
        seed = training.seed, f"{task.stage}loader", round, task.client, epoch
        seeds = [derive_seed(*seed, i) for i in range(len(batches))]
        return read_batches(dataset, batches, seeds, training.num_workers, training.collate_fn)

    return lambda epoch: ((convert(transfer(batch)), index) for index, batch in enumerate(read(epoch)))


def same_storage(one: ArrayDataset, other: ArrayDataset) -> bool:
    """Whether two datasets are rows of one storage, and transformed alike."""
    same = len(one.storage.leaves) == len(other.storage.leaves) and one.transform is other.transform
    return same and all(a is b for a, b in zip(one.storage.leaves, other.storage.leaves, strict=True))


_SEVERAL = 3
"""From so many clients on, one batched program is faster than a program for each client alone."""


class StepSizes:
    """The sizes of the batches of local steps in an epoch of all clients, whoever trains them.

    Attributes:
        shared: sizes of the micro-batches of steps that several clients take at the same time.
        alone: those of steps that are always one client's; that depends on no round, and on no process.
        tried: a full one, the next smaller one and the smallest, in samples: what is tried out before training.
        steps: of a client, on average.
        batched: programs that serve several clients, run one after the other in a round.
        single: programs that serve one client.
    """

    def __init__(self, training: LocalTraining) -> None:
        full = (training.batch_size,) * training.accumulate_grad_batches
        total, accumulate = max(1, training.sizes.total()), training.accumulate_grad_batches
        alike, longest = defaultdict[tuple[int, tuple[int, ...]], float](float), Counter[int]()
        self.steps = 0.0
        for size, clients in training.sizes.items():
            batches = num_batches(size, training.batch_size, training.limit_batches)
            each = [min(training.batch_size, size - i * training.batch_size) for i in range(batches)]
            plan = [tuple(each[i : i + accumulate]) for i in range(0, batches, accumulate)][: training.steps]
            self.steps += len(plan) * clients / total
            longest[plan.count(full)] += clients
            for sizes in set(plan) - {full}:  # clients that take as many steps take these at the same time
                alike[len(plan), sizes] += clients * training.per_round / total
        self.shared = {full for steps in longest if steps} | {sizes for (_, sizes), n in alike.items() if n >= _SEVERAL}
        self.alone = {sizes for _, sizes in alike} - self.shared
        samples = sorted({sum(sizes) for sizes in self.shared | self.alone}, reverse=True)
        self.tried = sorted({*samples[:2], *samples[-1:]}, reverse=True)
        self.single = sum(n for (_, sizes), n in alike.items() if sizes in self.alone)
        self.batched = sum(min(1.0, n) for (_, sizes), n in alike.items() if sizes in self.shared)
        below = 0.0
        for steps in sorted(longest):  # the most of K independent draws, in expectation
            up_to = below + longest[steps] / total
            self.batched += steps * (up_to**training.per_round - below**training.per_round)
            below = up_to
