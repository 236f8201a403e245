"""What of the trainer is seen by Lightning's callbacks that look at a run, and by modules that are watched."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers.logger import DummyLogger

from fedlight.module.logs import with_attributes

_COUNTERS = {
    *("current_round", "current_epoch", "global_step", "fit_loop", "is_last_batch", "optimizers", "strategy"),
    *("train_dataloader", "num_training_batches", "estimated_stepping_batches", "max_steps", "lr_scheduler_configs"),
    *("callback_metrics", "logged_metrics", "progress_bar_metrics", "logger", "loggers", "should_stop"),
}
"""What differs between steps, clients or rounds, or is to be done anew in each."""


class Looking:
    """The trainer as a callback that only looks sees it: what it logs is kept for the row of the round."""

    def __init__(self, trainer: Any, callback: Callback) -> None:
        self._trainer, self._row = trainer, dict[str, float]()
        # Where a learning rate is looked at in every step and every epoch, once in a round is enough.
        self.should_update_logs = getattr(callback, "logging_interval", "step") == "step"
        self.loggers, self._logger_connector, self.group_separator = [self], self, "/"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)

    @property
    def lr_scheduler_configs(self) -> list[Any]:
        """The schedules; an interval of epochs has LearningRateMonitor look once."""
        return [replace(config, interval="epoch") for config in self._trainer.lr_scheduler_configs]

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Keep what the callback logs."""
        self._row.update(metrics)

    def take(self) -> dict[str, float]:
        """What it has logged since the last call."""
        row, self._row = self._row, {}
        return row


def once_known(
    call: Callable[..., Any], callback: Any, trainer: Any, hook: str, asked: dict[tuple[int, str], set[str]]
) -> Callable[..., Any]:
    """The hook of a callback with a ``monitor``, which acts at the first call of a round that finds what it monitors.

    ``asked`` holds what was known when a hook acted last, which is another set in every round.
    """

    def ask(*args: Any) -> Any:
        known, key = trainer.fresh, (id(callback), hook)
        waits = callback.monitor not in known or (hook == "on_validation_end" and not trainer.views.due)
        if waits or asked.get(key) is known:
            return None
        asked[key] = known
        return call(*args)

    return ask


@contextmanager
def watched(module: LightningModule, read: set[str]) -> Iterator[None]:
    """Note in ``read`` which counters of the trainer the module reads; loggers receive nothing."""
    with ExitStack() as stack:
        for m in module.modules():
            if (trainer := getattr(m, "_trainer", None)) is not None:
                stack.enter_context(with_attributes([m], {"_trainer": _WatchedTrainer(trainer, read)}))
        yield


class _WatchedTrainer:
    """Passes everything on except to loggers, and notes whether a counter was read."""

    def __init__(self, trainer: Any, read: set[str]) -> None:
        self.watched, self._read = trainer, read

    def __getattr__(self, name: str) -> Any:
        if name in _COUNTERS:
            self._read.add(f"trainer.{name}")
        if name in ("logger", "loggers"):
            return DummyLogger() if name == "logger" else [DummyLogger()]
        return getattr(self.watched, name)
