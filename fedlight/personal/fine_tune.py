"""Fine-tuning, for evaluation."""

from fedlight.personal.second import SecondModel


class FineTune(SecondModel):
    """Where clients are evaluated, each trains the server's model on its own data before, and forgets it afterwards.

    The federation's training is as without it, to the bit.

    Args:
        epochs: local epochs; 1 where ``steps`` is not given either.
        steps: local steps, instead.

    Source: Yu et al., "Salvaging Federated Learning by Local Adaptation", arXiv:2002.04758, section 3.1.
    """

    trains_apart = False
    adapts_all = True

    def __init__(self, epochs: int | None = None, steps: int | None = None) -> None:
        super().__init__(1 if epochs is None and steps is None else epochs, steps)
