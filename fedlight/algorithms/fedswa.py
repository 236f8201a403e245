"""Weight averaging with rates that fall within the round: FedSWA, FedMoSWA."""

from collections.abc import Sequence

from fedlight.algorithms.base import Algorithm, Message, Number, State, check_hyperparameter
from fedlight.algorithms.fedavg import FedAvg
from fedlight.algorithms.scaffold import SCAFFOLD
from fedlight.checks import current
from fedlight.local import ClientResult


class _FallingRates(Algorithm):
    """Learning rates η_k = η·(1 − (1 − rho)·k/S) in the local steps k = 0 … S − 1, with rho in [0, 1]."""

    rho: float

    def lr_factors(self, steps: int) -> Sequence[float]:
        """η_k/η."""
        return [1 - (1 - current(self.rho)) * k / steps for k in range(steps)]


class FedSWA(_FallingRates, FedAvg):
    """Clients' rates fall from η towards rho·η in every round, and w ← w + server_lr·(mean_sel(w_i) − w).

    Args:
        rho: what the rate falls to, as a part of it; 1 leaves it constant.
        server_lr: length of the server's step, the paper's α; above 1 it goes beyond the mean.

    Source: Liu et al., "Improving Generalization in Federated Learning with Highly Heterogeneous Data via
    Momentum-Based Stochastic Controlled Weight Averaging", ICML 2025, from notes on it that are public, and the
    published code, which doubles the rate, lets it fall to 0, and takes the mean.
    """

    mean_by = "equal"

    def __init__(self, rho: Number = 0.1, server_lr: Number = 1.5) -> None:
        super().__init__(server_lr)
        self.rho = check_hyperparameter("algorithm.rho", rho, at_most=1)


class FedMoSWA(_FallingRates, SCAFFOLD):
    """FedSWA whose steps follow g − c_i + m, where the server's control variate m follows the newest of the clients'.

        c_i' = c_i − m + (w − w_i)/Σ_k η_k,   m ← m + gamma·mean_sel(c_i' − m)

    Args:
        rho: what the rate falls to, as a part of it; 1 leaves it constant.
        gamma: how fast m follows, in (0, 1].
        server_lr: length of the server's step, the paper's α.

    Source: as :class:`FedSWA`, option II. The published script runs another function under this name, at a constant
    rate, with gamma 0.4, and takes the mean.
    """

    def __init__(self, rho: Number = 0.1, gamma: Number = 0.2, server_lr: Number = 1.5) -> None:
        super().__init__(server_lr, "equal")
        self.rho = check_hyperparameter("algorithm.rho", rho, at_most=1)
        self.gamma = check_hyperparameter("algorithm.gamma", gamma, positive=True, at_most=1)

    def client_update(self, received: State, client: State, result: ClientResult) -> tuple[State, Message]:
        """The new c_i, and how far it is from m."""
        state, message = super().client_update(received, client, result)
        return state, {**message, "control_change": state["control"] - received["control"]}

    def aggregate(self, server: State, total: State) -> State:
        """The server's step and the new m."""
        control = server["control"] + self.gamma * total["control_change"] / total["clients"]
        return {**super().aggregate(server, total), "control": control}
