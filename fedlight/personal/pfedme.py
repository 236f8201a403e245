"""PFedMe."""

from collections.abc import Callable

import torch
from torch import Tensor

from fedlight.checks import Number, check_hyperparameter, check_whole, largest
from fedlight.local import ClientResult
from fedlight.personal.second import SecondModel
from fedlight.perturbations.base import Perturbation, State


class MoreauStep(Perturbation):
    """The gradient of the Moreau envelope at w, lam·(w − θ); θ goes on from where it is. Settings as in PFedMe."""

    def __init__(self, lam: Number, inner_steps: int, inner_lr: Number) -> None:
        self.lam = check_hyperparameter("trainer.personal.lam", lam, positive=True)
        self.inner_lr = check_hyperparameter("trainer.personal.inner_lr", inner_lr, positive=True)
        if (product := largest(self.lam) * largest(self.inner_lr)) >= 2:
            raise ValueError(f"trainer.personal: inner_lr·lam is {product:g}; from 2 on θ runs away. Lower inner_lr.")
        self.batches = (0,) * check_whole("trainer.personal.inner_steps", inner_steps)

    def begin(self, received: State, client: State, start: Tensor) -> State:
        """θ begins where w does."""
        return {"model": start}

    def gradient(self, params: Tensor, at: Callable[[Tensor | None], Tensor], state: State) -> tuple[Tensor, State]:
        """lam·(w − θ), and the new θ."""
        model = state["model"]
        for _ in self.batches:
            away = model - params
            model = model - self.inner_lr * (at(away) + self.lam * away)
        # A gradient that overflowed in 16-bit precision skips its step, and must not stay in θ.
        return self.lam * (params - model), {"model": torch.where(model.isfinite().all(), model, state["model"])}


class PFedMe(SecondModel):
    """The shared model follows the clients' Moreau envelopes; a client's own model is the θ_i that they are taken at.

    A local step takes ``inner_steps`` gradients on its batch, θ ← θ − inner_lr·(∇L_i(θ) + lam·(θ − w)), and one step of
    the module's optimizer along lam·(w − θ): with SGD w ← w − η·lam·(w − θ). The server's β is ``algorithm.server_lr``.

    Args:
        lam: weight of the pull of θ to w; the smaller, the more of its own a client has. Keep η·lam below 1.
        inner_steps: K, gradients for θ in each local step.
        inner_lr: length of these steps.

    Source: Dinh et al., "Personalized Federated Learning with Moreau Envelopes", NeurIPS 2020, algorithm 1. As in the
    authors' implementation θ is not begun anew in each local step, and the server weighs clients by samples (FedAvg).
    """

    trains_apart = False

    def __init__(self, lam: Number = 15.0, inner_steps: int = 5, inner_lr: Number = 0.05) -> None:
        super().__init__()
        self.perturbation = MoreauStep(lam, inner_steps, inner_lr)

    def client_update(self, own: State, result: ClientResult, start: Tensor | None = None) -> State:
        """θ, and the buffers of the training in which it was found."""
        return {**super().trained(own, result, result.start), "params": result.perturbation["model"]}

    trained = client_update
