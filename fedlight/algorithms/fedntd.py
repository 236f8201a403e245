"""FedNTD."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlight.algorithms.base import Number, check_hyperparameter
from fedlight.algorithms.fedavg import FedAvg
from fedlight.penalties.comparison import Comparison


class NotTrueDistillation(Comparison):
    """beta·KL(q_start ‖ q), the mean over samples; q is softmax(logits/tau) over all classes but the sample's own."""

    def __init__(self, beta: Number = 1.0, tau: Number = 1.0) -> None:
        super().__init__()
        self.beta = check_hyperparameter("algorithm.beta", beta)
        self.tau = check_hyperparameter("algorithm.tau", tau, positive=True)

    def penalty(self, module: nn.Module, measured: dict[str, Tensor]) -> Tensor:
        """The term of the step."""
        own, start = (self._not_true(measured[key], measured["targets"]) for key in ("logits", "start/logits"))
        counts = measured["targets"] >= 0  # the others are ignored
        terms = F.kl_div(own, start, reduction="none", log_target=True).sum(1) * counts
        return self.beta * terms.sum() / counts.sum().clamp(min=1)

    def _not_true(self, logits: Tensor, targets: Tensor) -> Tensor:
        if targets.is_floating_point():
            raise TypeError("FedNTD needs the class of each sample; cross_entropy was given probabilities.")
        if logits.shape[1] < 3:
            raise ValueError("algorithm: FedNTD compares the classes that a sample does not have; of two, one remains.")
        logits = logits.float() if logits.dtype.itemsize < 4 else logits
        own = torch.zeros_like(logits, dtype=torch.bool).scatter(1, targets.unsqueeze(1).clamp(min=0), True)
        return F.log_softmax((logits / self.tau).masked_fill(own, torch.finfo(logits.dtype).min), dim=1)


class FedNTD(FedAvg):
    """Clients keep what the server's model knows of the classes that a sample does not have; FedAvg's communication.

    They add beta·KL(q_w ‖ q) to the loss, the mean over the batch: q and q_w are softmax(logits/tau) of the client's
    model and of the one that it received, over all classes but the sample's own. Logits and classes are what
    ``training_step`` gives to ``cross_entropy`` or ``nll_loss``.

    Args:
        beta: weight of the term.
        tau: temperature of both distributions.
        server_lr: length of the server's step.

    Source: Lee et al., "Preservation of the Global Knowledge by Not-True Distillation in Federated Learning", NeurIPS
    2022, as in the authors' code.
    """

    def __init__(self, beta: Number = 1.0, tau: Number = 1.0, server_lr: Number = 1.0) -> None:
        super().__init__(server_lr)
        self.penalty = NotTrueDistillation(beta, tau)
