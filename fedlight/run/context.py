"""What lives as long as one call of fit, validate, test or analyze: handed down to those who work on it."""

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric import Fabric
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import Logger
from torch import Tensor

from fedlight.data.datamodule import FederatedDataModule
from fedlight.engines.base import Engine
from fedlight.module.hooks import Hooks
from fedlight.module.optimizers import RoundSchedule
from fedlight.module.parameters import ParameterLayout
from fedlight.run.checkpoint import CheckpointWriter
from fedlight.run.evaluation import Evaluator
from fedlight.run.folder import RunFolder, writing
from fedlight.run.interface import TrainerInterface
from fedlight.run.loggers import MetricsCSV, tell
from fedlight.run.names import as_floats
from fedlight.run.wandb import of_round
from fedlight.server.federation import Federation

Command = Literal["fit", "validate", "test", "predict"]


class RunContext:
    """The parts of one call. They come one after the other, in this order, while :class:`Session` sets the call up."""

    trainer: TrainerInterface
    settings: dict[str, Any]  # the trainer's, by name
    module: LightningModule
    datamodule: FederatedDataModule  # all data as one client's where training is centralized
    command: Command  # what is called
    hooks: Hooks  # calls hooks of callbacks and module
    fabric: Fabric  # devices, precision and processes
    resumed: bool  # whether the state comes from a checkpoint
    checkpoint_path: Path  # where there is one
    folder: RunFolder | None  # the run's; None where nothing is written
    loggers: list[Logger]  # where metrics go; in the first process
    writer: CheckpointWriter
    evaluator: Evaluator
    layout: ParameterLayout  # the order of the trained parameters
    federation: Federation  # the server's and the clients' state
    schedule: RoundSchedule  # learning rates by round, in a fit
    engine: Engine  # executes local trainings, in a fit
    experiment: dict[str, Any]  # what those that continue the run must agree with, in a fit
    changes: dict[str, list[Any]]  # where this run differs from the one that it continues
    begun: set[str]  # names in the module's state when a fit began
    first_round: int  # that a fit begins with
    fresh: set[str]  # what has been logged in the present round so far

    @property
    def is_zero(self) -> bool:
        """Whether this is the first process."""
        return self.fabric.global_rank == 0

    def publish(self, metrics: dict[str, Tensor]) -> None:
        """Let callbacks find metrics."""
        self.fresh.update(metrics)
        self.trainer.callback_metrics.update({k: v.detach().cpu() for k, v in metrics.items()})

    def log(self, row: dict[str, Tensor | float]) -> None:
        """Write a round's metrics to every logger."""
        metrics = as_floats(row)
        self.publish(dict(zip(metrics, torch.tensor(list(metrics.values())).unbind(), strict=True)))
        with writing(self.trainer.run_dir or Path()):
            step, clients = int(metrics["round"]), self.trainer.client_val_metrics
            tell(self.loggers, lambda logger: logger.log_metrics(metrics | of_round(logger, metrics, clients), step))

    @property
    def metrics_csv(self) -> MetricsCSV | None:
        """The logger that always is; None in other processes than the first, and where nothing is written."""
        return self.loggers[0] if self.loggers and isinstance(self.loggers[0], MetricsCSV) else None
