"""FedInit."""

from torch import Tensor

from fedlight.algorithms.base import Algorithm, Message, Number, State, check_hyperparameter
from fedlight.local import ClientResult, LocalObjective


class FedInit(Algorithm):
    """Clients start beyond the server's model, away from where they ended: at w + beta·(w − w_i). w ← mean_sel(w_i).

    Args:
        beta: how far beyond; 0 is FedAvg with a plain mean.

    Source: Sun et al., "Understanding How Consistency Works in Federated Learning via Stage-wise Relaxed
    Initialization", NeurIPS 2023, from the authors' FL-Simulator. There w_i is the initial model before a client has
    trained, where here it starts at w; and the server adds the mean of w_i less the start.
    """

    mean_by = "equal"

    def __init__(self, beta: Number = 0.1) -> None:
        self.beta = check_hyperparameter("algorithm.beta", beta)

    def init_client(self, params: Tensor) -> State:
        """w_i; the server's model before the client has trained."""
        return {"last": params}

    def objective(self, received: State, client: State, weight: float) -> LocalObjective:
        """Start beyond w."""
        return LocalObjective(received["params"] + self.beta * (received["params"] - client["last"]))

    def client_update(self, received: State, client: State, result: ClientResult) -> tuple[State, Message]:
        """Remember the model, which is all that is sent."""
        return {"last": result.params}, {"params": result.params}
