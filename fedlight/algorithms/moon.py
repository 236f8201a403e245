"""MOON."""

from torch import Tensor, nn
from torch.nn import functional as F

from fedlight.algorithms.base import Message, Number, State, check_hyperparameter
from fedlight.algorithms.fedavg import FedAvg
from fedlight.local import ClientResult, LocalObjective
from fedlight.penalties.comparison import Comparison


class ModelContrast(Comparison):
    """mu·mean(−log σ((cos(z, z_start) − cos(z, z_previous))/temperature)), z the features of a sample."""

    compares = ("start", "previous")

    def __init__(self, mu: Number = 1.0, temperature: Number = 0.5, layer: str | None = None) -> None:
        super().__init__(layer)
        self.mu = check_hyperparameter("algorithm.mu", mu)
        self.temperature = check_hyperparameter("algorithm.temperature", temperature, positive=True)

    def penalty(self, module: nn.Module, measured: dict[str, Tensor]) -> Tensor:
        """The term of the step."""
        own, start, previous = (measured[key].flatten(1) for key in ("features", "start/features", "previous/features"))
        nearer = F.cosine_similarity(own, start) - F.cosine_similarity(own, previous)
        return -self.mu * F.logsigmoid(nearer / self.temperature).mean()


class MOON(FedAvg):
    """Clients keep their features near those of the server's model, and away from their last model's.

    With z, z_w and z_i the features of a sample by the client's model, by the one that it received and by the one that
    its last training ended with, they add mu·mean(−log(e^s/(e^s + e^d))) to the loss, s = cos(z, z_w)/temperature,
    d = cos(z, z_i)/temperature. In its first training a client has no last model: then d = s, and the term is
    constant. The paper's features come from a projection head, which is part of the network. FedAvg's communication.

    Args:
        mu: weight of the term; the paper tunes it among 0.1, 1, 5 and 10.
        temperature: τ.
        layer: the submodule whose output the features are; by default they are what the last linear layer takes.
        server_lr: length of the server's step.

    Source: Li et al., "Model-Contrastive Federated Learning", CVPR 2021; the authors' code, too, has no term at first.
    """

    def __init__(
        self, mu: Number = 1.0, temperature: Number = 0.5, layer: str | None = None, server_lr: Number = 1.0
    ) -> None:
        super().__init__(server_lr)
        self.penalty = ModelContrast(mu, temperature, layer)

    def init_client(self, params: Tensor) -> State:
        """What stands for the last model before there is one."""
        return {"previous": params}

    def objective(self, received: State, client: State, weight: float) -> LocalObjective:
        """With the client's last model to compare with."""
        return LocalObjective(received["params"], references=client)

    def client_update(self, received: State, client: State, result: ClientResult) -> tuple[State, Message]:
        """The model that the client ended with, to keep and to send."""
        return {"previous": result.params}, {"params": result.params}
