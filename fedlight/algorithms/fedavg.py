"""FedAvg."""

from collections.abc import Sequence

from fedlight.algorithms.base import Algorithm, Message, State, check_hyperparameter
from fedlight.local import ClientResult


class FedAvg(Algorithm):
    """Average the models of the clients that trained: w ← w + server_lr·(Σ n_i w_i / Σ n_i − w).

    Args:
        server_lr: length of the server's step; 1 takes the average itself.

    Source: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017,
    algorithm 1; the server's step as in Reddi et al., ICLR 2021.

    Example::

        FederatedTrainer(algorithm=FedAvg())
    """

    def __init__(self, server_lr: float = 1.0) -> None:
        self.server_lr = check_hyperparameter("algorithm.server_lr", server_lr, positive=True)

    def aggregate(self, server: State, results: Sequence[ClientResult], messages: Sequence[Message]) -> State:
        """The server's step towards the weighted average."""
        return {**server, "params": self.step(server["params"], results, self.server_lr)}
