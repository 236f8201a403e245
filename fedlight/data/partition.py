"""Partitions: which client holds which training sample.

A partitioner is a pure function of the labels and a generator. Every sample goes to exactly one client, every client
gets at least one, and what cannot be done is an error.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Generator, Tensor

from fedlight.checks import check_number, check_whole


class Partitioner(ABC):
    """Divides samples among clients; subclasses define :meth:`split`.

    Attributes:
        needs_labels: whether it makes sense only where the classes of the samples are known.
        min_size: the least number of samples of a client.
    """

    needs_labels: ClassVar[bool] = True
    min_size: int = 1

    def __call__(
        self, targets: Tensor, num_clients: int, generator: Generator, groups: Tensor | None = None
    ) -> list[Tensor]:
        """Divide samples among clients.

        Args:
            targets: class of each sample, ``[n]`` integers of 0 or more.
            num_clients: N.
            generator: the only source of randomness, on the CPU.
            groups: natural group (domain, writer, ...) of each sample, ``[n]`` integers, where there are any.

        Returns:
            For each client the rows of its samples, int64: disjoint, complete, and none empty.

        Raises:
            ValueError: if the request is infeasible.
        """
        name, count = type(self).__name__, len(targets)
        if targets.ndim != 1 or targets.is_floating_point() or (count and int(targets.min()) < 0):
            found = f"{targets.dtype} of shape {list(targets.shape)}"
            raise ValueError(f"{name} needs class labels, a vector of integers of 0 or more, got {found}.")
        if not 1 <= num_clients <= count:
            why = f"between 1 and the number of training samples, {count}: every client needs a sample."
            raise ValueError(f"`data.num_clients` is {num_clients}, but it must be {why}")
        if (needed := self.min_size * num_clients) > count:
            what = f"`data.partitioner.min_size` is {self.min_size}, but {num_clients} clients of that size"
            raise ValueError(f"{what} need {needed}, and there are {count}. Lower min_size or `data.num_clients`.")
        groups = groups if groups is None else groups.cpu()
        made = self.split(targets.long().cpu(), num_clients, generator, groups)
        parts = [torch.as_tensor(part, dtype=torch.int64) for part in made]
        if len(parts) != num_clients:
            raise ValueError(f"{name} makes {len(parts)} parts, and `data.num_clients` is {num_clients}.")
        if not torch.equal(torch.cat(parts).sort().values, torch.arange(count)):
            raise ValueError(f"{name} does not give every sample to exactly one client.")
        for client in (client for client, part in enumerate(parts) if len(part) == 0):
            way_out = "choose fewer clients (`data.num_clients`) or another `data.partitioner`"
            raise ValueError(f"{name} leaves client {client} of {num_clients} without a sample; {way_out}.")
        return parts

    @abstractmethod
    def split(self, targets: Tensor, num_clients: int, generator: Generator, groups: Tensor | None) -> list[Tensor]:
        """The rows of each client; arguments as in :meth:`__call__`, already checked."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in vars(self).items())})"


class IID(Partitioner):
    """Every client gets the same number of every class, where that divides evenly; else numbers differ by one."""

    needs_labels: ClassVar[bool] = False

    def split(self, targets: Tensor, num_clients: int, generator: Generator, groups: Tensor | None) -> list[Tensor]:
        """Deal the samples out like cards, class after class, to the clients in random order."""
        rows, _ = rows_by_class(targets, generator)
        seats = torch.randperm(num_clients, generator=generator)
        return by_client(rows, seats[torch.arange(len(rows)) % num_clients], num_clients)


class QuantitySkew(Partitioner):
    """Size skew only: sizes follow a log-normal law, classes are mixed at random.

    Client i gets a share of the samples proportional to exp(σ·z_i), z_i ~ N(0, 1), and ``min_size`` at least.

    Args:
        sigma: σ ≥ 0; 0 gives equal sizes.
        min_size: the least number of samples of a client.
    """

    needs_labels: ClassVar[bool] = False

    def __init__(self, sigma: float = 1.0, min_size: int = 1) -> None:
        self.sigma = check_number("`data.partitioner.sigma`", sigma)
        self.min_size = check_whole("`data.partitioner.min_size`", min_size)

    def split(self, targets: Tensor, num_clients: int, generator: Generator, groups: Tensor | None) -> list[Tensor]:
        """Draw sizes and cut a random order of all samples."""
        n = len(targets)
        logarithms = self.sigma * torch.randn(num_clients, dtype=torch.float64, generator=generator)
        # Those that would fall below the minimum get it; the others share the rest in proportion.
        sizes = torch.full((num_clients,), self.min_size)
        free = torch.ones(num_clients, dtype=torch.bool)
        weights = torch.softmax(logarithms, 0)
        while bool(free.any()):
            rest = n - self.min_size * int((~free).sum())
            below = free & (weights / weights[free].sum() * rest < self.min_size)
            if not bool(below.any()):
                sizes[free] = apportion(rest, weights[free])
                break
            free &= ~below
        return list(torch.split(torch.randperm(n, generator=generator), sizes.tolist()))


class NaturalGroups(Partitioner):
    """One client per natural group (domain, writer, hospital), or several per group.

    With N = m·(number of groups), each group is divided at random into m clients of equal size; clients
    ``g·m .. g·m + m - 1`` belong to group g.
    """

    needs_labels: ClassVar[bool] = False

    def split(self, targets: Tensor, num_clients: int, generator: Generator, groups: Tensor | None) -> list[Tensor]:
        """Divide each group among its clients."""
        if groups is None:
            raise ValueError(
                "`data.partitioner: NaturalGroups` needs groups: a folder with one level of domains, `group_train` in "
                "the .npz file of `data.source`, or a column of its CSV file that `data.columns.client` names."
            )
        names, group = torch.unique(groups, return_inverse=True)
        per_group, key = num_clients // len(names), f"`data.num_clients` is {num_clients}"
        if num_clients % len(names):
            why = f"NaturalGroups needs {len(names)} clients (null: one for each) or a multiple of that"
            raise ValueError(f"{key}, but the data has {len(names)} groups; {why}.")
        if (smallest := int(torch.bincount(group).min())) < per_group:
            raise ValueError(f"{key}, {per_group} per group, but the smallest group has only {smallest} samples.")
        return self.deal(group, num_clients, generator, per_group)

    def deal(self, group: Tensor, num_clients: int, generator: Generator, per_group: int) -> list[Tensor]:
        """Rows of groups that are numbered from 0, divided among ``per_group`` clients each."""
        rows, _ = rows_by_class(group, generator)
        return by_client(rows, group[rows] * per_group + rank_in_group(group[rows]) % per_group, num_clients)


def dirichlet(alpha: float, num_rows: int, num_columns: int, generator: Generator) -> Tensor:
    """Rows from a symmetric Dirichlet(α·1), ``[num_rows, num_columns]`` float64; each sums to 1.

    A row is a vector of gamma draws divided by its sum. For small α nearly all draws of Gamma(α) are below the smallest
    number, and their sum may be 0; so they are kept as logarithms, by Gamma(α) = Gamma(α+1)·U^(1/α).
    """
    shape = (num_rows, num_columns)
    gamma = torch._standard_gamma(torch.full(shape, alpha + 1.0, dtype=torch.float64), generator)
    uniform = 1 - torch.rand(shape, dtype=torch.float64, generator=generator)  # in (0, 1]
    return torch.softmax(gamma.log() + uniform.log() / alpha, dim=1)


def categorical(probabilities: Tensor, rows: Tensor, generator: Generator) -> Tensor:
    """For each of ``rows`` ``[n]`` a column drawn from that row of ``probabilities`` ``[R, C]``; none of probability 0.

    The probabilities are float64 and need not sum to 1; every row has a positive sum.
    """
    num_rows, columns = probabilities.shape
    cumulative = probabilities.cumsum(1)
    cumulative = cumulative / cumulative[:, -1:]
    # Row i is shifted to (i, i+1], so that all rows are one ascending sequence and one search serves all draws.
    # The factor keeps u + i below i + 1 in float64 for up to 10⁶ rows.
    edges = (cumulative + torch.arange(num_rows)[:, None]).flatten()
    uniform = torch.rand(len(rows), dtype=torch.float64, generator=generator) * (1 - 1e-9)
    return torch.searchsorted(edges, uniform + rows, right=True) - rows * columns


def even_sizes(total: int, parts: int) -> Tensor:
    """``total`` in ``parts`` sizes that differ by at most one, the larger ones first. ``[parts]`` int64."""
    return total // parts + (torch.arange(parts) < total % parts).long()


def apportion(total: int, weights: Tensor) -> Tensor:
    """``total`` in integer shares proportional to ``weights``, by the largest remainders. ``[len(weights)]`` int64."""
    ideal = total * (weights.double() / weights.double().sum())
    shares = ideal.floor().long()
    order = torch.argsort(ideal - shares, descending=True, stable=True)
    shares[order[: total - int(shares.sum())]] += 1
    return shares


def rows_by_class(targets: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """All rows sorted by class, in random order within each, ``[n]``; and the number of rows of each class, ``[C]``."""
    shuffled = torch.randperm(len(targets), generator=generator)
    return shuffled[torch.argsort(targets[shuffled], stable=True)], torch.bincount(targets)


def rank_in_group(groups: Tensor) -> Tensor:
    """For each entry how many entries before it have the same value: ``[3, 1, 3, 3] -> [0, 0, 1, 2]``."""
    order = torch.argsort(groups, stable=True)
    counts = torch.bincount(groups)
    first = (counts.cumsum(0) - counts)[groups[order]]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(groups)) - first
    return rank


def by_client(rows: Tensor, clients: Tensor, num_clients: int) -> list[Tensor]:
    """Rows sorted into one tensor per client, in the order given."""
    sizes = torch.bincount(clients, minlength=num_clients).tolist()
    return list(torch.split(rows[torch.argsort(clients, stable=True)], sizes))
