"""FedDC."""

from fedlight.algorithms.base import Message, Sender, State, mean_gradient
from fedlight.algorithms.feddyn import FedDyn
from fedlight.local import ClientResult, LocalObjective


class FedDC(FedDyn):
    """Each client learns its drift h_i and is corrected for it, in its parameters (as FedDyn) and in its gradient.

    Client i minimises L_i(w) + alpha/(2 p_i)·‖w − (w_t − h_i)‖² + ⟨g/p_i − g_i, w⟩, and with S steps of length η:

        h_i ← h_i + Δ_i,   g_i' = g_i − g/p_i − Δ_i/(S·η)
        w ← mean_sel(w_i) + mean_all(h),   g ← g + Σ_sel p_i (g_i' − g_i) / N

    Args:
        alpha: weight of the quadratic penalty.
        weighting: what p_i is: n_i / mean(n) by ``samples``, or 1 with ``equal``, the letter of the paper.

    Source: Gao et al., "FedDC: Federated Learning with Non-IID Data via Local Drift Decoupling and Correction", CVPR
    2022, equations 2 to 9. The paper adds each client's h_i to its model before averaging the sampled ones; the
    authors' implementation, and this one, adds the mean of h over all clients, which is the same at full participation.
    """

    needs_lr = True
    server_zeros = ("h_mean", "gradient")  # the latter is g
    client_zeros = ("h", "gradient")  # and g_i

    def broadcast(self, server: State) -> State:
        """The model and g."""
        return {"params": server["params"], "gradient": server["gradient"]}

    def objective(self, received: State, client: State, weight: float) -> LocalObjective:
        """FedDyn's, and the gradient corrected by g/p_i − g_i."""
        start, p = received["params"], self.p(weight)
        return LocalObjective(
            start=start,
            anchor=start - client["h"],
            proximal=self.alpha / p,
            linear=received["gradient"] / p - client["gradient"],
        )

    def client_update(self, received: State, client: State, result: ClientResult) -> tuple[State, Message]:
        """The new h_i and g_i, and its change for the server."""
        change = mean_gradient(result.update, result.lr_sum) - received["gradient"] / self.p(result.weight)
        state = {"h": client["h"] + result.update, "gradient": client["gradient"] + change}
        return state, {"params": result.params, "gradient_change": change}

    def contribution(self, message: Message, sender: Sender) -> State:
        """The weighted change of g_i."""
        return {"gradient_change": self.p(sender.weight) * message["gradient_change"]}

    def aggregate(self, server: State, total: State) -> State:
        """FedDyn's model, and the new g."""
        gradient = server["gradient"] + total["gradient_change"] / self.num_clients
        return {**super().aggregate(server, total), "gradient": gradient}
