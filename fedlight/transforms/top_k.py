"""TopK."""

import math

import torch
from torch import Tensor

from fedlight.checks import Number, check_hyperparameter, current
from fedlight.perturbations.base import State
from fedlight.transforms.base import Transform


class TopK(Transform):
    """Send the entries of largest size only; what is left out is added to what the client sends the next time.

    With e_i what the client has left out so far (error feedback), v = Δ_i + e_i, the server receives v where |v| is
    among the ``fraction`` largest and 0 elsewhere, and e_i becomes the rest of v.

    Args:
        fraction: the part of the entries that is sent, in (0, 1]; at least one is.

    Source: Stich et al., "Sparsified SGD with Memory", NeurIPS 2018, algorithm 1.
    """

    stage = 1

    def __init__(self, fraction: Number = 0.05) -> None:
        self.fraction = check_hyperparameter("trainer.transforms.fraction", fraction, positive=True, at_most=1)

    def init_client(self, vector: Tensor) -> State:
        """Nothing has been left out."""
        return {"error": torch.zeros_like(vector)}

    def encode(self, vector: Tensor, own: State, rng: torch.Generator) -> tuple[Tensor, State, State]:
        """The values that are sent, beside them their places as int32, and what is left out."""
        wanted = vector + own["error"]
        places = wanted.abs().topk(max(1, math.ceil(current(self.fraction) * wanted.numel())), sorted=False).indices
        return wanted[places], {"places": places.to(torch.int32)}, {"error": wanted.index_fill(0, places, 0.0)}

    def decode(self, vector: Tensor, beside: State, length: int) -> Tensor:
        """The values at their places, and 0 elsewhere."""
        return vector.new_zeros(length).index_copy(0, beside["places"].long(), vector)
