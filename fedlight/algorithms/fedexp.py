"""FedExP."""

import torch
from torch import Tensor

from fedlight.algorithms.base import Algorithm, Message, Number, Sender, State, check_hyperparameter, mean_update


class FedExP(Algorithm):
    """The server's step is longer the more the updates of the round's K clients disagree: w ← w + η_g·mean_sel(Δ_i).

    With η_g = max(1, Σ_sel ‖Δ_i‖² / (2K·(‖mean_sel(Δ_i)‖² + eps))). As such steps swing, the view ``server`` is the
    mean of the last two models; the next round starts from the last.

    Args:
        eps: keeps the step finite where updates cancel each other; it is to be small beside ‖mean_sel(Δ_i)‖².

    Source: Jhunjhunwala et al., "FedExP: Speeding up Federated Averaging via Extrapolation", ICLR 2023. Read
    was the authors' code, which weighs by samples, adds K·eps, and lets eps fall with the square of the learning rate.
    """

    mean_by = "equal"

    def __init__(self, eps: Number = 0.001) -> None:
        self.eps = check_hyperparameter("algorithm.eps", eps, positive=True)

    def contribution(self, message: Message, sender: Sender) -> State:
        """‖Δ_i‖²."""
        return {"square": torch.dot(message["update"], message["update"])}

    def aggregate(self, server: State, total: State) -> State:
        """The extrapolated step."""
        step = mean_update(total)
        length = total["square"] / (2 * total["clients"] * (torch.dot(step, step) + self.eps))
        return {"params": server["params"] + length.clamp(min=1.0) * step}

    def evaluated(self, server: State, received: State, total: State) -> dict[str, Tensor]:
        """The mean of the last two models, and that of the clients."""
        return {**super().evaluated(server, received, total), "server": (server["params"] + received["params"]) / 2}
