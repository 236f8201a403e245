"""APFL."""

import torch
from torch import Tensor

from fedlight.checks import Number, check_hyperparameter
from fedlight.local import ClientResult, LocalObjective
from fedlight.personal.second import SecondModel
from fedlight.perturbations.base import State


class APFL(SecondModel):
    """Each client has a mixture of models, v̄_i = alpha·v_i + (1 − alpha)·w, and trains its own part v_i in it.

    A local step is v ← v − η·alpha·∇L_i(v̄): the gradient with respect to v. In the paper it follows each step of the
    shared model, whose present local value is w. Here v_i has a training of its own, in which w stays the model that
    was broadcast: with one local step in a round that is the paper's; with more, the w in v̄ stands still meanwhile.

    Args:
        alpha: how much of the mixture is the client's own; of adaptive ones, before a client's first round.
        epochs: local epochs of v_i.
        steps: its local steps, instead; by default it is trained as long as the shared model.
        adaptive: whether each client has an alpha of its own, alpha_i ← alpha_i − η⟨∇L_i(v̄), v_i − w⟩ once in each of
            its rounds, with v_i and w as the round begins and the mean gradient of its steps, as plain SGD shows it. It
            stays within [0.001, 1]: at 0 v_i would not move, and nothing more would be learned of alpha_i.

    Source: Deng et al., "Adaptive Personalized Federated Learning", arXiv:2003.13461, algorithm 1 and equation 10.
    """

    def __init__(
        self, alpha: Number = 0.5, epochs: int | None = None, steps: int | None = None, adaptive: bool = False
    ) -> None:
        super().__init__(epochs, steps)
        self.alpha = check_hyperparameter("trainer.personal.alpha", alpha, positive=True, at_most=1)
        self.adaptive = adaptive

    def follow(self, start: Tensor, own: State) -> LocalObjective:
        """The gradient of the mixture's loss with respect to v."""
        alpha = own.get("alpha", self.alpha)
        return LocalObjective(own.get("params", start), gradient_scale=alpha, other=start, share=alpha)

    def trained(self, own: State, result: ClientResult, start: Tensor) -> State:
        """v_i and its alpha_i."""
        new, alpha = super().trained(own, result, start), own.get("alpha", self.alpha)
        descent = torch.dot(result.start - result.params, result.start - start) / (alpha * max(1, result.num_steps))
        return {**new, "alpha": (alpha - descent).clamp(0.001, 1).to(start)} if self.adaptive else new

    def model(self, model: Tensor, own: State) -> Tensor:
        """v̄, with the server's present model."""
        mixture = self.follow(model, own)
        return mixture.point(mixture.start)
