"""What surrounds the round loop: setting up and tearing down, evaluating, logging."""

import time
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.trainer.states import RunningStage, TrainerFn, TrainerStatus

from fedlight.checks import check_paths
from fedlight.data.datamodule import FederatedDataModule, share_among_processes
from fedlight.data.federated import not_federated, training_data
from fedlight.engines import Engine, start_engine
from fedlight.module.hooks import Hooks, check_callbacks, check_module, overrides, strangers
from fedlight.module.parameters import ParameterLayout, flat_parameters, load_tensors, unexpand
from fedlight.run import resume, setup
from fedlight.run.callbacks import with_module_callbacks
from fedlight.run.checkpoint import CheckpointWriter, check_state_dict
from fedlight.run.context import Command, RunContext
from fedlight.run.device import feed_channels_last, float32_products, keep_freed_blocks
from fedlight.run.evaluation import Evaluator
from fedlight.run.folder import RunFolder
from fedlight.run.interface import TrainerInterface
from fedlight.run.loggers import close_loggers, make_loggers, tell_wandb
from fedlight.run.preflight import check_data, check_methods
from fedlight.run.processes import deferred_signals, lost_process, resolve_devices, use_threads, watch_children
from fedlight.run.results import destination
from fedlight.run.snapshot import make_checkpoint, refuse_registered, restore_callbacks, write_checkpoint
from fedlight.run.summary import say_end, say_start, say_stopped
from fedlight.run.views import Views
from fedlight.server.client_side import ClientSide
from fedlight.server.clients import client_store
from fedlight.server.federation import Federation
from fedlight.server.rows import ClientRows


class Session(RunContext):
    """One call of ``fit``, ``validate``, ``test`` or ``predict``, from its beginning to its end.

    Attributes:
        movers: what clients and evaluations change of the module besides its trained parameters.
        clock: seconds of a round's parts; set by :meth:`start_fit`.
        views: evaluates the weights that are of interest.
    """

    clients_class, views_class = ClientSide, Views
    snapshot, save_checkpoint = make_checkpoint, write_checkpoint

    def __init__(
        self,
        trainer: TrainerInterface,
        model: LightningModule | None,
        datamodule: LightningDataModule | None,
        command: Command,
        ckpt_path: str | Path | None,
    ) -> None:
        model, datamodule, ckpt_path = resume.of_last_call(trainer, model, datamodule, ckpt_path)
        self.trainer, self.module, self.command = trainer, model, command
        self.stage = RunningStage("train" if command == "fit" else command)
        self.settings = trainer.settings
        if not isinstance(datamodule, FederatedDataModule):
            raise MisconfigurationException(not_federated(datamodule))
        datamodule.trainer = trainer  # type: ignore[assignment]  # what Lightning's datamodules may read
        self.datamodule = training_data(datamodule, self.settings["centralized"])
        trainer.callbacks = with_module_callbacks(trainer.callbacks, model)
        self.profiler = setup.make_profiler(self.settings["profiler"])
        self.hooks = Hooks(trainer, model, trainer.callbacks, self.profiler)
        self.loggers, self.folder = [], None
        self._finished = self._created = False
        self.resumed, self.ckpt_path = ckpt_path is not None, ckpt_path
        self._checkpoint: dict[str, Any] | None = None
        self.first_round, self.experiment, self.changes, self.fresh = 0, {}, {}, set()
        self._started, self._cleanup = time.perf_counter(), ExitStack()
        self.movers, self.writer = setup.Movers(self), CheckpointWriter()

    def __enter__(self) -> "Session":
        check_callbacks(self.trainer.callbacks)
        written = {f"trainer.{key}": self.settings[key] for key in ("logger", "profiler")}
        check_paths({"trainer.callbacks": self.trainer.callbacks, **written})
        if self.command == "fit":
            check_module(self.module)
            self.trainer._metrics = {}
        self.trainer._session = self
        state = self.trainer.state
        state.fn, state.stage, state.status = TrainerFn(self.command), self.stage, TrainerStatus.RUNNING
        self.trainer.should_stop = False
        try:
            self._set_up()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def start_fit(self) -> None:
        """Check what could fail, make schedule and engine, and call the hooks of the start."""
        trainer = self.trainer
        resume.restore_schedule(self, self._checkpoint)
        self.check()
        self.first_round = trainer.current_round
        self.start_training()
        resume.continue_files(self, self._checkpoint)
        say_start(self)
        profiler = setup.start_profiler(self.profiler, trainer.run_dir, self.fabric.global_rank, self._cleanup)
        self.clock = setup.RoundClock(profiler, self.fabric.device)
        self.hooks.once("on_train_start")
        if self.fabric.world_size == 1:  # several processes agree on it after a round
            self.raise_if_interrupted(self.interrupted)

    def check(self) -> None:
        """Refuse what would fail in the first round."""
        check_methods(self)
        check_data(self)
        use_threads(self, self._cleanup)

    def start_training(self) -> None:
        """Make the engine, after the hooks of a fit's start."""
        if not self.module.training:  # parts that are in evaluation mode stay in it, as in Lightning
            self.module.train()
        own = self.trainer.algorithm.penalty
        self._cleanup.enter_context(own.attached(self.module) if own else nullcontext())
        buffers = (
            f"{name}.{key}".lstrip(".") for name, m in self.module.named_modules() for key, _ in m._buffers.items()
        )
        self.begun = {*self.module.state_dict(), *buffers}  # those that are None as well
        self.hooks("on_fit_start")
        self._begin_as_it_is()
        self._cleanup.callback(lambda: self._finished and self.hooks("on_fit_end"))
        if any(overrides(x, "on_train_start") for x in (self.module, *strangers(self.trainer.callbacks))):
            self.hooks.once("on_train_start")  # steps are tried with what it prepares
            self.layout.check(self.module)
            self._begin_as_it_is()
        if self.settings["enable_checkpointing"]:
            refuse_registered(self, self.module.state_dict())
        self.engine = self.make_engine()
        self._cleanup.callback(self.engine.teardown)

    def _begin_as_it_is(self) -> None:
        """Let the server have what hooks have made of the module; what a checkpoint has stays."""
        if setup.is_changed(self):
            self._make_federation()
            resume.restore_schedule(self, self._checkpoint)

    def make_engine(self) -> Engine:
        """What executes the local trainings."""
        return start_engine(self.settings["engine"], setup.local_training(self, self.movers))

    def end_fit(self) -> None:
        """Leave the server's model in the module, and the run's summary in its folder."""
        self.views.load("server")
        self.hooks("on_train_end")
        tell_wandb(self.loggers, self.views.log_confusion)
        self._finished = True
        if self.folder is not None and self.is_zero:
            say_end(self, time.perf_counter() - self._started, self.views.logged)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        lost = None if error is None else lost_process(self, error)
        if error is not None:
            for callback in self.trainer.callbacks:
                callback.on_exception(self.trainer, self.module, error)  # type: ignore[arg-type]
            if isinstance(error, FloatingPointError) and self.folder and self.folder.checkpoint("last").exists():
                error.args = (f"{error} The last checkpoint is whole: {self.folder.checkpoint('last')}",)
            if self.command == "fit" and isinstance(error, KeyboardInterrupt | SystemExit):
                say_stopped(self)
        self._cleanup.close()
        self.datamodule.teardown(self.command)
        for callback in self.trainer.callbacks:
            callback.teardown(self.trainer, self.module, self.command)  # type: ignore[arg-type]
        self.module.teardown(self.command)
        close_loggers(self.loggers, "failed" if isinstance(error, Exception) else "success")
        if error is not None and self._created and self.folder and self.folder.discard_if_unused(self.first_round):
            self.trainer.run_dir = None
        state = self.trainer.state
        state.stage, state.status = None, TrainerStatus.INTERRUPTED if error else TrainerStatus.FINISHED
        if lost is not None:
            raise ConnectionError(lost) from None

    @property
    def interrupted(self) -> int:
        """The number of the signal that asked this process to stop, or 0."""
        return self._signals.received

    def raise_if_interrupted(self, stop: int) -> None:
        """After a round, raise what the signal asks for; every process does so at the same round."""
        if stop and not self.is_zero:
            # Launchers kill the first process as soon as another one fails; it has the loggers to close.
            raise SystemExit(0)
        self._signals.raise_received(stop)

    def _set_up(self) -> None:
        settings, cleanup, module = self.settings, self._cleanup, self.module
        self.fabric = setup.make_fabric({**settings, "devices": resolve_devices(self)})
        self.fabric.launch()
        cleanup.callback(watch_children(self))
        keep_freed_blocks(self.fabric, cleanup)
        self._signals = cleanup.enter_context(deferred_signals(active=self.command == "fit"))
        if settings["tf32"] is not None:
            cleanup.enter_context(float32_products("tf32" if settings["tf32"] else "ieee"))
        if settings["channels_last"]:
            feed_channels_last(self.fabric.strategy.precision)
        if settings["deterministic"]:
            setup.be_deterministic(self.fabric.device, cleanup)
        self._checkpoint = self._open_folder()
        module.trainer = self.trainer  # type: ignore[assignment]
        cleanup.callback(setattr, module, "trainer", None)
        with self.fabric.rank_zero_first(local=True):
            self.datamodule.prepare_data()
            module.prepare_data()
        resume.set_up_data(self.datamodule, self.command, self._checkpoint or {})
        share_among_processes(self.fabric, self.datamodule)
        self._set_up_module()
        self._begin_federation()

    def _set_up_module(self) -> None:
        module, stage = self.module, self.command
        for callback, seen in self.hooks.audience:
            callback.setup(seen, module, stage)
        module.setup(stage)
        if overrides(module, "configure_model"):
            module.configure_model()
        # After the module's own: it is handed over with the devices and data types that it trains with.
        self.fabric.strategy.precision.convert_module(module)
        self.fabric.to_device(module)
        unexpand(module)
        self.evaluator = Evaluator(module, self.fabric, self.datamodule, self.hooks, self.movers.untouched)

    def _begin_federation(self) -> None:
        """Make the federation; of a checkpoint, with its values, and while those are trained that its run trained."""
        module, checkpoint = self.module, self._checkpoint
        if checkpoint is None:
            return self._make_federation()
        module.on_load_checkpoint(checkpoint)
        saved = checkpoint["state_dict"]
        check_state_dict(self.checkpoint_path, saved, module)
        parameters = dict(module.named_parameters())
        flags = {name for name, p in parameters.items() if p.requires_grad}
        trained = checkpoint["fedlight"].get("experiment", {}).get("model", {}).get("trained", flags)
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in trained)
        load_tensors(module, {n: saved[n] for n in parameters if n in saved and n not in trained})
        self._make_federation()
        if self.command == "fit":
            restore_callbacks(self, checkpoint)
            for name, parameter in parameters.items():
                parameter.requires_grad_(name in flags)
        return None

    def _make_federation(self) -> None:
        settings, trainer, checkpoint = self.settings, self.trainer, self._checkpoint
        self.layout = ParameterLayout.of(self.module)
        folder = Path("clients") if self.folder is None else self.folder.path / "clients"
        store = client_store(settings["client_state"], folder / f"rank{self.fabric.global_rank}", self.fabric.device)
        rows = ClientRows(store, self.datamodule.num_clients, self.fabric)
        self._cleanup.callback(rows.close)
        self._cleanup.callback(self.writer.close)  # before the connections that it may be using
        trainer.personal.setup(self.module, self.layout)
        methods = trainer.algorithm, trainer.perturbation, trainer.personal, self.layout, self.datamodule, store
        buffers = trainer.algorithm.buffers or settings["buffers"]
        clients = self.clients_class(*methods, buffers, settings["transforms"], trainer.seed)
        swa = int(settings["swa_start"] * trainer.max_rounds + 1e-9), settings["swa_every_n_rounds"]
        self.federation = Federation(clients, rows, settings["views"], self.movers.unmoved, swa)
        self.views = self.views_class(self)
        needed = (trainer.algorithm, settings["aggregator"] or trainer.algorithm)
        least = min(max(2, *(part.min_clients for part in needed)), self.federation.num_clients)
        per_round = least if trainer.fast_dev_run else settings["clients_per_round"]
        trainer.sampler.setup(self.federation.num_clients, per_round, self.federation.sizes)
        anew = self.command == "fit" and resume.begin_experiment(self, checkpoint)
        self.federation.initialise(flat_parameters(self.module), dict(self.module.named_buffers()))
        if checkpoint is not None:
            self.federation.load_state_dict(checkpoint["fedlight"], clients=self.command == "fit", anew=anew)
            self.views.load("server")
        if self.folder is not None and self.command == "fit" and self.is_zero:
            self.folder.check_room(self.federation.num_bytes())

    def _open_folder(self) -> dict[str, Any] | None:
        """Find the checkpoint, and the folder that the run writes to; both the same in every process."""
        trainer, checkpoint = self.trainer, None
        if self.ckpt_path is not None:
            checkpoint, self.checkpoint_path, self.folder = resume.read_checkpoint(self, self.ckpt_path)
        if trainer.fast_dev_run:
            return checkpoint
        folder = destination(self)[0]
        if fit := self.command == "fit":
            trainer.run_dir = folder = resume.decided(self.fabric, self._take_folder)
            self.folder = self.folder or RunFolder(folder)
        # A run in a folder of its own is one of its own for W&B, too.
        ids = {} if checkpoint is None or self._created else checkpoint["fedlight"]["loggers"]
        if self.is_zero:
            wanted, name = self.settings["logger"], f"{trainer.method_name}-seed{trainer.seed}"
            self.loggers = make_loggers(wanted, folder, ids, name)[0 if fit else 1 :]  # without metrics.csv
        return checkpoint

    def _take_folder(self) -> Path:
        self._created = self.folder is None
        self.folder = self.folder or RunFolder.create(self.trainer.default_root_dir, self.trainer.name)
        self.folder.lock()
        self._cleanup.callback(self.folder.unlock)
        return self.folder.path
