"""FedCM."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedlight.aggregation import mean
from fedlight.algorithms.base import Algorithm, Message, State, check_hyperparameter, mean_gradient
from fedlight.local import ClientResult, LocalObjective


class FedCM(Algorithm):
    """Client-level momentum: every local step follows alpha·g_i + (1 − alpha)·m, m being the last round's direction.

        m = −mean_sel(Δ_i/(S·η)),   w ← w + server_lr·mean_sel(Δ_i)

    Clients keep nothing between rounds.

    Args:
        alpha: weight of the client's own gradient, in (0, 1]; 1 is FedAvg with a plain mean.
        server_lr: length of the server's step (the paper's η_g divided by S·η).

    Source: Xu et al., "FedCM: Federated Learning with Client-level Momentum", 2021, algorithm 2.
    """

    needs_lr = True
    down_vectors = 2
    mean_by = "equal"

    def __init__(self, alpha: float = 0.1, server_lr: float = 1.0) -> None:
        self.alpha = check_hyperparameter("algorithm.alpha", alpha, positive=True, at_most=1)
        self.server_lr = check_hyperparameter("algorithm.server_lr", server_lr, positive=True)

    def init_server(self, params: Tensor) -> State:
        """The model and the momentum m."""
        return {"params": params, "momentum": torch.zeros_like(params)}

    def objective(self, server: State, client: State, weight: float) -> LocalObjective:
        """Mix the gradient with m."""
        momentum = (1 - self.alpha) * server["momentum"]
        return LocalObjective(start=self.broadcast(server), gradient_scale=self.alpha, linear=momentum)

    def aggregate(self, server: State, results: Sequence[ClientResult], messages: Sequence[Message]) -> State:
        """The server's step and the new m."""
        params = self.step(server["params"], results, self.server_lr)
        return {"params": params, "momentum": mean([mean_gradient(r) for r in results])}
