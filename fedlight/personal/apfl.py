"""APFL."""

from torch import Tensor

from fedlight.checks import Number, check_hyperparameter
from fedlight.local import LocalObjective
from fedlight.personal.second import SecondModel
from fedlight.perturbations.base import State


class APFL(SecondModel):
    """Each client has a mixture of models, v̄_i = alpha·v_i + (1 − alpha)·w, and trains its own part v_i in it.

    A local step is v ← v − η·alpha·∇L_i(v̄): the gradient with respect to v. In the paper it follows each step of the
    shared model, whose present local value is w. Here v_i has a training of its own, in which w stays the model that
    was broadcast: with one local step in a round that is the paper's; with more, the w in v̄ stands still meanwhile.
    alpha is not adapted.

    Args:
        alpha: how much of the mixture is the client's own.
        epochs: local epochs of v_i.
        steps: its local steps, instead; by default it is trained as long as the shared model.

    Source: Deng et al., "Adaptive Personalized Federated Learning", arXiv:2003.13461, algorithm 1.
    """

    def __init__(self, alpha: Number = 0.5, epochs: int | None = None, steps: int | None = None) -> None:
        super().__init__(epochs, steps)
        self.alpha = check_hyperparameter("trainer.personal.alpha", alpha, positive=True, at_most=1)

    def follow(self, start: Tensor, own: Tensor) -> LocalObjective:
        """The gradient of the mixture's loss with respect to v."""
        return LocalObjective(own, gradient_scale=self.alpha, other=start, share=self.alpha)

    def model(self, model: Tensor, own: State) -> Tensor:
        """v̄, with the server's present model."""
        v = super().model(model, own)
        return self.follow(model, v).point(v)
