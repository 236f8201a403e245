"""FedWMSAM."""

import torch
from torch import Tensor

from fedlight.algorithms.base import Message, Number, Sender, State, check_hyperparameter, mean_gradient
from fedlight.algorithms.fedcm import FedCM
from fedlight.checks import check_number
from fedlight.local import ClientResult, LocalObjective
from fedlight.perturbations.base import Perturbation, unit


class TowardsMomentum(Perturbation):
    """A perturbation to where the momentum would have led: ε = rho·δ/‖δ‖₂, δ = w + b·m_i − w_b; b counts from 0."""

    needs_gradient = False

    def __init__(self, rho: float) -> None:
        self.rho = rho

    def begin(self, received: State, client: State, start: Tensor) -> State:
        """Where the momentum has led so far, and m_i."""
        return {"target": start, "momentum": personal(received, client)}

    def epsilon(self, params: Tensor, gradient: Tensor | None, state: State) -> tuple[Tensor, State]:
        """ε; 0 in the first step."""
        return self.rho * unit(state["target"] - params), {**state, "target": state["target"] + state["momentum"]}


class FedWMSAM(FedCM):
    """The server's momentum, corrected for each client, in every step and in the perturbation; one gradient per step.

    With c_i and c as in SCAFFOLD and m_i = m + alpha/(1 − alpha)·(c − c_i), steps follow alpha·g + (1 − alpha)·m_i,
    where g is taken at distance rho towards w + b·m_i in step b. m and w are FedCM's, and

        c_i' = c_i − c − Δ_i/(S·η),   c ← c + Σ_sel (c_i' − c_i)/N
        alpha ← (1 − speed)·alpha + speed·(1 + mean_sel(cos(Δ_i, m))) within 0.1 and 0.9, with the m of before

    Args:
        rho: radius of the perturbation.
        alpha: weight of the client's own gradient at the beginning, in (0, 1).
        speed: how fast alpha adapts, in [0, 1]; 0 leaves it constant.
        server_lr: length of the server's step.

    Source: Li et al., "FedWMSAM: Fast and Flat Federated Learning via Weighted Momentum and Sharpness-Aware
    Minimization", NeurIPS 2025: the authors' README; how alpha adapts, their code. That code turns the perturbation
    round, and takes one entry of δ for each parameter; here δ is the paper's.
    """

    server_zeros = ("momentum", "control")  # m and c
    client_zeros = ("control",)  # c_i

    def __init__(self, rho: Number = 0.01, alpha: float = 0.1, speed: Number = 0.01, server_lr: Number = 1.0) -> None:
        super().__init__(check_number("algorithm.alpha", alpha, positive=True, below=1), server_lr)
        self.speed = check_hyperparameter("algorithm.speed", speed, at_most=1)
        self.perturbation = TowardsMomentum(check_hyperparameter("algorithm.rho", rho))

    def init_server(self, params: Tensor) -> State:
        """The model, m, c and alpha."""
        return {**super().init_server(params), "alpha": params.new_full((), self.alpha)}

    def objective(self, received: State, client: State, weight: float) -> LocalObjective:
        """Mix the gradient with m_i."""
        alpha, own = received["alpha"], personal(received, client)
        return LocalObjective(received["params"], gradient_scale=alpha, linear=(1 - alpha) * own)

    def client_update(self, received: State, client: State, result: ClientResult) -> tuple[State, Message]:
        """The new c_i. The server works out its change from the model, so nothing more is sent."""
        change = mean_gradient(result.update, result.lr_sum) - received["control"]
        return {"control": client["control"] + change}, {"params": result.params}

    def contribution(self, message: Message, sender: Sender) -> State:
        """The mean gradient that the client followed, and the direction of its update."""
        return {**super().contribution(message, sender), "direction": unit(message["update"])}

    def aggregate(self, server: State, total: State) -> State:
        """FedCM's, and the new c and alpha."""
        agreement = torch.dot(total["direction"] / total["clients"], unit(server["momentum"].double()))
        aim = ((1 + agreement) * server["momentum"].any()).clamp(0.1, 0.9)  # 0.1 while there is no momentum
        alpha = (1 - self.speed) * server["alpha"] + self.speed * aim
        control = server["control"] + (total["gradient"] - total["clients"] * server["control"]) / self.num_clients
        return {**super().aggregate(server, total), "control": control, "alpha": alpha}


def personal(received: State, client: State) -> Tensor:
    """m_i, ``[P]``."""
    alpha = received["alpha"]
    return received["momentum"] + alpha / (1 - alpha) * (received["control"] - client["control"])
