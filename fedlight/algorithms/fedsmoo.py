"""FedSMOO."""

from fedlight.algorithms.base import Number, Weighting, check_hyperparameter
from fedlight.algorithms.feddyn import FedDyn
from fedlight.perturbations.dual_sam import DualSAM


class FedSMOO(FedDyn):
    """FedDyn on the parameters, and on the perturbation too: both have a dual variable that aligns the clients.

    The perturbation is :class:`~fedlight.perturbations.dual_sam.DualSAM`.

    Args:
        rho: radius of the perturbation.
        alpha: weight of the regulariser, the paper's 1/β.
        weighting: what p_i is: n_i / mean(n) by ``samples``, or 1 with ``equal``, the letter of the paper.

    Source: Sun et al., "Dynamic Regularized Sharpness Aware Minimization in Federated Learning: Approaching Global
    Consistency and Smooth Landscape", ICML 2023, algorithm 1.
    """

    def __init__(self, rho: Number = 0.1, alpha: Number = 0.01, weighting: Weighting = "samples") -> None:
        super().__init__(alpha, weighting)
        self.perturbation = DualSAM(check_hyperparameter("algorithm.rho", rho))
