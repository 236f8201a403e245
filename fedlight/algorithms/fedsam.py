"""FedAvg with a perturbation, under the names that the papers gave: FedSAM, FedASAM."""

from fedlight.algorithms.base import Number, check_hyperparameter
from fedlight.algorithms.fedavg import FedAvg
from fedlight.perturbations.asam import ASAM
from fedlight.perturbations.sam import SAM


class FedSAM(FedAvg):
    """FedAvg with :class:`~fedlight.perturbations.sam.SAM`.

    Args:
        rho: radius of the perturbation.
        server_lr: length of the server's step.

    Source: Qu et al., "Generalized Federated Learning via Sharpness Aware Minimization", ICML 2022, algorithm 1;
    Caldarola et al., "Improving Generalization in Federated Learning by Seeking Flat Minima", ECCV 2022.
    """

    def __init__(self, rho: Number = 0.05, server_lr: Number = 1.0) -> None:
        super().__init__(server_lr)
        self.perturbation = SAM(check_hyperparameter("algorithm.rho", rho))


class FedASAM(FedAvg):
    """FedAvg with :class:`~fedlight.perturbations.asam.ASAM`.

    Args:
        rho: radius of the perturbation, in units of the weights' own size.
        eta: added to the weights' size, so that zero weights move too.
        server_lr: length of the server's step.

    Source: Caldarola et al., "Improving Generalization in Federated Learning by Seeking Flat Minima", ECCV 2022.
    """

    def __init__(self, rho: Number = 0.5, eta: Number = 0.2, server_lr: Number = 1.0) -> None:
        super().__init__(server_lr)
        self.perturbation = ASAM(check_hyperparameter("algorithm.rho", rho), check_hyperparameter("algorithm.eta", eta))
