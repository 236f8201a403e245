"""What takes the place of the mean of a round's updates, so that a few hostile clients cannot steer it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from fedlight.checks import check_number, check_whole
from fedlight.perturbations.base import Perturbation, State

_COLUMNS = 2**18
_KEY = "trainer.aggregator"


class Aggregator:
    """Base of all aggregators: what they make of K updates stands where an algorithm expects their mean.

    The server's step goes along it, whatever that is, and averaged buffers follow the same rule. Every process has all
    K updates. An aggregator holds its settings and nothing else.

    Attributes:
        min_clients: how many clients a round must have.
    """

    min_clients: int = 3

    def tolerates(self, clients: int) -> int:
        """How many of a round's clients may be hostile: by default, less than half."""
        return (clients - 1) // 2

    def __call__(self, values: Tensor, updates: Tensor, weights: Tensor) -> Tensor:
        """One vector for K.

        Args:
            values: Δ_i and behind it how far averaged buffers have moved, ``[K, P + B]`` float64, by client.
            updates: Δ_i alone, ``[K, P]``: what clients are compared by.
            weights: what each weighs in the algorithm's mean, ``[K]`` float64.
        """
        raise NotImplementedError(f"{type(self).__name__} must define __call__")


class Median(Aggregator):
    """The median of each entry, all clients of one weight; of an even number the mean of the two in the middle.

    Source: Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018,
    definition 1. It tolerates less than half of the clients.
    """

    def __call__(self, values: Tensor, updates: Tensor, weights: Tensor) -> Tensor:
        """The mean of what :meth:`tolerates` leaves of each entry's values, from either end."""
        ends, parts = self.tolerates(len(values)), torch.split(values, _COLUMNS, dim=1)
        return torch.cat([part.sort(dim=0).values[ends : len(values) - ends].mean(0) for part in parts])


class TrimmedMean(Median):
    """The mean of each entry without its ⌊trim·K⌋ largest and as many smallest values, all clients of one weight.

    Args:
        trim: β, below 1/2. A round must have so many clients that one value is left out at either end.

    Source: Yin et al., ICML 2018, definition 2. It tolerates ⌊trim·K⌋ hostile clients.
    """

    def __init__(self, trim: float = 0.2) -> None:
        if not 0 < trim < 0.5:
            raise MisconfigurationException(f"{_KEY}.trim={trim!r} must be above 0, and 2·trim·K below K clients.")
        self.trim = trim
        self.min_clients = next(k for k in range(3, 2**30) if self.tolerates(k))

    def tolerates(self, clients: int) -> int:
        """⌊trim·K⌋."""
        return int(self.trim * clients + 1e-9)


class GeometricMedian(Aggregator):
    """RFA: the vector v with the least Σ α_i·‖v − Δ_i‖, where α_i are the weights of the algorithm's own mean.

    By the smoothed Weiszfeld algorithm, from v = 0, the model that was broadcast:

        β_i = α_i / max(smoothing, ‖v − Δ_i‖),   v ← Σ β_i Δ_i / Σ β_i

    Args:
        iterations: how often; the paper makes do with 3.
        smoothing: ν, so that nothing is divided by 0.

    Source: Pillutla et al., "Robust Aggregation for Federated Learning", IEEE Transactions on Signal Processing 2022,
    algorithm 2. It tolerates less than half of the weight: of the samples, where the algorithm weighs by them.
    """

    def __init__(self, iterations: int = 10, smoothing: float = 1e-6) -> None:
        self.iterations = check_whole(f"{_KEY}.iterations", iterations)
        self.smoothing = check_number(f"{_KEY}.smoothing", smoothing, positive=True)

    def __call__(self, values: Tensor, updates: Tensor, weights: Tensor) -> Tensor:
        """What Weiszfeld's weights make of the values."""
        center, shares = torch.zeros_like(updates[0]), weights
        for _ in range(self.iterations):
            shares = weights / torch.linalg.vector_norm(updates - center, dim=1).clamp(min=self.smoothing)
            shares = shares / shares.sum()
            center = shares @ updates
        return shares @ values


class Krum(Aggregator):
    """The update that lies closest to its K − f − 2 nearest ones; with ``keep`` the mean of so many (multi-Krum).

    Client i's score is Σ ‖Δ_i − Δ_j‖² over these. The lowest scores (of equal ones, the first) weigh equally.

    Args:
        attackers: f, how many hostile clients a round may have. It needs K ≥ 2f + 3.
        keep: m, of which the mean is taken. It needs K ≥ f + 2 + m.

    Source: Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS 2017,
    section 4; m ≤ K − f − 2: El Mhamdi et al., "The Hidden Vulnerability of Distributed Learning in Byzantium", 2018.
    """

    def __init__(self, attackers: int = 1, keep: int = 1) -> None:
        self.attackers, self.keep = check_whole(f"{_KEY}.attackers", attackers, 0), keep
        self.min_clients = max(2 * self.attackers + 3, self.attackers + 2 + check_whole(f"{_KEY}.keep", keep))

    def tolerates(self, clients: int) -> int:
        """``attackers``."""
        return self.attackers

    def __call__(self, values: Tensor, updates: Tensor, weights: Tensor) -> Tensor:
        """The mean of those with the lowest scores."""
        near = updates - updates.median(0).values  # or what updates have in common would drown their differences
        square = near.square().sum(1)
        distances = (square[:, None] + square - 2 * near @ near.T).clamp(min=0).fill_diagonal_(0)
        scores = distances.sort(dim=1).values[:, 1 : len(updates) - self.attackers - 1].sum(1)
        return values[scores.sort(stable=True).indices[: self.keep].sort().values].mean(0)


def check_aggregator(settings: Mapping[str, Any], perturbation: Perturbation | None) -> None:
    """Refuse what a trainer's aggregator cannot stand in for."""
    aggregator, algorithm = settings["aggregator"], settings["algorithm"]
    name = f"{_KEY}: {type(aggregator).__name__}"
    sends = perturbation is not None and type(perturbation).aggregate is not Perturbation.aggregate
    private = any(t.stage == 3 for t in settings["transforms"])
    reasons = (
        not isinstance(aggregator, Aggregator) and f"{name} is no Aggregator.",
        not algorithm.sums_updates
        and f"{name} takes the place of the mean of the updates, and {type(algorithm).__name__} makes more than that of"
        " what clients send. Use another, as FedAvg, FedProx, FedDyn, FedOpt.",
        sends and f"{name} would leave what clients send for {type(perturbation).__name__} to a mean. Use SAM, say.",
        private and f"{name} is no sum, as DifferentialPrivacy needs. Leave one of them.",
    )
    if aggregator is not None and any(reasons):
        raise MisconfigurationException(next(filter(None, reasons)))


def in_place_of_sums(aggregator: Aggregator, sent: Sequence[State], weights: Sequence[float]) -> State:
    """What is made of K clients' ``update`` and buffers (without what has not moved), times Σ weight, as their sums."""
    like = {name: value for state in sent for name, value in state.items()}
    names = sorted(like, reverse=True)  # update, and then buffers
    rows = [torch.cat([state.get(name, torch.zeros_like(like[name])).flatten() for name in names]) for state in sent]
    values, shares = torch.stack(rows), sent[0]["update"].new_tensor(weights)
    found: Any = aggregator(values, values[:, : like["update"].numel()], shares)
    if not isinstance(found, Tensor) or found.shape != values.shape[1:]:
        what = f"{list(values.shape)} {list(found.shape) if isinstance(found, Tensor) else type(found).__name__}"
        raise TypeError(f"{_KEY}: {type(aggregator).__name__} makes of {what}; it must be a tensor of one row.")
    parts = torch.split(found * shares.sum(), [like[name].numel() for name in names])
    return {name: part.view_as(like[name]) for name, part in zip(names, parts, strict=True)}
