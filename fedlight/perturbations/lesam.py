"""LESAM."""

import torch
from torch import Tensor

from fedlight.checks import Number, check_hyperparameter
from fedlight.perturbations.base import Perturbation, State, unit


class LESAM(Perturbation):
    """A perturbation along the way that the server's model has come, which estimates the global ascent direction.

    ε = rho·d/‖d‖₂ with d = (the model that this client last received) − (the model it receives now). It is fixed
    during the round and needs no gradient of its own, so a step costs one gradient. A client that trains for the
    first time has received nothing before, and is not perturbed.

    Args:
        rho: radius.

    Source: Fan et al., "Locally Estimated Global Perturbations are Better than Local Perturbations for Federated
    Sharpness-aware Minimization", ICML 2024, equation 10. The authors' implementation takes the server's last step for
    d, for every client, and of that one entry for each parameter; here d and the norm are the paper's.
    """

    needs_gradient = False

    def __init__(self, rho: Number = 0.05) -> None:
        self.rho = check_hyperparameter("perturbation.rho", rho)

    def init_client(self, params: Tensor) -> State:
        """The model that the client last received, and whether it has received any."""
        return {"received": torch.zeros_like(params), "has_received": params.new_zeros(())}

    def begin(self, received: State, client: State, start: Tensor) -> State:
        """ε of this round."""
        direction = client["has_received"] * (client["received"] - received["params"])
        return {"epsilon": self.rho * unit(direction)}

    def epsilon(self, params: Tensor, gradient: Tensor | None, state: State) -> tuple[Tensor, State]:
        """The ε that the round began with."""
        return state["epsilon"], state

    def client_update(self, client: State, state: State, start: Tensor) -> tuple[State, State]:
        """Remember the model that the client received; nothing is sent."""
        return {"received": start, "has_received": torch.ones_like(client["has_received"])}, {}
