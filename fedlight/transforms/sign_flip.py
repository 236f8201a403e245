"""SignFlip."""

import torch
from torch import Tensor

from fedlight.checks import Number, check_hyperparameter, current
from fedlight.transforms.attack import Attack


class SignFlip(Attack):
    """Attackers send −scale·Δ_i.

    Args:
        scale: how much longer than the update.
        clients: who attacks: indices, or a number or part of all clients.

    Source: Li et al., "RSA: Byzantine-Robust Stochastic Aggregation Methods for Distributed Learning from Heterogeneous
    Datasets", AAAI 2019, section 5.
    """

    def __init__(self, scale: Number = 1.0, clients: list[int] | int | float = 0.2) -> None:
        super().__init__(clients)
        self.scale = check_hyperparameter("trainer.transforms.scale", scale, positive=True)

    def forge(self, vector: Tensor, rng: torch.Generator) -> Tensor:
        """The flipped update."""
        return vector * -current(self.scale)
