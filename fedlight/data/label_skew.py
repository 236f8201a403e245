"""Partitions with label skew: clients differ in the classes that they hold."""

import torch
from torch import Generator, Tensor

from fedlight.checks import check_number, check_whole
from fedlight.data.partition import (
    Partitioner,
    apportion,
    by_client,
    categorical,
    dirichlet,
    even_sizes,
    rank_in_group,
    rows_by_class,
)


class DirichletClients(Partitioner):
    """Label skew with equal client sizes: each client has class proportions of its own.

    Client i draws a prior q_i ~ Dirichlet(α·1) over the classes. Then samples are handed out one at a time, to clients
    in random order: the client draws a class from q_i, among the classes that still have samples, and takes one. Sizes
    differ by at most one. Smaller α, more skew; α → ∞ approaches IID. This is the partition of FedDyn (Acar et al.,
    2021) and of "Minimizing Layerwise Activation Norm Improves Generalization in Federated Learning" (WACV 2024, where
    α is written δ).

    Args:
        alpha: concentration α > 0.
    """

    def __init__(self, alpha: float = 0.3) -> None:
        self.alpha = check_number("`data.partitioner.alpha`", alpha, positive=True)

    def split(self, targets: Tensor, num_clients: int, generator: Generator, groups: Tensor | None) -> list[Tensor]:
        """Draw priors, then a class for every place of every client, then a sample for each."""
        rows, counts = rows_by_class(targets, generator)
        prior = dirichlet(self.alpha, num_clients, len(counts), generator)
        places = torch.repeat_interleave(torch.arange(num_clients), even_sizes(len(rows), num_clients))
        places = places[torch.randperm(len(rows), generator=generator)]
        labels = _draw_from_pools(prior, places, counts, generator)
        # The k-th place that asked for a class gets the k-th sample of that class.
        taken = torch.empty_like(rows)
        taken[torch.argsort(labels, stable=True)] = rows
        return by_client(taken, places, num_clients)


def _draw_from_pools(prior: Tensor, places: Tensor, counts: Tensor, generator: Generator) -> Tensor:
    """A class for each place in turn, from its client's prior over the classes that are not used up by then.

    All places draw at once. Up to the first place whose class is used up, that is what drawing one by one gives. Every
    later place that drew a used-up class draws again from what is left, and so on: one pass per class at most. Places
    that drew another class keep it, since a draw that avoids the used-up classes is a draw from what is left.

    ``prior`` is ``[N, C]``; ``places`` has the client of each place, ``[n]``, in the order of the draws; class c comes
    ``counts[c]`` times, n in all.
    """
    left, begin = counts.clone(), 0
    labels = categorical(_restrict(prior, left), places, generator)
    while True:
        open_labels = labels[begin:]  # a view: labels are redrawn in place
        late = torch.nonzero(rank_in_group(open_labels) >= left[open_labels]).flatten()
        if len(late) == 0:
            return labels
        first = int(late[0])
        left -= torch.bincount(open_labels[:first], minlength=len(left))
        begin += first
        again = begin + torch.nonzero(left[labels[begin:]] == 0).flatten()
        labels[again] = categorical(_restrict(prior, left), places[again], generator)


def _restrict(prior: Tensor, left: Tensor) -> Tensor:
    """Priors over the classes that have samples left; a client whose prior has no mass there takes what there is."""
    restricted = prior * (left > 0)
    hopeless = restricted.sum(1, keepdim=True) == 0
    return torch.where(hopeless, left.double(), restricted)


class DirichletClasses(Partitioner):
    """Label and size skew: each class is divided among the clients by proportions of its own.

    Class after class, proportions p_c ~ Dirichlet(α·1) over the clients are drawn, clients that already hold n/N
    samples or more are passed over, and the class is cut by these proportions. The whole is drawn again until every
    client has ``min_size`` samples. As in Yurochkin et al. (2019) and Li et al. (2022).

    Args:
        alpha: concentration α > 0; smaller is more skewed.
        min_size: the least number of samples of a client.
        max_tries: how often to draw before giving up.
    """

    def __init__(self, alpha: float = 0.3, min_size: int = 1, max_tries: int = 100) -> None:
        self.alpha = check_number("`data.partitioner.alpha`", alpha, positive=True)
        self.min_size = check_whole("`data.partitioner.min_size`", min_size)
        self.max_tries = check_whole("`data.partitioner.max_tries`", max_tries)

    def split(self, targets: Tensor, num_clients: int, generator: Generator, groups: Tensor | None) -> list[Tensor]:
        """Draw numbers of samples until they meet the minimum, then cut."""
        rows, counts = rows_by_class(targets, generator)
        best = -1
        for _ in range(self.max_tries):
            shares = self._shares(counts, num_clients, generator)
            smallest = int(shares.sum(0).min())
            if smallest >= self.min_size:
                clients = torch.repeat_interleave(torch.arange(num_clients).repeat(len(counts)), shares.flatten())
                return by_client(rows, clients, num_clients)
            best = max(best, smallest)
        raise ValueError(
            f"`data.partitioner.min_size` is {self.min_size}, but in {self.max_tries} draws of DirichletClasses(alpha="
            f"{self.alpha}) for {num_clients} clients and {len(targets)} samples the smallest client had {best} at "
            f"best. {'A smaller min_size, f' if best else 'F'}ewer clients (`data.num_clients`) or a larger "
            "`data.partitioner.alpha` help."
        )

    def _shares(self, counts: Tensor, num_clients: int, generator: Generator) -> Tensor:
        """How many samples of each class each client gets, ``[C, N]``."""
        proportions = dirichlet(self.alpha, len(counts), num_clients, generator)
        shares = torch.zeros(len(counts), num_clients, dtype=torch.int64)
        sizes, cap = torch.zeros(num_clients), int(counts.sum()) / num_clients
        for label, count in enumerate(counts.tolist()):
            p = proportions[label] * (sizes < cap)
            if p.sum() == 0:
                p = (sizes < cap).double()
            shares[label] = apportion(count, p)
            sizes += shares[label]
        return shares


class Shards(Partitioner):
    """Each client holds samples of a few classes only, of different ones where that is possible.

    The samples are sorted by class and every class is cut into shards of one size, as nearly as classes allow, N·k in
    all; each client is dealt k shards. As in McMahan et al. (2017), but no shard straddles two classes, so that k is a
    bound.

    Args:
        classes_per_client: k, the greatest number of classes of a client.
    """

    def __init__(self, classes_per_client: int = 2) -> None:
        self.classes_per_client = check_whole("`data.partitioner.classes_per_client`", classes_per_client)

    def split(self, targets: Tensor, num_clients: int, generator: Generator, groups: Tensor | None) -> list[Tensor]:
        """Cut the classes into shards and deal them in k rounds of one shard per client."""
        rows, counts = rows_by_class(targets, generator)
        num_shards, present = num_clients * self.classes_per_client, (counts > 0).long()
        spare = num_shards - int(present.sum())
        what = f"`data.partitioner.classes_per_client` is {self.classes_per_client}: {num_clients} clients"
        if spare < 0:
            why = f"hold at most {num_shards} classes, but the data has {int(present.sum())}"
            raise ValueError(f"{what} {why}. Raise it or `data.num_clients`.")
        if num_shards > len(rows):
            why = f"need {num_shards} shards, but there are only {len(rows)} samples"
            raise ValueError(f"{what} {why}. Lower it or `data.num_clients`.")
        # Every class has a shard, at most one for each of its samples, and else in proportion to these.
        per_class = present + apportion(spare, counts - present) if spare else present
        classes = torch.randperm(len(counts), generator=generator)
        label_of_shard = torch.repeat_interleave(classes, per_class[classes])
        client_of_shard = _deal(label_of_shard, num_clients, generator)
        # Sample j of a class goes to its shard j mod (number of shards), which is the same as cutting shuffled samples.
        order = torch.argsort(label_of_shard, stable=True)
        first = per_class.cumsum(0) - per_class
        label = targets[rows]
        shard = first[label] + rank_in_group(label) % per_class[label]
        return by_client(rows, client_of_shard[order][shard], num_clients)


def _deal(label_of_shard: Tensor, num_clients: int, generator: Generator) -> Tensor:
    """A client for each shard, ``[S]``: each client once in N shards, none the same class twice if possible."""
    dealt: list[Tensor] = []
    for labels in torch.split(label_of_shard, num_clients):
        clients = torch.randperm(num_clients, generator=generator)
        if dealt:
            # The class that continues from the round before goes to clients that have none of it yet, first.
            continued = dealt[-1][label_of_shard[(len(dealt) - 1) * num_clients :][:num_clients] == labels[0]]
            fresh = ~torch.isin(clients, continued)
            front = clients[fresh][: int((labels == labels[0]).sum())]
            clients = torch.cat([front, clients[~torch.isin(clients, front)]])
        dealt.append(clients)
    return torch.cat(dealt)
