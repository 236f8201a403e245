"""fluke, in one process."""
# ruff: noqa: D101, D102

from fluke import DDict, FlukeENV
from fluke.algorithms.fedavg import FedAVG
from fluke.data import DataSplitter, DummyDataContainer, FastDataLoader
from fluke.evaluation import ClassificationEval
from fluke.utils import ServerObserver
from problem import Clock, from_arguments

problem, _ = from_arguments()
clock, accuracies = Clock(), []


class Watch(ServerObserver):
    def end_round(self, round):
        accuracies.append(problem.accuracy(algorithm.server.model))
        clock.round_ended()


def loader(x, y, batch_size):
    return FastDataLoader(x, y, num_labels=int(problem.test[1].max()) + 1, batch_size=batch_size, shuffle=True)


if __name__ == "__main__":
    classes = int(problem.test[1].max()) + 1
    environment = FlukeENV()
    environment.set_seed(0)
    environment.set_device("cpu")
    environment.set_inmemory(True)
    environment.set_evaluator(ClassificationEval(eval_every=10**9, n_classes=classes))
    environment.set_eval_cfg(pre_fit=False, post_fit=False, locals=False, server=False)
    clients = [loader(x, y, problem.batch_size) for x, y in problem.clients]
    container = DummyDataContainer(
        clients, [None] * len(clients), loader(*problem.test, problem.eval_batch_size), classes
    )
    parameters = DDict(
        model=problem.net(),
        client=DDict(
            batch_size=problem.batch_size,
            local_epochs=problem.epochs,
            loss="CrossEntropyLoss",
            optimizer=DDict(name="SGD", lr=problem.lr),
            scheduler=DDict(name="StepLR", gamma=1, step_size=1),
        ),
        server=DDict(weighted=True),
    )
    algorithm = FedAVG(len(clients), DataSplitter(container), parameters)
    algorithm.attach(Watch())
    algorithm.run(problem.rounds, problem.share, finalize=False)
    clock.report(accuracies[-1])
