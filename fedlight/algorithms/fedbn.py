"""FedBN."""

from lightning.fabric.utilities import rank_zero_warn
from torch import Tensor

from fedlight.algorithms.base import Message, State, mean_update
from fedlight.algorithms.fedavg import FedAvg
from fedlight.local import ClientResult, LocalObjective
from fedlight.module.parameters import ParameterLayout


class FedBN(FedAvg):
    """FedAvg whose clients keep their BatchNorm layers, parameters and running statistics, to themselves.

    The server's copy of the BatchNorm parameters stays as it was initialised, which is what a client starts from the
    first time. For evaluation, which needs some value, they are the mean over the clients of the round.

    Args:
        server_lr: length of the server's step.

    Source: Li et al., "FedBN: Federated Learning on Non-IID Features via Local Batch Normalization", ICLR 2021,
    algorithm 1.
    """

    buffers = "local"
    personal = True

    def setup(self, num_clients: int, layout: ParameterLayout) -> None:
        """Find the BatchNorm parameters; warn where there are none."""
        super().setup(num_clients, layout)
        mask = layout.mask(lambda info: info.is_batch_norm)
        self._batch_norm = mask.nonzero().flatten()
        self._shared = (~mask).nonzero().flatten()
        if len(self._batch_norm) == 0:
            rank_zero_warn(
                "algorithm: FedBN keeps BatchNorm parameters local, and the model has none, so all are averaged as in"
                " FedAvg. Use a model with BatchNorm layers, or `algorithm: FedAvg`."
            )

    def init_client(self, params: Tensor) -> State:
        """The BatchNorm parameters, as the server's model was initialised."""
        return {"batch_norm": self._of(params, self._batch_norm)}

    def broadcast(self, server: State) -> State:
        """All but the BatchNorm parameters."""
        return {"params": self._of(server["params"], self._shared)}

    def objective(self, received: State, client: State, weight: float) -> LocalObjective:
        """Start from the server's model with the client's own BatchNorm parameters."""
        return LocalObjective(start=self._model(received["params"], client["batch_norm"]))

    def client_update(self, received: State, client: State, result: ClientResult) -> tuple[State, Message]:
        """Keep the trained BatchNorm parameters."""
        own = {"batch_norm": self._of(result.params, self._batch_norm)}
        return own, {"params": self._of(result.params, self._shared)}

    def aggregate(self, server: State, total: State) -> State:
        """FedAvg's step for all but the BatchNorm parameters."""
        shared = self._of(server["params"], self._shared) + self.server_lr * mean_update(total)
        return {**server, "params": self._model(shared, self._of(server["params"], self._batch_norm))}

    def latest(self, received: State, client: State, message: Message) -> Tensor:
        """The client's model with its own BatchNorm parameters, which the server itself never sees."""
        return self._model(message["params"], client["batch_norm"])

    def evaluated(self, server: State, received: State, total: State) -> dict[str, Tensor]:
        """Both views with the mean of the clients' BatchNorm parameters."""
        batch_norm = self._of(total["latest_models"] / total["weight"], self._batch_norm)
        shared = {
            "server": self._of(server["params"], self._shared),
            "selected": received["params"] + mean_update(total),
        }
        return {view: self._model(params, batch_norm) for view, params in shared.items()}

    def _of(self, params: Tensor, index: Tensor) -> Tensor:
        return params[index.to(params.device)]

    def _model(self, shared: Tensor, batch_norm: Tensor) -> Tensor:
        """The model ``[P]`` of its two parts."""
        params = shared.new_empty(len(shared) + len(batch_norm))
        params[self._shared.to(params.device)] = shared
        params[self._batch_norm.to(params.device)] = batch_norm.to(params.dtype)
        return params
