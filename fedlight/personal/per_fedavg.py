"""PerFedAvg."""

from collections.abc import Callable

from torch import Tensor

from fedlight.checks import Number, check_hyperparameter
from fedlight.local import ClientResult
from fedlight.personal.second import SecondModel
from fedlight.perturbations.base import Perturbation, State


class MetaStep(Perturbation):
    """The gradient of L(w − alpha·∇L(w)) with respect to w, as far as PerFedAvg says."""

    def __init__(self, alpha: Number, delta: Number | None) -> None:
        self.alpha = check_hyperparameter("trainer.personal.alpha", alpha, positive=True)
        self.delta = None if delta is None else check_hyperparameter("trainer.personal.delta", delta, positive=True)
        self.batches = (0, 1) if delta is None else (0, 1, 2, 2)

    def begin(self, received: State, client: State, start: Tensor) -> State:
        """The model after the step."""
        return {"model": start}

    def gradient(self, params: Tensor, at: Callable[[Tensor | None], Tensor], state: State) -> tuple[Tensor, State]:
        """That after the step; for HF (I − alpha·∇²L(w)) times it."""
        step = -self.alpha * at(None)
        g, state = at(step), {"model": params + step}
        if self.delta is None:
            return g, state
        g = g.clone()
        ahead = at(self.delta * g).clone()
        return g - self.alpha * (ahead - at(-self.delta * g)) / (2 * self.delta), state


class PerFedAvg(SecondModel):
    """A shared model that is good after one step on a client's own data: w ← w − η·∇L_i(w − alpha·∇L_i(w)).

    That is FO, without second derivatives; HF has, with g for that gradient, w ← w − η·(g − alpha·d) and
    d = (∇L_i(w + delta·g) − ∇L_i(w − delta·g))/(2·delta). The paper takes each gradient on a batch of its own: so does
    ``trainer.accumulate_grad_batches: 2``, and 3 for HF. A step with fewer batches takes all of them on the same.

    Args:
        alpha: length of the step, which each client takes on a batch of its own before it is evaluated.
        delta: of HF, such as 0.001; None for FO.

    Source: Fallah et al., "Personalized Federated Learning with Theoretical Guarantees: A Model-Agnostic Meta-Learning
    Approach", NeurIPS 2020, algorithm 1 and section 5. The server weighs clients as the algorithm does.
    """

    trains_apart = False
    adapts_all = True

    def __init__(self, alpha: Number = 0.01, delta: Number | None = None) -> None:
        super().__init__(steps=1)
        self.perturbation = MetaStep(alpha, delta)

    def adapted(self, start: Tensor, result: ClientResult) -> Tensor:
        """The model after the step of length alpha."""
        return result.perturbation["model"]
