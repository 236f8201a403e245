"""The locally estimated global perturbation on FedAvg, SCAFFOLD and FedDyn: FedLESAM, FedLESAM_S, FedLESAM_D."""

from fedlight.algorithms.base import Number, Weighting, check_hyperparameter
from fedlight.algorithms.fedavg import FedAvg
from fedlight.algorithms.feddyn import FedDyn
from fedlight.algorithms.scaffold import SCAFFOLD
from fedlight.perturbations.lesam import LESAM


class FedLESAM(FedAvg):
    """FedAvg with :class:`~fedlight.perturbations.lesam.LESAM`: sharpness-aware at one gradient per step.

    Args:
        rho: radius of the perturbation.
        server_lr: length of the server's step.

    Source: Fan et al., "Locally Estimated Global Perturbations are Better than Local Perturbations for Federated
    Sharpness-aware Minimization", ICML 2024, algorithm 1.
    """

    def __init__(self, rho: Number = 0.05, server_lr: Number = 1.0) -> None:
        super().__init__(server_lr)
        self.perturbation = LESAM(check_hyperparameter("algorithm.rho", rho))


class FedLESAM_S(SCAFFOLD):
    """SCAFFOLD with :class:`~fedlight.perturbations.lesam.LESAM` (the paper's FedLESAM-S).

    Args:
        rho: radius of the perturbation.
        server_lr: length of the server's step.
        weighting: what p_i is: n_i / mean(n) by ``samples``, or 1 with ``equal``, the letter of the paper.

    Source: as :class:`FedLESAM`.
    """

    def __init__(self, rho: Number = 0.05, server_lr: Number = 1.0, weighting: Weighting = "samples") -> None:
        super().__init__(server_lr, weighting)
        self.perturbation = LESAM(check_hyperparameter("algorithm.rho", rho))


class FedLESAM_D(FedDyn):
    """FedDyn with :class:`~fedlight.perturbations.lesam.LESAM` (the paper's FedLESAM-D).

    Args:
        rho: radius of the perturbation.
        alpha: weight of the regulariser.
        weighting: what p_i is: n_i / mean(n) by ``samples``, or 1 with ``equal``, the letter of the paper.

    Source: as :class:`FedLESAM`.
    """

    def __init__(self, rho: Number = 0.05, alpha: Number = 0.01, weighting: Weighting = "samples") -> None:
        super().__init__(alpha, weighting)
        self.perturbation = LESAM(check_hyperparameter("algorithm.rho", rho))
