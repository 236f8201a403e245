"""FedVARP."""

from fedlight.algorithms.base import Message, Sender, State
from fedlight.algorithms.fedavg import FedAvg


class FedVARP(FedAvg):
    """The last updates of absent clients stand in for them, so that sampling adds no variance.

    The server keeps each client's last update y_i, 0 at first: w ← w + server_lr·(mean_sel(Δ_i − y_i) + mean_all(y))
    with those of before the round, then y_i ← Δ_i.

    Args:
        server_lr: length of the server's step.

    Source: Jhunjhunwala et al., "FedVARP: Tackling the Variance Due to Partial Client Participation in Federated
    Learning", UAI 2022, as public code states it: updates divided by S·η, which the server multiplies by.
    """

    mean_by = "equal"
    keeps_updates = True
    server_zeros = ("last_mean",)  # of y over all clients, as a running sum

    def contribution(self, message: Message, sender: Sender) -> State:
        """What is new of the update."""
        return {"news": message["update"] - message["last_update"]}

    def aggregate(self, server: State, total: State) -> State:
        """The step along the estimate of all clients' mean update, and the new mean of y."""
        step = total["news"] / total["clients"] + server["last_mean"]
        last_mean = server["last_mean"] + total["news"] / self.num_clients
        return {"params": server["params"] + self.server_lr * step, "last_mean": last_mean}
