"""Random draws, integer shares and checks that partitions are made of. Pure functions of their arguments."""

import torch
from torch import Tensor


def dirichlet(alpha: float, num_rows: int, num_columns: int, generator: torch.Generator) -> Tensor:
    """Rows from a symmetric Dirichlet(α·1), ``[num_rows, num_columns]`` float64; each sums to 1.

    A row is a vector of gamma draws divided by its sum. For small α nearly all draws of Gamma(α) are below the smallest
    number, and their sum may be 0; so they are kept as logarithms, by Gamma(α) = Gamma(α+1)·U^(1/α).
    """
    shape = (num_rows, num_columns)
    gamma = torch._standard_gamma(torch.full(shape, alpha + 1.0, dtype=torch.float64), generator)
    uniform = 1 - torch.rand(shape, dtype=torch.float64, generator=generator)  # in (0, 1]
    return torch.softmax(gamma.log() + uniform.log() / alpha, dim=1)


def categorical(probabilities: Tensor, rows: Tensor, generator: torch.Generator) -> Tensor:
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


def rows_by_class(targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
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


def check_min_size(min_size: int, num_clients: int, num_samples: int) -> None:
    """Raise an error where the clients' minimum sizes add up to more than there is."""
    if min_size * num_clients > num_samples:
        raise ValueError(
            f"`data.partitioner.min_size` is {min_size}, but {num_clients} clients with {min_size} samples each need "
            f"{min_size * num_clients}, and there are {num_samples}. Lower min_size or `data.num_clients`."
        )
