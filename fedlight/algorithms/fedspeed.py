"""FedSpeed."""

from fedlight.algorithms.base import Number, Weighting, check_hyperparameter
from fedlight.algorithms.feddyn import FedDyn
from fedlight.perturbations.sam import SAM


class FedSpeed(FedDyn):
    """FedDyn's correction of every step together with a perturbed gradient.

    Args:
        rho: radius of the perturbation.
        alpha: weight of the regulariser, the paper's 1/λ.
        weighting: what p_i is: n_i / mean(n) by ``samples``, or 1 with ``equal``, the letter of the paper.

    Source: Sun et al., "FedSpeed: Larger Local Interval, Less Communication Round, and Higher Generalization
    Accuracy", ICLR 2023, algorithm 1. The perturbed gradient is taken alone (the paper's mixing weight of 1) at a step
    of length rho, as in the authors' implementation; the paper leaves the step unnormalised. As there, the dual
    correction that the server adds is the mean over all clients, where the paper averages it over the sampled ones.
    """

    def __init__(self, rho: Number = 0.01, alpha: Number = 0.01, weighting: Weighting = "samples") -> None:
        super().__init__(alpha, weighting)
        self.perturbation = SAM(check_hyperparameter("algorithm.rho", rho))
