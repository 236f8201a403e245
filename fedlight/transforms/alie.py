"""ALIE."""

import torch
from torch import Tensor

from fedlight.checks import Number, check_hyperparameter, current
from fedlight.transforms.attack import Attack


class ALIE(Attack):
    """A little is enough: all attackers of a round send mean − z·std, by entry, of what they have trained themselves.

    They know one another's updates, and no honest client's. One alone has no deviation, and sends its update.

    Args:
        z: how many standard deviations.
        clients: who attacks: indices, or a number or part of all clients.

    Source: Baruch et al., "A Little Is Enough: Circumventing Defenses For Distributed Learning", NeurIPS 2019,
    algorithm 3; the paper works z out of the numbers of clients and attackers.
    """

    update_only = True
    colludes = True
    _sent: Tensor | None = None

    def __init__(self, z: Number = 1.5, clients: list[int] | int | float = 0.2) -> None:
        super().__init__(clients)
        self.z = check_hyperparameter("trainer.transforms.z", z)

    def meet(self, updates: Tensor) -> None:
        """Agree on what all of them send."""
        self._sent = updates.mean(0) - current(self.z) * updates.std(0, unbiased=False)

    def forge(self, vector: Tensor, rng: torch.Generator) -> Tensor:
        """What they have agreed on."""
        return vector if self._sent is None else self._sent.to(vector)
