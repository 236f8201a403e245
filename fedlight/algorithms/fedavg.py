"""FedAvg."""

from fedlight.algorithms.base import Algorithm, Number, State, check_hyperparameter, mean_update


class FedAvg(Algorithm):
    """Average the models of the clients that trained: w ← w + server_lr·(Σ n_i w_i / Σ n_i − w).

    Args:
        server_lr: length of the server's step; 1 takes the average itself.

    Source: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017,
    algorithm 1; the server's step as in Reddi et al., ICLR 2021.

    Example::

        FederatedTrainer(algorithm=FedAvg())
    """

    def __init__(self, server_lr: Number = 1.0) -> None:
        self.server_lr = check_hyperparameter("algorithm.server_lr", server_lr, positive=True)

    def aggregate(self, server: State, total: State) -> State:
        """The server's step towards the weighted average."""
        return {**server, "params": server["params"] + self.server_lr * mean_update(total)}
