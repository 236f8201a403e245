"""DualSAM."""

import torch
from torch import Tensor

from fedlight.checks import Number, check_hyperparameter, largest
from fedlight.perturbations.base import Perturbation, State, unit


class DualSAM(Perturbation):
    """The perturbation of FedSMOO: a dual variable per client aligns its perturbation with the others'.

    With g the gradient at w, μ_i the client's dual variable and μ the server's perturbation, in each step

        s = g − μ_i − μ,   ε = rho·s/‖s‖₂,   μ_i ← μ_i + ε − μ

    and after the round μ = rho·mean_sel(μ_i)/‖mean_sel(μ_i)‖₂.

    Args:
        rho: radius. At 0 there is no perturbation, and no second gradient.

    Source: Sun et al., "Dynamic Regularized Sharpness Aware Minimization in Federated Learning: Approaching Global
    Consistency and Smooth Landscape", ICML 2023, algorithm 1. In the paper a client sends μ_i less its last ε; as in
    the authors' implementation ε, whose norm is small beside that of the accumulated μ_i, is left out.
    """

    def __init__(self, rho: Number = 0.1) -> None:
        self.rho = check_hyperparameter("perturbation.rho", rho)
        self.needs_gradient = largest(self.rho) > 0

    def init_server(self, params: Tensor) -> State:
        """μ."""
        return {"perturbation": torch.zeros_like(params)}

    def init_client(self, params: Tensor) -> State:
        """μ_i."""
        return {"dual": torch.zeros_like(params)}

    def broadcast(self, server: State) -> State:
        """μ."""
        return server

    def begin(self, received: State, client: State, start: Tensor) -> State:
        """μ_i and μ."""
        return {"dual": client["dual"], "perturbation": received["perturbation"]}

    def epsilon(self, params: Tensor, gradient: Tensor | None, state: State) -> tuple[Tensor, State]:
        """ε and the new μ_i."""
        if gradient is None:
            return params.new_zeros(params.shape), state
        epsilon = self.rho * unit(gradient - state["dual"] - state["perturbation"])
        # A gradient that overflowed in 16-bit precision skips its step, and must not stay in the dual variable.
        moved, sound = state["dual"] + epsilon - state["perturbation"], torch.isfinite(epsilon).all()
        return epsilon, {**state, "dual": torch.where(sound, moved, state["dual"])}

    def client_update(self, client: State, state: State, start: Tensor) -> tuple[State, State]:
        """Keep μ_i, and send it."""
        return {"dual": state["dual"]}, {"dual": state["dual"]}

    def aggregate(self, server: State, total: State) -> State:
        """μ, along the mean of the clients' dual variables."""
        return {"perturbation": self.rho * unit(total["dual"] / total["clients"])}
