"""GaussianAttack."""

import torch
from torch import Tensor

from fedlight.checks import Number, check_hyperparameter, current
from fedlight.transforms.attack import Attack


class GaussianAttack(Attack):
    """Attackers send N(0, std²·I) in the place of their updates.

    Args:
        std: standard deviation of each entry.
        clients: who attacks: indices, or a number or part of all clients.

    Source: Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS 2017,
    section 5, with std = 200.
    """

    def __init__(self, std: Number = 1.0, clients: list[int] | int | float = 0.2) -> None:
        super().__init__(clients)
        self.std = check_hyperparameter("trainer.transforms.std", std, positive=True)

    def forge(self, vector: Tensor, rng: torch.Generator) -> Tensor:
        """Noise."""
        return (current(self.std) * torch.randn(vector.shape, generator=rng, dtype=vector.dtype)).to(vector.device)
