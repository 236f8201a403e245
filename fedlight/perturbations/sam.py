"""SAM."""

from torch import Tensor

from fedlight.checks import Number, check_hyperparameter, largest
from fedlight.perturbations.base import Perturbation, State, unit


class SAM(Perturbation):
    """The point of steepest ascent at distance rho: ε = rho·g/‖g‖₂, one norm over all parameters.

    Args:
        rho: radius. At 0 there is no perturbation, and no second gradient.

    Source: Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR 2021,
    equation 2. A gradient of zero gives ε = 0.

    Example::

        FederatedTrainer(algorithm=FedDyn(), perturbation=SAM(rho=0.05))
    """

    def __init__(self, rho: Number = 0.05) -> None:
        self.rho = check_hyperparameter("perturbation.rho", rho)
        self.needs_gradient = largest(self.rho) > 0

    def epsilon(self, params: Tensor, gradient: Tensor | None, state: State) -> tuple[Tensor, State]:
        """ε, along the gradient."""
        if gradient is None:
            return params.new_zeros(params.shape), state
        return self.rho * unit(gradient), state
