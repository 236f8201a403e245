"""An algorithm of your own, in one file outside the package: a server that lets its clients vote.

    python examples/custom_algorithm.py

From YAML it is named by its import path, with this folder on the path:

    PYTHONPATH=examples fedlight fit -c configs/quickstart.yaml --algorithm custom_algorithm.MajorityVote
"""

import torch

from fedlight import MAN, Classifier, FederatedTrainer, ImageData
from fedlight.algorithms import Algorithm, Message
from fedlight.algorithms.base import Sender, State, check_hyperparameter
from fedlight.models import MLP
from fedlight.perturbations import SAM


class MajorityVote(Algorithm):
    """Every parameter moves by ``step`` the way that most clients moved it: w ← w + step·sign(Σ sign(Δ_i)).

    Args:
        step: length of the step.

    Source: Bernstein et al., "signSGD with Majority Vote is Communication Efficient and Fault Tolerant", ICLR 2019,
    with the update of a client's local training in the place of its gradient.
    """

    mean_by = "equal"

    def __init__(self, step: float = 0.02) -> None:
        self.step = check_hyperparameter("algorithm.step", step, positive=True)

    def contribution(self, message: Message, sender: Sender) -> State:
        """A client's votes, to be summed over the clients."""
        return {"votes": message["update"].sign()}

    def aggregate(self, server: State, total: State) -> State:
        """The step that the majority wants."""
        return {"params": server["params"] + self.step * total["votes"].sign()}


def main(**settings) -> FederatedTrainer:
    """Train with it; like any algorithm it goes with a perturbation and with MAN."""
    torch.manual_seed(0)
    options = {"max_rounds": 15, "clients_per_round": 0.5, "local_epochs": 2, "name": "custom_algorithm", **settings}
    trainer = FederatedTrainer(
        algorithm=MajorityVote(), perturbation=SAM(rho=0.05), callbacks=[MAN(zeta=0.15)], **options
    )
    trainer.fit(Classifier(MLP(64, 10), num_classes=10), ImageData("digits", num_clients=20, batch_size=16))
    return trainer


if __name__ == "__main__":
    finished = main()
    print({name: round(float(value), 4) for name, value in finished.callback_metrics.items() if "val/" in name})
    print("written to", finished.run_dir)
