"""FedTOGA."""

from dataclasses import replace

from torch import Tensor

from fedlight.algorithms.base import Message, Number, Sender, State, Weighting, check_hyperparameter
from fedlight.algorithms.feddyn import FedDyn
from fedlight.local import LocalObjective
from fedlight.perturbations.sam import SAM


class GlobalSAM(SAM):
    """SAM along g + kappa·d, d being the direction that was received."""

    def __init__(self, rho: float, kappa: float) -> None:
        super().__init__(rho)
        self.kappa = kappa

    def begin(self, received: State, client: State, start: Tensor) -> State:
        """The direction d, scaled."""
        return {"lean": self.kappa * received["direction"]}

    def epsilon(self, params: Tensor, gradient: Tensor | None, state: State) -> tuple[Tensor, State]:
        """ε, along both."""
        return super().epsilon(params, None if gradient is None else gradient + state["lean"], state)


class FedTOGA(FedDyn):
    """FedDyn whose perturbation and steps lean towards the server's last step, d = −mean_sel(Δ_i/S), of the last round.

    Steps follow FedDyn's corrected gradient, taken at distance rho along g + kappa·d, plus beta·d.

    Args:
        rho: radius of the perturbation.
        alpha: weight of FedDyn's regulariser.
        kappa: weight of d in the perturbation.
        beta: weight of d in the step; with ``kappa`` 0 and ``beta`` 0 it is FedSpeed.
        weighting: what p_i is: n_i / mean(n) by ``samples``, or 1 with ``equal``, the letter of the paper.

    Source: Li et al., "Neighborhood and Global Perturbations Supported SAM in Federated Learning: From Local Tweaks To
    Global Awareness", 2024. Only the paper's abstract could be read: equations and defaults are those of public code,
    without the gradient of the step before, which a version of it adds to the perturbation.
    """

    server_zeros = ("h_mean", "direction")  # FedDyn's, and d

    def __init__(
        self,
        rho: Number = 0.1,
        alpha: Number = 0.1,
        kappa: Number = 1.0,
        beta: Number = 0.9,
        weighting: Weighting = "samples",
    ) -> None:
        super().__init__(alpha, weighting)
        rho, kappa = check_hyperparameter("algorithm.rho", rho), check_hyperparameter("algorithm.kappa", kappa)
        self.beta, self.perturbation = check_hyperparameter("algorithm.beta", beta), GlobalSAM(rho, kappa)

    def broadcast(self, server: State) -> State:
        """The model and d."""
        return {"params": server["params"], "direction": server["direction"]}

    def objective(self, received: State, client: State, weight: float) -> LocalObjective:
        """FedDyn's, plus beta·d."""
        return replace(super().objective(received, client, weight), linear=self.beta * received["direction"])

    def contribution(self, message: Message, sender: Sender) -> State:
        """The client's mean step, upwards."""
        return {"direction": -message["update"] / max(1, sender.num_steps)}

    def aggregate(self, server: State, total: State) -> State:
        """FedDyn's, and the new d."""
        return {**super().aggregate(server, total), "direction": total["direction"] / total["clients"]}
