"""ASAM."""

import torch
from torch import Tensor

from fedlight.checks import Number, check_hyperparameter, largest
from fedlight.module.parameters import ParameterLayout
from fedlight.perturbations.base import Perturbation, State, unit


class ASAM(Perturbation):
    """SAM whose radius scales with each weight, so that rescaling the network changes nothing.

    With T = |w| + eta for weights and 1 for biases and the parameters of normalisation layers,
    ε = rho·T²g/‖T g‖₂.

    Args:
        rho: radius, in units of the weights' own size. At 0 there is no perturbation, and no second gradient.
        eta: added to the weights' size, so that zero weights move too.

    Source: Kwon et al., "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural
    Networks", ICML 2021, equation 7.
    """

    def __init__(self, rho: Number = 0.5, eta: Number = 0.2) -> None:
        self.rho = check_hyperparameter("perturbation.rho", rho)
        self.eta = check_hyperparameter("perturbation.eta", eta)
        self.needs_gradient = largest(self.rho) > 0

    def setup(self, layout: ParameterLayout) -> None:
        """Find the weights."""
        self._is_weight = layout.mask(lambda info: not (info.is_bias or info.is_norm))

    def begin(self, server: State, client: State, start: Tensor) -> State:
        """Which entries are weights, on the device of the parameters."""
        return {"is_weight": self._is_weight.to(start.device)}

    def epsilon(self, params: Tensor, gradient: Tensor | None, state: State) -> tuple[Tensor, State]:
        """ε, along the gradient in the weights' own scale."""
        if gradient is None:
            return params.new_zeros(params.shape), state
        scale = torch.where(state["is_weight"], params.abs() + self.eta, 1.0)
        return self.rho * scale * unit(scale * gradient), state
