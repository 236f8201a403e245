"""BlazeFL's base trainer, in one process."""
# ruff: noqa: D101, D102

from blazefl.contrib import FedAvgBaseClientTrainer, FedAvgBaseServerHandler, FedAvgPartitionType
from problem import Clock, from_arguments
from torch.utils.data import DataLoader, TensorDataset


class Partitions:
    def __init__(self, problem) -> None:
        self.datasets = [TensorDataset(x, y) for x, y in problem.clients]
        self.test = TensorDataset(*problem.test)

    def get_dataset(self, type_, cid):
        return self.datasets[cid] if type_ == FedAvgPartitionType.TRAIN else self.test

    def set_dataset(self, type_, cid, dataset):
        raise NotImplementedError

    def get_dataloader(self, type_, cid, batch_size, generator=None):
        training = type_ == FedAvgPartitionType.TRAIN
        return DataLoader(self.get_dataset(type_, cid), batch_size, shuffle=training, generator=generator)


class Models:
    def __init__(self, problem) -> None:
        self.problem = problem

    def select_model(self, model_name):
        return self.problem.net()


if __name__ == "__main__":
    problem, _ = from_arguments()
    clock, data, models, count = Clock(), Partitions(problem), Models(problem), len(problem.clients)
    size, per = problem.batch_size, problem.share
    server = FedAvgBaseServerHandler(models, "net", data, problem.rounds, count, per, "cpu", size, 0)
    trainer = FedAvgBaseClientTrainer(models, "net", data, "cpu", count, problem.epochs, size, problem.lr, 0)
    while not server.if_stop():
        trainer.local_process(server.downlink_package(), server.sample_clients())
        for package in trainer.uplink_package():
            server.load(package)
        accuracy = problem.accuracy(server.model)
        clock.round_ended()
    clock.report(accuracy)
