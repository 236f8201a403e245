"""FedNova."""

from fedlight.algorithms.base import Message, Sender, State
from fedlight.algorithms.fedavg import FedAvg


class FedNova(FedAvg):
    """Normalised averaging: a client that takes more steps does not pull harder.

    With q_i = n_i / Σ_sel n and S_i local steps, w ← w + server_lr·(Σ_sel q_i S_i)·Σ_sel q_i Δ_i/S_i. Where all
    clients take the same number of steps it is FedAvg.

    Args:
        server_lr: length of the server's step.

    Source: Wang et al., "Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization",
    NeurIPS 2020, equation 8 with a_i = (1, ..., 1), that of plain SGD. For other local optimizers the paper has
    other norms of a_i; the number of steps is used for all.
    """

    def contribution(self, message: Message, sender: Sender) -> State:
        """The normalised update, and the steps."""
        update, weight = message["update"], self.mean_weight(sender.num_samples)
        steps = update.new_tensor(weight * sender.num_steps)
        return {"normalised": weight / max(1, sender.num_steps) * update, "steps": steps}

    def aggregate(self, server: State, total: State) -> State:
        """The server's step along the mean of the normalised updates."""
        effective_steps, step = total["steps"] / total["weight"], total["normalised"] / total["weight"]
        return {**server, "params": server["params"] + self.server_lr * effective_steps * step}
