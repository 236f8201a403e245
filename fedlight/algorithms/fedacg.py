"""FedACG."""

from fedlight.algorithms.base import Algorithm, Number, State, check_hyperparameter, mean_update
from fedlight.local import LocalObjective


class FedACG(Algorithm):
    """Clients start at w̃ = w + momentum·m, where the server's momentum m leads, and are pulled back to that point.

    They minimise L_i(w') + beta/2·‖w' − w̃‖², and with Δ_i = w_i − w̃: m ← momentum·m + mean_sel(Δ_i), w ← w + m.

    Args:
        momentum: the paper's λ, in [0, 1).
        beta: weight of the proximal term.

    Source: Kim et al., "Communication-Efficient Federated Learning with Accelerated Client Gradient", CVPR 2024, as in
    the authors' code, whose proximal term has no factor ½: its 0.001 is 0.002 here.
    """

    mean_by = "equal"
    server_zeros = ("momentum",)

    def __init__(self, momentum: Number = 0.85, beta: Number = 0.001) -> None:
        self.momentum = check_hyperparameter("algorithm.momentum", momentum, below=1)
        self.beta = check_hyperparameter("algorithm.beta", beta)

    def broadcast(self, server: State) -> State:
        """The model ahead, w̃."""
        return {"params": server["params"] + self.momentum * server["momentum"]}

    def objective(self, received: State, client: State, weight: float) -> LocalObjective:
        """Proximal to w̃."""
        return LocalObjective(received["params"], anchor=received["params"], proximal=self.beta)

    def aggregate(self, server: State, total: State) -> State:
        """The new m, and the step along it."""
        momentum = self.momentum * server["momentum"] + mean_update(total)
        return {"params": server["params"] + momentum, "momentum": momentum}
