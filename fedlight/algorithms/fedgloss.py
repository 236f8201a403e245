"""FedGloSS."""

from fedlight.algorithms.base import Message, Number, Sender, State, check_hyperparameter, mean_update
from fedlight.algorithms.fedavg import FedAvg
from fedlight.local import ClientResult, LocalObjective
from fedlight.perturbations.base import unit


class FedGloSS(FedAvg):
    """Sharpness-aware minimisation on the server, tied to the clients by ADMM.

    The server perturbs its model along the last round's pseudo-gradient and sends w̃ = w + rho·d/‖d‖. Clients start
    there and minimise L_i(w) − ⟨σ_i, w⟩ + 1/(2 beta)·‖w − w̃‖², and with Δ_i = w_i − w̃:

        σ_i ← σ_i − Δ_i/beta,   σ ← σ − Σ_sel Δ_i/(beta·N)
        d = −Σ_sel n_i Δ_i / Σ_sel n_i,   w ← w − server_lr·d − beta·σ

    It costs no more communication than FedAvg, and one gradient per step. Combine it with ``perturbation: SAM`` for
    the paper's variant with SAM on the clients.

    Args:
        rho: radius of the server's perturbation; 0 leaves ADMM alone.
        beta: inverse weight of the proximal term.
        server_lr: length of the server's step.

    Source: Caldarola et al., "Beyond Local Sharpness: Communication-Efficient Global Sharpness-aware Minimization for
    Federated Learning", CVPR 2025, algorithm 1; its warm-up is a schedule. The authors' implementation divides the
    change of σ by the number of sampled clients once more; here σ is the mean of σ_i over all clients.
    """

    server_zeros = ("dual", "pseudo_gradient")  # σ, and the d of the last round
    client_zeros = ("dual",)  # σ_i

    def __init__(self, rho: Number = 0.1, beta: Number = 10.0, server_lr: Number = 1.0) -> None:
        super().__init__(server_lr)
        self.rho = check_hyperparameter("algorithm.rho", rho)
        self.beta = check_hyperparameter("algorithm.beta", beta, positive=True)

    def broadcast(self, server: State) -> State:
        """w̃, the perturbed model; w itself in the first round."""
        return {"params": server["params"] + self.rho * unit(server["pseudo_gradient"])}

    def objective(self, received: State, client: State, weight: float) -> LocalObjective:
        """The augmented Lagrangian around w̃."""
        start = received["params"]
        return LocalObjective(start=start, anchor=start, proximal=1 / self.beta, linear=-client["dual"])

    def client_update(self, received: State, client: State, result: ClientResult) -> tuple[State, Message]:
        """The new σ_i, which the server works out from the model as well."""
        return {"dual": client["dual"] - result.update / self.beta}, {"params": result.params}

    def contribution(self, message: Message, sender: Sender) -> State:
        """The update with weight 1, for σ."""
        return {"plain": message["update"]}

    def aggregate(self, server: State, total: State) -> State:
        """The step from the unperturbed model, and the new σ."""
        dual = server["dual"] - total["plain"] / (self.beta * self.num_clients)
        params = super().aggregate(server, total)["params"] - self.beta * dual
        return {"params": params, "dual": dual, "pseudo_gradient": -mean_update(total)}
