"""What hostile clients do."""

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from fedlight.perturbations.base import State
from fedlight.seeding import generator
from fedlight.server.sampling import draw_subset
from fedlight.transforms.base import Transform


class Attack(Transform):
    """Base of attacks: what some clients send, or train on, instead of what an algorithm asks of them.

    All others send the same bits as without. Attacks come first in a chain: what bounds updates, bounds theirs, too.

    Args:
        clients: who attacks: indices, or a number (an int) or part (a float) of all clients, drawn by (seed, "attack"),
            for all attacks the same.

    Attributes:
        colludes: whether attackers wait for one another (:meth:`meet`) before they send.
        attackers: who attacks; set by :meth:`setup`, as ``num_classes`` is, C or None.
    """

    stage = -1
    colludes: bool = False
    attackers: frozenset[int] = frozenset()
    num_classes: int | None = None

    def __init__(self, clients: list[int] | int | float = 0.2) -> None:
        several = isinstance(clients, list) and all(isinstance(client, Integral) for client in clients)
        part = isinstance(clients, float) and 0 < clients <= 1
        if not ((several and clients) or part or (type(clients) is int and clients > 0)):
            what = "a list of clients, or a number (an int) or part (a float up to 1) of all"
            raise MisconfigurationException(f"trainer.transforms.clients={clients!r} must be {what}.")
        self.clients = clients

    def setup(self, num_clients: int, seed: int, num_classes: int | None = None) -> None:
        """Find out who attacks."""
        chosen = self.clients
        if not isinstance(chosen, list):
            count = chosen if isinstance(chosen, int) else max(1, round(chosen * num_clients))
            if count > num_clients:
                raise MisconfigurationException(f"trainer.transforms.clients={count} of {num_clients} clients.")
            chosen = draw_subset(num_clients, count, generator(seed, "attack")).tolist()
        if beyond := [client for client in chosen if client not in range(num_clients)]:
            raise MisconfigurationException(f"trainer.transforms.clients: there is no {beyond} among {num_clients}.")
        self.attackers, self.num_classes = frozenset(chosen), num_classes

    def train_data(self, dataset: Any) -> Any:
        """What an attacker trains on instead of its data."""
        return dataset

    def meet(self, updates: Tensor) -> None:
        """Called in each round where it :attr:`colludes`, before they send, with what they have trained, ``[A, P]``."""

    def encode(self, vector: Tensor, own: State, rng: torch.Generator) -> tuple[Tensor, State, State]:
        """What :meth:`forge` makes of it."""
        return self.forge(vector, rng), {}, own

    def forge(self, vector: Tensor, rng: torch.Generator) -> Tensor:
        """What an attacker sends instead of a vector ``[n]``."""
        return vector


def attacks_by(transforms: Iterable[Transform], client: int | None = None) -> list[Attack]:
    """The attacks of a chain, or those of one client."""
    return [t for t in transforms if isinstance(t, Attack) and (client is None or client in t.attackers)]


def chain_of(transforms: Sequence[Transform], client: int) -> list[Transform]:
    """The chain with nothing in the place of attacks that are not this client's."""
    return [Transform() if isinstance(t, Attack) and client not in t.attackers else t for t in transforms]
