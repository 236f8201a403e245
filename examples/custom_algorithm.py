"""An algorithm of your own, in one file outside the package: FedExP, a server that extrapolates.

    python examples/custom_algorithm.py

From YAML it is named by its import path, with this folder on the path:

    PYTHONPATH=examples fedlight fit -c configs/quickstart.yaml --algorithm custom_algorithm.FedExP
"""

import torch

from fedlight import MAN, Classifier, FederatedTrainer, ImageData
from fedlight.algorithms import Algorithm, Message
from fedlight.algorithms.base import Sender, State, check_hyperparameter, mean_update
from fedlight.models import MLP
from fedlight.perturbations import SAM


class FedExP(Algorithm):
    """A longer server step where the clients' updates disagree.

    With Δ the mean of the K updates, w ← w + max(1, Σ‖Δ_i‖² / (2K(‖Δ‖² + eps)))·Δ.

    Args:
        eps: keeps the step finite where the updates cancel.

    Source: Jhunjhunwala et al., "FedExP: Speeding Up Federated Averaging via Extrapolation", ICLR 2023, algorithm 1.
    """

    mean_by = "equal"

    def __init__(self, eps: float = 1e-3) -> None:
        self.eps = check_hyperparameter("algorithm.eps", eps, positive=True)

    def contribution(self, message: Message, sender: Sender) -> State:
        """‖Δ_i‖², to be summed over the clients."""
        return {"square": message["update"].square().sum()}

    def aggregate(self, server: State, total: State) -> State:
        """The extrapolated step."""
        mean = mean_update(total)
        spread = total["square"] / (2 * total["clients"])
        step = torch.clamp(spread / (mean.square().sum() + self.eps), min=1.0)
        return {"params": server["params"] + step * mean}


def main(**settings) -> FederatedTrainer:
    """Train with it; like any algorithm it goes with a perturbation and with MAN."""
    torch.manual_seed(0)
    options = {"max_rounds": 15, "clients_per_round": 0.5, "local_epochs": 2, "name": "custom_algorithm", **settings}
    trainer = FederatedTrainer(algorithm=FedExP(), perturbation=SAM(rho=0.05), callbacks=[MAN(zeta=0.15)], **options)
    trainer.fit(Classifier(MLP(64, 10), num_classes=10), ImageData("digits", num_clients=20, batch_size=16))
    return trainer


if __name__ == "__main__":
    finished = main()
    print({name: round(float(value), 4) for name, value in finished.callback_metrics.items() if "val/" in name})
    print("written to", finished.run_dir)
