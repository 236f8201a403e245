"""ClipUpdate."""

import torch
from torch import Tensor

from fedlight.checks import Number, check_hyperparameter, current
from fedlight.perturbations.base import State
from fedlight.transforms.base import Transform


class ClipUpdate(Transform):
    """Shorten updates that are longer than a bound: Δ_i ← Δ_i·min(1, norm/‖Δ_i‖₂).

    Args:
        norm: the bound.

    Source: McMahan et al., "Learning Differentially Private Recurrent Language Models", ICLR 2018, algorithm 1.
    """

    update_only = True

    def __init__(self, norm: Number = 1.0) -> None:
        self.norm = check_hyperparameter("trainer.transforms.norm", norm, positive=True)

    def encode(self, vector: Tensor, own: State, rng: torch.Generator) -> tuple[Tensor, State, State]:
        """The clipped update."""
        length = torch.linalg.vector_norm(vector, dtype=torch.float64)
        factor = torch.clamp(current(self.norm) / length, max=1.0)  # infinite where the update is 0, and so 1
        return vector * factor.to(vector.dtype), {}, own
