"""MoFedSAM."""

from fedlight.algorithms.base import Number, check_hyperparameter
from fedlight.algorithms.fedcm import FedCM
from fedlight.perturbations.sam import SAM


class MoFedSAM(FedCM):
    """FedCM's momentum on SAM's gradients: local steps follow alpha·g_SAM + (1 − alpha)·m.

    Args:
        rho: radius of the perturbation.
        alpha: weight of the client's own gradient, in (0, 1]; the paper's β.
        server_lr: length of the server's step.

    Source: Qu et al., "Generalized Federated Learning via Sharpness Aware Minimization", ICML 2022, algorithm 2.
    """

    def __init__(self, rho: Number = 0.05, alpha: Number = 0.1, server_lr: Number = 1.0) -> None:
        super().__init__(alpha, server_lr)
        self.perturbation = SAM(check_hyperparameter("algorithm.rho", rho))
