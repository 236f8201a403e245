"""The round loop."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import Profiler
from torch import Tensor

from fedlight.algorithms.base import Algorithm
from fedlight.algorithms.fedavg import FedAvg
from fedlight.callbacks.config_file import config_yaml
from fedlight.commands import Commands
from fedlight.data.datamodule import FederatedDataModule
from fedlight.engines.base import Engine
from fedlight.penalties.numbers import follow
from fedlight.personal.base import Personalization
from fedlight.perturbations.base import Perturbation
from fedlight.run.lightning_names import answering
from fedlight.run.loggers import LoggerName
from fedlight.run.session import Session
from fedlight.run.views import monitors_known
from fedlight.server.aggregators import Aggregator
from fedlight.server.clients import Where
from fedlight.server.federation import BufferPolicy, View
from fedlight.server.privacy import sampling_seed
from fedlight.server.sampling import Sampler, Uniform, balance, draw
from fedlight.transforms.base import Transform

Precision = Literal["32-true", "bf16-mixed", "16-mixed", "64-true", "bf16-true", "32", "bf16", "16", "64"]


class FederatedTrainer(Commands):
    """Trains any LightningModule with automatic optimisation federatedly.

    Args:
        algorithm: how clients are corrected and aggregated; by default FedAvg.
        perturbation: where gradients are taken (SAM and its family); by default what the algorithm brings, or w itself.
        max_rounds: communication rounds.
        clients_per_round: K, a number of clients or a fraction of all.
        sampler: who trains in a round; by default a fixed number, drawn uniformly.
        local_epochs: passes over a client's data in a round; 1 where ``local_steps`` is not given either.
        local_steps: optimizer steps of a client in a round, instead of ``local_epochs``.
        accelerator: as in Lightning: ``cpu``, ``gpu``, ``auto``.
        devices: as in Lightning: number of processes (devices), list of indices, or ``auto``: all GPUs; on a CPU the
            ``fedlight`` command starts a process per core where that is faster, and a Python program stays in one.
        num_nodes: number of machines; start one process per device with torchrun or SLURM.
        strategy: as in Fabric; models are never wrapped.
        precision: numerical precision of local training and evaluation.
        tf32: whether GPUs may round the factors of float32 products to TensorFloat-32, in training and evaluation; null
            leaves torch's own settings as they are.
        channels_last: lay batches of images ``[B, C, H, W]`` out with their channels side by side, as
            ``torch.channels_last``: often the faster one for convolutions. The same function, rounded otherwise.
        gradient_clip_val: largest norm (or entry) of the gradient that reaches the optimizer.
        gradient_clip_algorithm: clip by ``norm`` or by ``value``.
        accumulate_grad_batches: batches of one local optimizer step.
        callbacks: Lightning callbacks, MAN among them.
        logger: ``wandb``, ``tensorboard``, any Lightning logger, or a list; ``metrics.csv`` is always written.
        default_root_dir: runs are kept in ``<default_root_dir>/<name>/version_<n>/``.
        name: name of the experiment.
        check_val_every_n_rounds: how often the views are evaluated; always after the last round.
        client_val_every_n_rounds: how often the server's model is evaluated on every client's own data; by default
            with every validation, 0 for never.
        views: which weights are evaluated: the ``server``'s, the ``selected`` clients' mean, the mean of ``all``
            clients' latest models (which needs a vector for each client that ever trained), ``swa``, the mean of the
            server's over the last rounds.
        swa_start: the part of ``max_rounds`` after which view ``swa`` begins.
        swa_every_n_rounds: how many rounds there are between the models that it averages, as in a cycle.
        limit_train_batches: batches of a local epoch: a number, or a fraction (float).
        limit_val_batches: batches of a validation: a number, or a fraction (float).
        limit_test_batches: batches of a test: a number, or a fraction (float).
        fast_dev_run: one round, two clients, one batch of everything (or as many as a number says), nothing written.
        enable_progress_bar: whether to show the progress over rounds.
        enable_plots: whether ``plots/`` gets the pictures of every run: the partition and the curves.
        profiler: ``simple``, ``advanced``, ``pytorch`` or a Profiler of Lightning; it reports to the run's folder.
        enable_checkpointing: whether ``last.ckpt`` and ``best.ckpt`` are written.
        deterministic: make torch refuse algorithms that are not deterministic.
        buffers: what happens to buffers such as BatchNorm statistics: ``average`` over clients, ``local`` to each
            client, or ``reset`` at the start of each client's training.
        personal: what stays with each client: names, regular expressions or types of modules, such as ``head`` or
            ``BatchNorm``, or a Personalization.
        transforms: what a client's message goes through before the server receives it: ClipUpdate, TopK, Quantize (in
            this order), or your own.
        aggregator: what takes the place of the mean of the updates, so that a few hostile clients cannot steer it:
            Median, TrimmedMean, GeometricMedian, Krum, or your own.
        engine: how local trainings are executed: ``auto``, ``eager``, or the name of another engine.
        client_state: where clients' state is kept: ``auto``, ``device``, ``cpu`` or ``disk``.
        compile: let the engine compile what it runs.
        centralized: train on the pooled data of all clients instead, the upper line of a study: a round is
            ``local_epochs`` passes over all data, and algorithm, sampler and ``clients_per_round`` play no part.
        seed: seed of every random draw.
        allow_changes: let a run that is continued differ from its checkpoint in what is trained; each difference is
            said, and kept in the run's ``config_history/``.

    Example::

        trainer = FederatedTrainer(max_rounds=20, clients_per_round=0.5, callbacks=[MAN(zeta=0.15)])
        trainer.fit(MyLightningModule(), ImageData("digits", num_clients=20))
    """

    session_class: type[Session] = Session

    @answering
    def __init__(
        self,
        algorithm: Algorithm | None = None,
        perturbation: Perturbation | None = None,
        max_rounds: int = 100,
        clients_per_round: int | float = 0.1,
        sampler: Sampler | None = None,
        local_epochs: int | None = None,
        local_steps: int | None = None,
        accelerator: str = "auto",
        devices: int | str | list[int] = "auto",
        num_nodes: int = 1,
        strategy: str = "auto",
        precision: Precision | int = "32-true",
        tf32: bool | None = None,
        channels_last: bool = False,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: Literal["norm", "value"] = "norm",
        accumulate_grad_batches: int = 1,
        callbacks: list[Callback] | Callback | None = None,
        logger: Logger | LoggerName | list[Logger | LoggerName] | bool | None = None,
        default_root_dir: str | Path = "runs",
        name: str = "default",
        check_val_every_n_rounds: int = 1,
        client_val_every_n_rounds: int | None = None,
        views: Sequence[View] = ("server", "selected", "all"),
        swa_start: float = 0.75,
        swa_every_n_rounds: int = 1,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        fast_dev_run: bool | int = False,
        enable_progress_bar: bool = True,
        enable_plots: bool = True,
        profiler: Profiler | Literal["simple", "advanced", "pytorch"] | None = None,
        enable_checkpointing: bool = True,
        deterministic: bool = False,
        buffers: BufferPolicy = "average",
        personal: Personalization | list[str] | str | None = None,
        transforms: list[Transform] | Transform | None = None,
        aggregator: Aggregator | None = None,
        engine: str | Engine = "auto",
        client_state: Where = "auto",
        compile: bool = False,
        centralized: bool = False,
        seed: int = 0,
        allow_changes: bool = False,
    ) -> None:
        settings = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        settings["algorithm"] = algorithm or FedAvg()
        settings["sampler"] = sampler or Uniform()
        super().__init__(settings)

    @answering
    def fit(
        self, model: LightningModule, datamodule: FederatedDataModule | None = None, ckpt_path: str | Path | None = None
    ) -> None:
        """Train a module federatedly.

        Args:
            model: trained in place: it holds the server's model afterwards.
            datamodule: the clients' data.
            ckpt_path: continue from a checkpoint: a file, or ``last`` or ``best`` of the newest run of this name.

        Raises:
            MisconfigurationException: before training starts, for anything that cannot be honoured.
            FloatingPointError: if the updates of all clients of a round are not finite.
        """
        self.config = config_yaml(self, model, datamodule)
        with self.session_class(self, model, datamodule, "fit", ckpt_path) as self._session:
            self._session.start_fit()
            self.should_stop = self.should_stop or self._session.federation.spent
            while self.current_round < self.max_rounds and not self.should_stop:
                self._run_round()
            self._session.end_fit()

    def _run_round(self) -> None:
        """Sample clients, train them, aggregate, evaluate, log."""
        session, federation, round = self._session, self._session.federation, self.current_round
        clock = session.clock
        clock.begin()
        session.fresh = set()
        now = follow(self.scheduled, round, session.fabric.device)
        session.hooks("on_round_start")
        session.layout.check(session.module)
        seed = sampling_seed(federation.privacy, session.fabric, self.seed)
        shares = balance(draw(self.sampler, round, seed), federation.sizes, federation.rows.owners, self.world_size)
        with clock("train"):
            mine = federation.rows.bring(shares)
            federation.begin()
            session.views.find_losses(mine)
            for receive, tasks in federation.clients.trainings(mine, session.schedule.lrs, federation.receive):
                for result in session.engine.train(round, tasks):
                    receive(result)
        with clock("wait"):
            stop = federation.exchange(session.fabric, session.interrupted)
            session.movers.join(federation.late())
        with clock("aggregate"):
            row: dict[str, Tensor | float] = {"round": round, "lr": session.schedule.lr}
            begun = session.hooks.logged if round == session.first_round else {}
            row |= begun | now | federation.aggregate()
        self.should_stop = self.should_stop or stop > 0 or federation.spent
        session.fresh.update(row)
        self._metrics |= {name: torch.as_tensor(value) for name, value in row.items()}  # waits for no device
        session.hooks("on_round_trained")
        with clock("evaluate"):
            row |= session.views.evaluate_round()
        row |= clock.metrics()
        row |= session.hooks.collect("on_round_metrics")
        session.schedule.advance("round", self.current_round, row)
        session.log(row)
        with monitors_known(session):
            session.hooks("on_round_end")
        session.raise_if_interrupted(stop)
