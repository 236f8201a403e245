"""SCAFFOLD."""

from fedlight.algorithms.base import Message, Number, Sender, State, Weighting, mean_gradient
from fedlight.algorithms.fedavg import FedAvg
from fedlight.local import ClientResult, LocalObjective


class SCAFFOLD(FedAvg):
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
    server_zeros = client_zeros = ("control",)  # c, and c_i

    def __init__(self, server_lr: Number = 1.0, weighting: Weighting = "samples") -> None:
        super().__init__(server_lr)
        self.weighting = weighting

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
        return {**super().aggregate(server, total), "control": control}
