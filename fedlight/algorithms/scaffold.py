"""SCAFFOLD."""

import torch
from torch import Tensor

from fedlight.algorithms.base import (
    Algorithm,
    Message,
    Sender,
    State,
    Weighting,
    check_hyperparameter,
    mean_gradient,
    mean_update,
)
from fedlight.checks import Number
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
    mean_by = "equal"

    def __init__(self, server_lr: Number = 1.0, weighting: Weighting = "samples") -> None:
        self.server_lr = check_hyperparameter("algorithm.server_lr", server_lr, positive=True)
        self.weighting = weighting

    def init_server(self, params: Tensor) -> State:
        """The model and the server's control variate c."""
        return {"params": params, "control": torch.zeros_like(params)}

    def init_client(self, params: Tensor) -> State:
        """The client's control variate c_i."""
        return {"control": torch.zeros_like(params)}

    def broadcast(self, server: State) -> State:
        """The model and c."""
        return {"params": server["params"], "control": server["control"]}

    def objective(self, received: State, client: State, weight: float) -> LocalObjective:
        """Correct the gradient by c/p_i − c_i."""
        return LocalObjective(start=received["params"], linear=received["control"] / self.p(weight) - client["control"])

    def client_update(self, received: State, client: State, result: ClientResult) -> tuple[State, Message]:
        """The new c_i, and its change for the server."""
        change = mean_gradient(result.update, result.lr_sum) - received["control"]
        return {"control": client["control"] + change}, {"params": result.params, "control_change": change}

    def contribution(self, message: Message, sender: Sender) -> State:
        """The weighted change of c_i."""
        return {"control_change": self.p(sender.weight) * message["control_change"]}

    def aggregate(self, server: State, total: State) -> State:
        """The server's step and the new c."""
        control = server["control"] + total["control_change"] / self.num_clients
        return {"params": server["params"] + self.server_lr * mean_update(total), "control": control}
