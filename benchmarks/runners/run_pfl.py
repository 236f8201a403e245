"""pfl-research, in one process."""
# ruff: noqa: D101, D102

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from problem import Clock, from_arguments
from torch import nn
from torch.nn import functional as F

problem, _ = from_arguments()
clock, accuracies = Clock(), []


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = problem.net()

    def loss(self, x, y, eval=False):
        return F.cross_entropy(self.net(x), y)

    def metrics(self, x, y, eval=True):
        return {}


class Watch(TrainingProcessCallback):
    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        accuracies.append(problem.accuracy(model.pytorch_model.net))
        clock.round_ended()
        return False, Metrics()


def shuffled(client: int) -> PyTorchTensorDataset:
    """The library goes through a user's data in order: each round it gets a new one."""
    x, y = problem.clients[client]
    order = torch.randperm(len(y))
    return PyTorchTensorDataset((x[order], y[order]), user_id=str(client))


class InTurn:
    def __init__(self) -> None:
        self.next = -1

    def __call__(self) -> int:
        self.next = (self.next + 1) % len(problem.clients)
        return self.next


if __name__ == "__main__":
    module = Model()
    central = torch.optim.SGD(module.parameters(), lr=1.0)
    model = PyTorchModel(module, local_optimizer_create=torch.optim.SGD, central_optimizer=central)
    data = FederatedDataset(shuffled, InTurn())
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=problem.rounds,
            evaluation_frequency=10**9,
            train_cohort_size=problem.per_round,
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(training_data=data, val_data=data),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_learning_rate=problem.lr,
            local_num_epochs=problem.epochs,
            local_batch_size=problem.batch_size,
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=problem.eval_batch_size),
        callbacks=[Watch()],
    )
    clock.report(accuracies[-1])
