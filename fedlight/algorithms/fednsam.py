"""FedNSAM."""

from typing import Literal

from torch import Tensor

from fedlight.algorithms.base import Number, State, check_hyperparameter
from fedlight.algorithms.fedacg import FedACG
from fedlight.perturbations.base import Perturbation
from fedlight.perturbations.sam import SAM


class AlongMomentum(Perturbation):
    """Gradients are taken at w + gamma·m, m being the momentum that was received."""

    needs_gradient = False

    def __init__(self, gamma: float) -> None:
        self.gamma = gamma

    def begin(self, received: State, client: State, start: Tensor) -> State:
        """ε of this round."""
        return {"epsilon": self.gamma * received["momentum"]}

    def epsilon(self, params: Tensor, gradient: Tensor | None, state: State) -> tuple[Tensor, State]:
        """The ε that the round began with."""
        return state["epsilon"], state


class FedNSAM(FedACG):
    """Clients look ahead along the server's Nesterov momentum and flatten: m ← gamma·m + mean_sel(Δ_i), w ← w + m.

    ``along: gradient`` starts them at w + gamma·m, with SAM's gradients; ``along: momentum`` starts them at w and takes
    each gradient at their model plus gamma·m, which is one gradient per step, and sends m as well.

    Args:
        rho: radius of SAM; of no effect along the momentum.
        gamma: the momentum, in [0, 1).
        along: what the perturbation follows.

    Source: Liu et al., "FedNSAM: Consistency of Local and Global Flatness for Federated Learning", 2026. Only the
    abstract could be read: both variants are the authors' code, that of FedNSAM (``momentum``) and beside FedSWA.
    """

    def __init__(
        self, rho: Number = 0.05, gamma: Number = 0.85, along: Literal["gradient", "momentum"] = "gradient"
    ) -> None:
        super().__init__(check_hyperparameter("algorithm.gamma", gamma, below=1), beta=0.0)
        if along not in ("gradient", "momentum"):
            raise ValueError(f"algorithm.along must be 'gradient' or 'momentum', found {along!r}.")
        self.along, sam = along, SAM(check_hyperparameter("algorithm.rho", rho))
        self.perturbation = sam if along == "gradient" else AlongMomentum(self.momentum)

    def broadcast(self, server: State) -> State:
        """The model ahead, or the model and m."""
        return super().broadcast(server) if self.along == "gradient" else server
