"""FedAdamW, and what it has in common with FedMuon."""

import torch
from torch import Tensor
from torch.optim import AdamW

from fedlight.algorithms.base import Message, Number, Sender, State, check_hyperparameter, mean_gradient
from fedlight.algorithms.fedavg import FedAvg
from fedlight.local import ClientResult, LocalObjective
from fedlight.module.parameters import ParameterLayout


class _LeaningClients(FedAvg):
    """FedAvg whose clients lean towards G, the last step of all, and send what their optimizer keeps."""

    mean_by = "equal"
    needs_lr = True
    server_zeros: tuple[str, ...] = ("direction",)  # G

    def __init__(self, alpha: Number, server_lr: Number, **limits: float) -> None:
        super().__init__(server_lr)
        self.alpha = check_hyperparameter("algorithm.alpha", alpha, **limits)

    def broadcast(self, server: State) -> State:
        """All that the server has."""
        return server

    def contribution(self, message: Message, sender: Sender) -> State:
        """The mean step per unit of the learning rate, and what else is sent."""
        sent = {name: value.double() for name, value in message.items() if name not in ("params", "update")}
        return {"direction": mean_gradient(message["update"], sender.lr_sum), **sent}

    def aggregate(self, server: State, total: State) -> State:
        """The server's step, and the means of all else."""
        means = {name: total[name] / total["clients"] for name in server.keys() - {"params"}}
        return {**super().aggregate(server, total), **means}


class FedAdamW(_LeaningClients):
    """Clients run AdamW, begin with the mean second moment, and lean towards the last step of all.

    Their steps are those of ``model.optimizer``, which is torch's AdamW, and −η·alpha·G beside them, with
    G = −mean_sel(Δ_i/(S·η)) of the round before. The first moment begins with 0; the second with the mean of the
    clients', of which a number for each parameter tensor is sent: the mean of its entries. w ← w + mean_sel(Δ_i).

    Args:
        alpha: how far steps lean towards G.
        server_lr: length of the server's step.

    Source: Liu et al., "FedAdamW: A Communication-Efficient Optimizer with Convergence and Generalization Guarantees
    for Federated Large Models", arXiv:2510.27486, from public notes on its algorithm. As in the authors' code, torch
    corrects the bias of both moments by the steps of all rounds; the paper has those of the round for the first one.
    That code sends whole second moments; the paper's blocks are finer than tensors in attention layers.
    """

    optimizers = (AdamW,)
    optimizer_state = ("exp_avg_sq", "step")

    def __init__(self, alpha: Number = 0.5, server_lr: Number = 1.0) -> None:
        super().__init__(alpha, server_lr)

    def setup(self, num_clients: int, layout: ParameterLayout) -> None:
        """How many entries the parameter tensors have."""
        super().setup(num_clients, layout)
        self._sizes = [info.numel for info in layout.parameters]

    def init_server(self, params: Tensor) -> State:
        """The model, G, the second moment and the number of steps."""
        zeros = params.new_zeros(len(self._sizes))
        return {**super().init_server(params), "second": zeros, "step": params.new_zeros(())}

    def objective(self, received: State, client: State, weight: float) -> LocalObjective:
        """Begin with the second moment, and lean towards G."""
        sizes = torch.tensor(self._sizes, device=received["second"].device)
        state = {"exp_avg_sq": received["second"].repeat_interleave(sizes), "step": received["step"]}
        return LocalObjective(received["params"], optimizer=state, drift=self.alpha * received["direction"])

    def client_update(self, received: State, client: State, result: ClientResult) -> tuple[State, Message]:
        """The model, the means of the second moment, and the number of steps."""
        second = torch.stack([part.mean() for part in torch.split(result.optimizer["exp_avg_sq"], self._sizes)])
        return client, {"params": result.params, "second": second, "step": result.optimizer["step"]}
