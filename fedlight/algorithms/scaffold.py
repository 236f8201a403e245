"""SCAFFOLD."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedlight.algorithms.base import Algorithm, Message, State, Weighting, check_hyperparameter, mean_gradient
from fedlight.local import ClientResult, LocalObjective


class SCAFFOLD(Algorithm):
    """Control variates cancel the drift of each client: its steps follow g_i − c_i + c/p_i.

    c_i estimates the client's own gradient and c that of all clients:

        c_i' = c_i − c + (w − w_i)/(S·η)                        (the paper's option II)
        w ← w + server_lr·mean_sel(Δ_i),   c ← c + Σ_sel p_i (c_i' − c_i) / N

    Args:
        server_lr: length of the server's step.
        weighting: what p_i is: n_i / mean(n) by ``samples``, or 1 with ``equal``, the letter of the paper.

    Source: Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020,
    algorithm 1. The paper weighs clients equally; p_i = n_i / mean(n) carries it over to clients of unequal size.
    """

    needs_lr = True
    down_vectors = 2
    up_vectors = 2
    mean_by = "equal"

    def __init__(self, server_lr: float = 1.0, weighting: Weighting = "samples") -> None:
        self.server_lr = check_hyperparameter("algorithm.server_lr", server_lr, positive=True)
        self.weighting = weighting

    def init_server(self, params: Tensor) -> State:
        """The model and the server's control variate c."""
        return {"params": params, "control": torch.zeros_like(params)}

    def init_client(self, params: Tensor) -> State:
        """The client's control variate c_i."""
        return {"control": torch.zeros_like(params)}

    def objective(self, server: State, client: State, weight: float) -> LocalObjective:
        """Correct the gradient by c/p_i − c_i."""
        p = self.p(weight)
        return LocalObjective(start=self.broadcast(server), linear=server["control"] / p - client["control"])

    def client_update(self, server: State, client: State, result: ClientResult) -> tuple[State, Message]:
        """The new c_i, and its weighted change for the server."""
        control = client["control"] - server["control"] + mean_gradient(result)
        return {"control": control}, {"control_change": self.p(result.weight) * (control - client["control"])}

    def aggregate(self, server: State, results: Sequence[ClientResult], messages: Sequence[Message]) -> State:
        """The server's step and the new c."""
        control = server["control"].clone()
        for message in messages:
            control.add_(message["control_change"], alpha=1 / self.num_clients)
        return {"params": self.step(server["params"], results, self.server_lr), "control": control}
