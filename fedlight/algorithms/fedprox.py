"""FedProx."""

from fedlight.algorithms.base import Number, State, check_hyperparameter
from fedlight.algorithms.fedavg import FedAvg
from fedlight.local import LocalObjective


class FedProx(FedAvg):
    """FedAvg whose clients are pulled back to the server's model: they minimise L_i(w) + mu/2·‖w − w_t‖².

    Args:
        mu: weight of the proximal term; 0 is FedAvg.
        server_lr: length of the server's step.

    Source: Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, equation 2.
    """

    def __init__(self, mu: Number = 1e-4, server_lr: Number = 1.0) -> None:
        super().__init__(server_lr)
        self.mu = check_hyperparameter("algorithm.mu", mu)

    def objective(self, received: State, client: State, weight: float) -> LocalObjective:
        """Proximal to the server's model."""
        start = received["params"]
        return LocalObjective(start=start, anchor=start, proximal=self.mu)
