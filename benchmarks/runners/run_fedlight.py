"""fedlight, with its metrics file and its checkpoints as they are by default."""
# ruff: noqa: D101, D102

import tempfile

import torch
from lightning.pytorch import Callback, LightningModule
from problem import Clock, Problem, from_arguments
from torch.nn import functional as F

from fedlight.data.arrays import ArrayDataset
from fedlight.data.datamodule import FederatedDataModule
from fedlight.trainer import FederatedTrainer


class Model(LightningModule):
    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.net, self.lr = problem.net(), problem.lr

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val/accuracy", (self.net(x).argmax(1) == y).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Data(FederatedDataModule):
    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.batch_size, eval_batch_size=problem.eval_batch_size)
        self.num_clients = len(problem.clients)
        sizes = [len(y) for _, y in problem.clients]
        stored = ArrayDataset(torch.cat([x for x, _ in problem.clients]), torch.cat([y for _, y in problem.clients]))
        self.datasets = [stored.view(rows, None) for rows in torch.arange(sum(sizes)).split(sizes)]
        self.held_out = ArrayDataset(*problem.test)

    def client_dataset(self, client):
        return self.datasets[client]

    def val_dataset(self):
        return self.held_out


class Watch(Callback):
    def __init__(self) -> None:
        self.clock = Clock()

    def on_round_end(self, trainer, pl_module):
        self.clock.round_ended()


if __name__ == "__main__":
    problem, arguments = from_arguments()
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        trainer = FederatedTrainer(
            max_rounds=problem.rounds,
            clients_per_round=problem.per_round,
            local_epochs=problem.epochs,
            engine=arguments.engine,
            compile=arguments.compile,
            channels_last=arguments.channels_last,
            accelerator="cpu",
            devices=arguments.processes,
            views=["server"],
            client_val_every_n_rounds=0,
            callbacks=[watch],
            default_root_dir=folder,
            enable_progress_bar=False,
        )
        trainer.fit(Model(problem), Data(problem))
        if trainer.is_global_zero:
            watch.clock.report(float(trainer.callback_metrics["val/accuracy"]))
