"""FedDyn."""

from fedlight.algorithms.base import Algorithm, Message, Number, State, Weighting, check_hyperparameter, mean_update
from fedlight.local import ClientResult, LocalObjective


class FedDyn(Algorithm):
    """A dynamic regulariser aligns the optimum of every client with that of the server.

    Client i minimises L_i(w) + alpha/(2 p_i)·‖w − (w_t − h_i)‖², where h_i is the sum of its updates so far:

        h_i ← h_i + Δ_i,   w ← mean_sel(w_i) + mean_all(h)

    The paper's ∇L_i of the last round is −alpha·h_i and its server state is −alpha·mean_all(h). The server keeps the
    mean over all clients as a running sum, so that clients that were not sampled are never visited.

    Args:
        alpha: weight of the regulariser. There is no FedAvg at 0, where the server would still add the mean of h.
        weighting: what p_i is: n_i / mean(n) by ``samples``, or 1 with ``equal``, the letter of the paper.

    Source: Acar et al., "Federated Learning Based on Dynamic Regularization", ICLR 2021, algorithm 1. alpha/p_i for
    clients of unequal size is that of the authors' implementation; the paper has equal ones.
    """

    mean_by = "equal"
    server_zeros: tuple[str, ...] = ("h_mean",)  # the mean of h over all clients
    client_zeros: tuple[str, ...] = ("h",)  # the sum of the client's updates

    def __init__(self, alpha: Number = 0.01, weighting: Weighting = "samples") -> None:
        self.alpha = check_hyperparameter("algorithm.alpha", alpha, positive=True)
        self.weighting = weighting

    def objective(self, received: State, client: State, weight: float) -> LocalObjective:
        """Proximal to w − h_i."""
        start = received["params"]
        return LocalObjective(start=start, anchor=start - client["h"], proximal=self.alpha / self.p(weight))

    def client_update(self, received: State, client: State, result: ClientResult) -> tuple[State, Message]:
        """Add the client's update to h_i. The server works it out from the model, so nothing more is sent."""
        return {"h": client["h"] + result.update}, {"params": result.params}

    def aggregate(self, server: State, total: State) -> State:
        """The mean model, moved by the mean of h."""
        h_mean = server["h_mean"] + total["update"] / self.num_clients
        return {**server, "params": server["params"] + mean_update(total) + h_mean, "h_mean": h_mean}
