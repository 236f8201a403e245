"""Checkpoints of a federated run."""

import math
import time
from contextlib import suppress
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info

from fedlight.callbacks._rounds import RoundCallback
from fedlight.checks import check_number, check_whole
from fedlight.run.checkpoint import CheckpointWriter, save_checkpoint
from fedlight.run.names import nearest, preferred_metric, smaller_is_better


class Checkpoint(RoundCallback):
    """Writes ``checkpoints/last.ckpt`` and ``checkpoints/best.ckpt`` in the run's folder.

    A run that has none gets one with these defaults. ``last.ckpt`` is written after a round, always after the last one
    and when a signal ends the run. Files are written while training goes on. Writing all clients' state may take
    longer than a round: rounds are passed over until writing takes no more than ``max_overhead`` of the time. What a
    killed run lost is computed again; the best round so far is kept in memory until it is written.

    Args:
        monitor: the metric that ``best.ckpt`` has the best value of; by default, of what ``validation_step`` logs, an
            accuracy, or else a loss, or else the first. A line says which, or why there is none.
        mode: whether larger (``max``) or smaller (``min``) is better; by default smaller where the name of the metric
            means a loss or an error.
        every_n_rounds: write ``last.ckpt`` after every so many rounds.
        max_overhead: the part of the run's time that writing may take; 1 writes whenever it is due, and waits until
            that is done.
    """

    def __init__(
        self,
        monitor: str | None = None,
        mode: Literal["max", "min"] | None = None,
        every_n_rounds: int = 1,
        max_overhead: float = 0.1,
    ) -> None:
        self.monitor, self.mode = monitor, mode
        self.every_n_rounds = check_whole("Checkpoint.every_n_rounds", every_n_rounds)
        self.max_overhead = check_number("Checkpoint.max_overhead", max_overhead, positive=True, at_most=1)
        self._begin()

    def _begin(self) -> None:
        self.best: float | None = None
        self._chosen: str | None = None
        self._said = False
        self._pending: dict[str, Any] | None = None
        self._written_at, self._cost = -math.inf, 0.0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Begin a run anew; a resumed one gets its state back afterwards."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._begin()

    def on_round_end(self, trainer: Any, pl_module: Any) -> None:
        """Write what is due."""
        if trainer.run_dir is None:
            return
        final = trainer.should_stop or trainer.current_round >= trainer.max_rounds
        writer = trainer.checkpoint_writer
        # The decision is the first process's: clocks differ, and all of them take part in writing.
        cheap, failure = trainer.strategy.broadcast((self._is_cheap(writer), writer.failure()))
        if failure is not None:
            raise MisconfigurationException(failure)
        if self._is_best(self._monitored(trainer), trainer.callback_metrics):
            self._pending = trainer.snapshot()
        last = final or (trainer.current_round % self.every_n_rounds == 0 and cheap)
        if not last and not (cheap and self._pending):
            return
        started, wait = time.monotonic(), bool(final or self.max_overhead == 1)
        writer.seconds = 0.0
        # The best comes first: what last.ckpt says about it is then true whenever the run is killed.
        if self._pending is not None:
            trainer.save_checkpoint("best", self._pending, wait=wait)
            self._pending = None
        if last:
            trainer.save_checkpoint("last", wait=wait)
        self._written_at = time.monotonic()
        self._cost = self._written_at - started

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Write the best round, if that is still due."""
        pending, self._pending = self._pending, None
        if not hasattr(type(trainer), "current_round"):
            return  # a stock trainer, which setup has refused
        trainer.checkpoint_writer.failure(wait=True)  # an older file must not replace this one
        if pending is not None and trainer.is_global_zero:
            with suppress(OSError):  # the disk may be why the run ended
                save_checkpoint(trainer.run_dir / "checkpoints" / "best.ckpt", pending)

    def _is_cheap(self, writer: CheckpointWriter) -> bool:
        since = time.monotonic() - self._written_at
        cost = max(self._cost, writer.seconds)
        return self.max_overhead == 1 or (not writer.busy and cost <= self.max_overhead * since)

    def _monitored(self, trainer: Any) -> str | None:
        """The metric to compare by, if there is one yet; said once."""
        views = trainer.views
        name = self.monitor or self._chosen or preferred_metric(views.logged)
        found = name is not None and name in trainer.callback_metrics
        if not self._said and (found or (views.due and not views.may_follow(str(name)))):
            self._said, logged = True, ", ".join(views.logged) or "nothing"
            near = nearest(str(name), trainer.fresh) or "."
            rank_zero_info(
                f"best.ckpt: the round with the {'largest' if self._larger(str(name)) else 'smallest'} {name}."
                if found
                else f"best.ckpt is not written: Checkpoint.monitor={name!r}, and validation logs {logged}{near}"
            )
        if not found:
            return None
        # A checkpoint of version 0.1 does not say what its best value is one of: val/accuracy, or else val/loss.
        if name not in ([self.monitor, "val/accuracy", "val/loss"] if self._chosen is None else [self._chosen]):
            self.best = None
        self._chosen = name
        return name

    def _larger(self, monitor: str) -> bool:
        return self.mode == "max" if self.mode else not smaller_is_better(monitor)

    def _is_best(self, monitor: str | None, metrics: dict[str, Any]) -> bool:
        if monitor is None:
            return False
        value, sign = float(metrics[monitor]), 1 if self._larger(monitor) else -1
        better = not math.isnan(value) and (self.best is None or sign * value > sign * self.best)
        self.best = value if better else self.best
        return better

    def state_dict(self) -> dict[str, Any]:
        """The best value so far, and of what."""
        return {"best": self.best, "monitor": self._chosen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.best, self._chosen = state_dict["best"], state_dict.get("monitor")
        self._said = self._chosen is not None
