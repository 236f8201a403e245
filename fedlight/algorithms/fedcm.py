"""FedCM."""

from fedlight.algorithms.base import Message, Number, Sender, State, check_hyperparameter, mean_gradient
from fedlight.algorithms.fedavg import FedAvg
from fedlight.local import LocalObjective


class FedCM(FedAvg):
    """Client-level momentum: every local step follows alpha·g_i + (1 − alpha)·m, m being the last round's direction.

        m = −mean_sel(Δ_i/(S·η)),   w ← w + server_lr·mean_sel(Δ_i)

    Clients keep nothing between rounds.

    Args:
        alpha: weight of the client's own gradient, in (0, 1]; 1 is FedAvg with a plain mean.
        server_lr: length of the server's step (the paper's η_g divided by S·η).

    Source: Xu et al., "FedCM: Federated Learning with Client-level Momentum", 2021, algorithm 2.
    """

    needs_lr = True
    mean_by = "equal"
    server_zeros: tuple[str, ...] = ("momentum",)

    def __init__(self, alpha: Number = 0.1, server_lr: Number = 1.0) -> None:
        super().__init__(server_lr)
        self.alpha = check_hyperparameter("algorithm.alpha", alpha, positive=True, at_most=1)

    def broadcast(self, server: State) -> State:
        """The model and m."""
        return server

    def objective(self, received: State, client: State, weight: float) -> LocalObjective:
        """Mix the gradient with m."""
        momentum = (1 - self.alpha) * received["momentum"]
        return LocalObjective(start=received["params"], gradient_scale=self.alpha, linear=momentum)

    def contribution(self, message: Message, sender: Sender) -> State:
        """The mean gradient that the client followed."""
        return {"gradient": mean_gradient(message["update"], sender.lr_sum)}

    def aggregate(self, server: State, total: State) -> State:
        """The server's step and the new m."""
        return {**super().aggregate(server, total), "momentum": total["gradient"] / total["clients"]}
