"""Ditto."""

from torch import Tensor

from fedlight.checks import Number, check_hyperparameter
from fedlight.local import LocalObjective
from fedlight.personal.second import SecondModel
from fedlight.perturbations.base import State


class Ditto(SecondModel):
    """Each client trains a model v_i of its own, which is pulled to the server's: L_i(v) + lam/2·‖v − w_t‖².

    Args:
        lam: weight of the pull; with 0 clients train alone, and the larger it is the closer v_i stays to w_t.
        epochs: local epochs of v_i.
        steps: its local steps, instead; by default it is trained as long as the shared model.

    Source: Li et al., "Ditto: Fair and Robust Federated Learning Through Personalization", ICML 2021, algorithm 1.
    """

    def __init__(self, lam: Number = 0.1, epochs: int | None = None, steps: int | None = None) -> None:
        super().__init__(epochs, steps)
        self.lam = check_hyperparameter("trainer.personal.lam", lam)

    def follow(self, start: Tensor, own: State) -> LocalObjective:
        """Proximal to what was broadcast."""
        return LocalObjective(own.get("params", start), anchor=start, proximal=self.lam)
