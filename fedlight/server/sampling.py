"""Which clients train in a round."""

import math
from collections import Counter
from collections.abc import Sequence

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from fedlight.seeding import generator


def resolve_clients_per_round(clients_per_round: int | float, num_clients: int) -> int:
    """K from ``trainer.clients_per_round``: a number of clients, or (a float up to 1) a fraction of all, at least one.

    Raises:
        MisconfigurationException: if it is not positive or exceeds N.
    """
    if isinstance(clients_per_round, float):
        if not 0 < clients_per_round <= 1:
            raise MisconfigurationException(
                f"trainer.clients_per_round={clients_per_round} must be a number of clients or a fraction in (0, 1]."
            )
        return max(1, round(clients_per_round * num_clients))
    if not 0 < clients_per_round <= num_clients:
        raise MisconfigurationException(
            f"trainer.clients_per_round={clients_per_round} must lie between 1 and data.num_clients={num_clients}"
            " (without data.held_out_clients). Lower it, or give a fraction such as 0.1."
        )
    return clients_per_round


class Sampler:
    """Base of the samplers: a pure function of the round and a generator.

    The trainer sets :attr:`num_clients`, :attr:`clients_per_round` and :attr:`sizes` by :meth:`setup`.
    """

    num_clients: int = 0
    clients_per_round: int = 0
    sizes: Tensor

    def setup(self, num_clients: int, clients_per_round: int | float, sizes: Tensor) -> None:
        """Called once before training.

        Args:
            num_clients: N.
            clients_per_round: ``trainer.clients_per_round``.
            sizes: samples of every client, ``[N]``; a client without any is never sampled.
        """
        self.num_clients = num_clients
        self.sizes = sizes
        self.candidates = sizes.nonzero().flatten()
        if len(self.candidates) == 0:
            raise MisconfigurationException("data: every client is empty, so there is nothing to train on.")
        wanted = resolve_clients_per_round(clients_per_round, num_clients)
        self.clients_per_round = min(wanted, len(self.candidates))

    def sample(self, round: int, rng: torch.Generator) -> list[int]:
        """The clients of a round, in increasing order, at least one (none for ``Bernoulli(redraw=False)``)."""
        raise NotImplementedError(f"{type(self).__name__} must define sample")


class Uniform(Sampler):
    """A fixed number of clients, drawn without replacement."""

    def sample(self, round: int, rng: torch.Generator) -> list[int]:
        """K clients, each subset equally likely."""
        chosen = draw_subset(len(self.candidates), self.clients_per_round, rng)
        return sorted(self.candidates[chosen].tolist())


class Bernoulli(Sampler):
    """Each client is active with probability K/N, independently.

    Args:
        redraw: whether a round without any is drawn again (the MAN paper's setting); DifferentialPrivacy needs false.
    """

    def __init__(self, redraw: bool = True) -> None:
        self.redraw = redraw

    def sample(self, round: int, rng: torch.Generator) -> list[int]:
        """The active clients; their number varies from round to round."""
        count = torch.tensor(len(self.candidates), dtype=torch.float64)
        # How many are active is binomial, and of so many every subset is equally likely.
        p = self.clients_per_round / count
        while not (active := int(torch.binomial(count, p, rng))) and self.redraw:
            pass
        return sorted(self.candidates[draw_subset(len(self.candidates), active, rng)].tolist())


class WeightedBySamples(Sampler):
    """A fixed number of clients, drawn without replacement with probability proportional to their samples."""

    def sample(self, round: int, rng: torch.Generator) -> list[int]:
        """K clients; larger ones come more often."""
        # Exponential races: the K smallest of Exp(1)/n_i are a draw without replacement, for any N.
        uniform = torch.rand(len(self.candidates), generator=rng, dtype=torch.float64).clamp_min(1e-300)
        race = -uniform.log() / self.sizes[self.candidates].double()
        return sorted(self.candidates[race.topk(self.clients_per_round, largest=False).indices].tolist())


class RoundRobin(Sampler):
    """Clients in turn: round t takes the next K, and begins again after the last."""

    def sample(self, round: int, rng: torch.Generator) -> list[int]:
        """K clients; every client trains once in N/K rounds."""
        n, k = len(self.candidates), self.clients_per_round
        return sorted(int(self.candidates[(round * k + j) % n]) for j in range(k))


def draw(sampler: Sampler, round: int, seed: int) -> list[int]:
    """The clients of a round, in increasing order, as ``sampler`` draws them by (seed, "sampling", round).

    Raises:
        MisconfigurationException: if it draws one twice, or one that does not exist.
    """
    clients = sorted(map(int, sampler.sample(round, generator(seed, "sampling", round))))  # each tensor is another key
    if len({*clients}) < len(clients) or not all(0 <= client < sampler.num_clients for client in clients):
        what = f"draws {clients[:20]}; it may draw each client once, by numbers below {sampler.num_clients}"
        raise MisconfigurationException(f"trainer.sampler: {type(sampler).__name__} {what}.")
    return clients


def draw_subset(n: int, k: int, rng: torch.Generator) -> Tensor:
    """``k`` of ``0 .. n - 1``, each subset equally likely, in O(k) (Floyd's algorithm). ``[k]`` int64, ascending."""
    uniform = torch.rand(k, generator=rng, dtype=torch.float64).tolist()
    chosen: set[int] = set()
    for last, u in zip(range(n - k, n), uniform, strict=True):
        candidate = int(u * (last + 1))  # in 0 .. last
        chosen.add(last if candidate in chosen else candidate)
    return torch.tensor(sorted(chosen), dtype=torch.int64)


def balance(clients: list[int], sizes: Tensor, owners: Sequence[int], ranks: int) -> list[list[int]]:
    """Share clients among ranks, so that all have about as much to do; each share in increasing order.

    Of clients of one size, as many as possible go to the ranks that own them.
    """
    if ranks == 1:
        return [sorted(clients)]
    size_of = dict(zip(clients, sizes[clients].tolist(), strict=True))
    room: dict[int, Counter[int]] = {size: Counter() for size in size_of.values()}
    for rank, mine in enumerate(share(list(size_of.values()), ranks)):
        for i in mine:
            room[size_of[clients[i]]][rank] += 1
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for at_home in (True, False):
        for client in [c for c in clients if c in size_of]:
            left = room[size_of[client]]
            rank = owners[client] if at_home else max(left, key=left.__getitem__)
            if left[rank]:
                left[rank] -= 1
                shares[rank].append(client)
                del size_of[client]
    return [sorted(mine) for mine in shares]


def share(sizes: Sequence[int], parts: int) -> list[list[int]]:
    """Share what has these sizes, by position: the largest first, to the part that has least to do."""
    load, shares = [0] * parts, [list[int]() for _ in range(parts)]
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        part = min(range(parts), key=lambda p: (load[p], p))
        shares[part].append(i)
        load[part] += max(1, sizes[i])
    return shares


def expected_clients(sampler: Sampler) -> int:
    """The number of clients to plan for in a round; under Bernoulli sampling it is rarely exceeded."""
    k, n = sampler.clients_per_round, max(1, len(sampler.candidates))
    if isinstance(sampler, Bernoulli):
        return min(n, math.ceil(k + 2 * math.sqrt(k * (1 - k / n))))
    return k
