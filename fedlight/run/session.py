"""What surrounds the round loop: setting up and tearing down, evaluating, logging."""

import time
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus

from fedlight.engines import Engine, start_engine
from fedlight.module.hooks import check_callbacks, check_module
from fedlight.run import resume
from fedlight.run.beginning import Beginning
from fedlight.run.clock import RoundClock, start_profiler
from fedlight.run.folder import writing
from fedlight.run.loggers import close_loggers, tell_wandb
from fedlight.run.preflight import check_data, check_methods
from fedlight.run.processes import lost_process
from fedlight.run.processors import choose_threads
from fedlight.run.setup import local_training, use_threads
from fedlight.run.snapshot import make_checkpoint, write_checkpoint
from fedlight.run.summary import say_end, say_start, say_stopped


class Session(Beginning):
    """One call of ``fit``, ``validate``, ``test`` or ``predict``, from its beginning to its end."""

    def __enter__(self) -> "Session":
        check_callbacks(self.trainer.callbacks)
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
        if self._checkpoint is not None:
            resume.restore_schedule(self, self._checkpoint)
        self.check()
        self.first_round = trainer.current_round
        self.start_training()
        if self._checkpoint is not None and self.metrics_csv is not None:
            with writing(self.metrics_csv.path):
                self.metrics_csv.resume(trainer.current_round, self._checkpoint["fedlight"].get("metrics"))
        say_start(self, self.engine)
        profiler = start_profiler(self.profiler, trainer.run_dir, self.fabric.global_rank, self._cleanup)
        self.clock = RoundClock(profiler, self.fabric.device)
        if self.resumed and self.folder is not None and self.is_zero and trainer.current_round < trainer.max_rounds:
            resume.record_changes(self.folder.path, trainer.current_round, self.changes)
        self.hooks("on_train_start")
        if self.fabric.world_size == 1:  # several processes agree on it after a round
            self.raise_if_interrupted(self.interrupted)

    def check(self) -> None:
        """Refuse what would fail in the first round."""
        check_methods(self)
        check_data(self)
        use_threads(choose_threads(self), self._cleanup)

    def start_training(self) -> None:
        """Make the engine, after the hooks of a fit's start."""
        if not self.module.training:  # parts that are in evaluation mode stay in it, as in Lightning
            self.module.train()
        own = self.trainer.algorithm.penalty
        self._cleanup.enter_context(own.attached(self.module) if own else nullcontext())
        self.hooks("on_fit_start")
        self._follow_freezing(self._checkpoint)
        self._cleanup.callback(lambda: self._finished and self.hooks("on_fit_end"))
        self.engine = self.make_engine()
        self._cleanup.callback(self.engine.teardown)

    def make_engine(self) -> Engine:
        """What executes the local trainings."""
        return start_engine(self.settings["engine"], local_training(self, self.movers))

    def end_fit(self) -> None:
        """Leave the server's model in the module, and the run's summary in its folder."""
        self.views.load("server")
        self.hooks("on_train_end")
        tell_wandb(self.loggers, self.views.log_confusion)
        self._finished = True
        if self.folder is not None and self.is_zero:
            say_end(self, time.perf_counter() - self._started, self.views.logged, self.engine)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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

    def snapshot(self) -> dict[str, Any]:
        """All that is needed to continue, now."""
        return make_checkpoint(self)

    def save_checkpoint(self, path: Path, content: dict[str, Any], wait: bool = True) -> None:
        """Write a snapshot; the first process writes, every process calls."""
        write_checkpoint(self, path, content, wait)
