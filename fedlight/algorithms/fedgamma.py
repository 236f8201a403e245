"""FedGAMMA."""

from fedlight.algorithms.base import Number, Weighting, check_hyperparameter
from fedlight.algorithms.scaffold import SCAFFOLD
from fedlight.perturbations.sam import SAM


class FedGAMMA(SCAFFOLD):
    """SCAFFOLD whose gradients are SAM's: the control variates estimate, and correct, the perturbed gradients.

    Args:
        rho: radius of the perturbation.
        server_lr: length of the server's step.
        weighting: what p_i is: n_i / mean(n) by ``samples``, or 1 with ``equal``, the letter of the paper.

    Source: Dai et al., "FedGAMMA: Federated Learning with Global Sharpness-Aware Minimization", IEEE Transactions on
    Neural Networks and Learning Systems, 2023.
    """

    def __init__(self, rho: Number = 0.05, server_lr: Number = 1.0, weighting: Weighting = "samples") -> None:
        super().__init__(server_lr, weighting)
        self.perturbation = SAM(check_hyperparameter("algorithm.rho", rho))
