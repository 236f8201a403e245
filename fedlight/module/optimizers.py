"""What a module's ``configure_optimizers`` returns, and schedules that step once a round."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import _configure_optimizers
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.optim import LBFGS, Optimizer, SparseAdam
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils._pytree import tree_leaves

from fedlight.module.hooks import overrides
from fedlight.module.logs import with_attributes

_INTERVALS = ("step", "epoch", "round")


@dataclass
class ScheduledLR(LRSchedulerConfig):
    """A learning-rate scheduler and when it steps, as in Lightning's ``lr_scheduler`` dictionary.

    ``interval`` is ``"step"`` (optimizer steps), ``"epoch"`` (local epochs), both counted from the start of a
    client's round, or ``"round"`` (communication rounds).
    """

    def step(self, metrics: dict[str, Any] | None = None) -> None:
        """Advance the schedule; one of a plateau waits for a round that has the monitored metric."""
        if not self.reduce_on_plateau:
            self.scheduler.step()  # type: ignore[call-arg]
        elif metrics is not None and self.monitor in metrics:
            self.scheduler.step(float(metrics[self.monitor]))  # type: ignore[arg-type]


@dataclass
class Optimization:
    """One optimizer and its schedulers."""

    optimizer: Optimizer
    schedulers: list[ScheduledLR] = field(default_factory=list)

    @property
    def lr(self) -> float:
        """The learning rate of the first parameter group; NaN where the optimizer has none."""
        return float(self.optimizer.param_groups[0].get("lr", float("nan")))

    def advance(self, interval: str, count: int, metrics: dict[str, Any] | None = None) -> None:
        """Step the schedulers of an interval, of which ``count`` are now complete; ``metrics`` are the round's row."""
        for scheduled in self.schedulers:
            if scheduled.interval == interval and count % scheduled.frequency == 0:
                scheduled.step(metrics)


@contextmanager
def about(module: LightningModule, client: int, slot: Any = None) -> Iterator[None]:
    """Inside, the names of the module's trainer speak of a client, and of the step that a slot is taking."""
    given = module._trainer
    trainer: Any = getattr(given, "watched", given)  # what a schedule depends on is known for each client
    if not hasattr(trainer, "now"):
        yield
        return
    with with_attributes([trainer], {"now": (client, slot)}), with_attributes([module], {"_trainer": trainer}):
        yield


def configure_optimizers(module: LightningModule) -> Optimization:
    """Call the module's ``configure_optimizers`` and read what it returns.

    Raises:
        MisconfigurationException: if there is not exactly one optimizer, a scheduler entry is not understood, or torch
            refuses a setting.
    """
    try:
        found: Any = module.configure_optimizers()
    except ValueError as error:
        raise MisconfigurationException(f"model.configure_optimizers: {error}") from error
    if isinstance(found, dict):  # a scheduler that is None is none
        found = {key: value for key, value in found.items() if value is not None}
    try:
        optimizers, schedulers, monitor = ([], [], None) if found is None else _configure_optimizers(found)
    except (MisconfigurationException, KeyError) as error:
        what = f"model.configure_optimizers returned {found!r}, which is not understood."
        raise MisconfigurationException(what) from error
    entries = [{"monitor": monitor, **(s if isinstance(s, dict) else {"scheduler": s})} for s in schedulers]
    if len(optimizers) != 1:
        raise MisconfigurationException(
            f"model.configure_optimizers of {type(module).__name__} returned {len(optimizers)} optimizers; federated"
            " training needs exactly one. Put the parameters into groups of one optimizer."
        )
    optimizer = optimizers[0]
    for refused, why in {LBFGS: "evaluates its own closure", SparseAdam: "takes no gradients but sparse ones"}.items():
        if isinstance(optimizer, refused):
            raise MisconfigurationException(f"model.configure_optimizers: {refused.__name__} {why}; use another one.")
    if all(callable(getattr(optimizer, mode, None)) for mode in ("train", "eval")):  # as those without a schedule
        name, why = type(optimizer).__name__, "has other weights in training than in evaluation (train(), eval())"
        raise MisconfigurationException(f"model.configure_optimizers: {name} {why}, and clients send one; use another.")
    return Optimization(optimizer, [_scheduled(entry, optimizer, module) for entry in entries])


def _scheduled(entry: dict[str, Any], optimizer: Optimizer, module: LightningModule) -> ScheduledLR:
    where = f"model.configure_optimizers of {type(module).__name__}"
    if unknown := sorted(entry.keys() - _KEYS):
        rank_zero_warn(f"{where}: lr_scheduler keys {unknown} mean nothing, as in Lightning.")
    config = {key: value for key, value in entry.items() if key in _KEYS}
    if "scheduler" not in config:
        raise MisconfigurationException(f"{where}: the lr_scheduler dictionary {entry} needs the key 'scheduler'.")
    if isinstance(made := config["scheduler"], type) or not callable(getattr(made, "step", None)):
        raise MisconfigurationException(f"{where}: {made!r} is no scheduler; make one of it with the optimizer.")
    scheduled = ScheduledLR(**{"reduce_on_plateau": isinstance(config["scheduler"], ReduceLROnPlateau), **config})
    if scheduled.interval not in _INTERVALS:
        raise MisconfigurationException(f"{where}: interval {scheduled.interval!r} must be one of {_INTERVALS}.")
    if type(scheduled.frequency) is not int or scheduled.frequency < 1:
        raise MisconfigurationException(f"{where}: frequency={scheduled.frequency!r} must be a whole number from 1 on.")
    if getattr(scheduled.scheduler, "optimizer", optimizer) is not optimizer:
        raise MisconfigurationException(f"{where}: a scheduler belongs to an optimizer that was not returned.")
    if scheduled.reduce_on_plateau:
        name = type(scheduled.scheduler).__name__
        if scheduled.monitor is None:
            raise MisconfigurationException(f"{where}: {name} needs a `monitor`, the name of a logged metric.")
        if scheduled.interval == "step":
            raise MisconfigurationException(
                f"{where}: {name} cannot take interval 'step': metrics are known once a round. Use 'round'."
            )
        scheduled.interval = "round"
    return scheduled


_KEYS = set(LRSchedulerConfig.__dataclass_fields__)


def check_schedules(module: LightningModule, sizes: Sequence[int], trainer: Any) -> None:
    """Take every schedule through a client's round, or all rounds, without training.

    Clients differ in size: the largest and the smallest are looked at.

    Raises:
        MisconfigurationException: if a schedule ends before (``OneCycleLR`` does); if the module's own
            ``lr_scheduler_step`` does anything but ``scheduler.step()``.
    """
    for size in {max(sizes), min(n for n in sizes if n)}:
        with about(module, sizes.index(size)):
            steps, batches = trainer.estimated_stepping_batches, trainer.num_training_batches
            epochs = trainer.local_epochs or math.ceil(steps * trainer.accumulate_grad_batches / batches)
            optimization = configure_optimizers(module)
        module.zero_grad(set_to_none=True)
        _step_without_gradient(optimization.optimizer)
        for scheduled in optimization.schedulers:
            count = {"step": steps, "epoch": epochs, "round": trainer.max_rounds}[scheduled.interval]
            _check_schedule(module, scheduled, count, optimization.optimizer)
    taken = {id(p) for group in optimization.optimizer.param_groups for p in group["params"]}
    if left := [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in taken]:
        some = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
        rank_zero_info(f"model.configure_optimizers: no client trains {some}, which the optimizer does not have.")


def _check_schedule(module: LightningModule, scheduled: ScheduledLR, count: int, optimizer: Optimizer) -> None:
    scheduler, calls, metric = scheduled.scheduler, list[Any](), 1.0 if scheduled.reduce_on_plateau else None
    name, step, steps = type(scheduler).__name__, scheduler.step, range(count // scheduled.frequency)
    others, moved = _others(optimizer), list[str]()
    if overrides(module, "lr_scheduler_step"):
        scheduler.step = lambda *args, **named: calls.append((*args, *named.values()))  # type: ignore[method-assign]
        module.lr_scheduler_step(scheduler, metric)
        scheduler.step = step  # type: ignore[method-assign]
        if calls not in ([()], [(metric,)]):
            raise MisconfigurationException(
                f"model: {type(module).__name__}.lr_scheduler_step gives {name}.step {calls}; a schedule can only count"
                " its own steps, with scheduler.step(). Return one that does."
            )
    for done in steps if metric is None else ():
        try:
            scheduled.step()
        except ValueError as error:
            whole = "trainer.max_rounds" if scheduled.interval == "round" else "a client's round"
            raise MisconfigurationException(
                f"model.configure_optimizers of {type(module).__name__}: {name} ends after {done} {scheduled.interval}s"
                f", and {whole} has up to {count}: {error} For a schedule of local steps take"
                " total_steps=self.trainer.estimated_stepping_batches and interval 'step'."
            ) from error
        moved += [place[1] for place, value in _others(optimizer).items() if value != others.get(place, value)]
    if moved and scheduled.interval == "round":
        raise MisconfigurationException(
            f"model.configure_optimizers of {type(module).__name__}: {name} changes {moved[0]} as well, and clients"
            " get the learning rate alone with interval 'round'. Give it cycle_momentum=False, or take interval 'step'."
        )


def _others(optimizer: Optimizer) -> dict[tuple[int, str], Any]:
    groups = enumerate(optimizer.param_groups)
    return {(i, key): value for i, group in groups for key, value in group.items() if key not in ("params", "lr")}


def _step_without_gradient(optimizer: Optimizer) -> None:
    """It changes nothing; schedulers warn if their optimizer never stepped."""
    try:
        optimizer.step()
    except Exception as error:
        raise MisconfigurationException(
            f"model.configure_optimizers: {type(optimizer).__name__}.step() is called without a closure, and parameters"
            f" may have no gradient, which ends in {type(error).__name__}: {error} Use another optimizer; SAM is"
            " trainer.perturbation."
        ) from error


class RoundSchedule(Optimization):
    """The learning rates of each round, from the module's schedulers whose interval is ``"round"``.

    Clients build a fresh optimizer every round; this one object carries the schedule across rounds.
    """

    def __init__(self, module: LightningModule) -> None:
        module.zero_grad(set_to_none=True)
        found = configure_optimizers(module)
        super().__init__(found.optimizer, found.schedulers)
        own = {id(parameter) for parameter in module.parameters()}
        if any(id(parameter) not in own for group in self.optimizer.param_groups for parameter in group["params"]):
            raise MisconfigurationException(
                f"model.configure_optimizers: {type(self.optimizer).__name__} has parameters that are not the module's,"
                " and no client would send. Assign what has them to the module; a list of modules is a ModuleList."
            )
        _step_without_gradient(self.optimizer)
        self._schedulers = [s for s in self.schedulers if s.interval == "round"]
        for scheduled in (s for s in self._schedulers if s.reduce_on_plateau):
            name = type(scheduled.scheduler).__name__
            rank_zero_info(f"{name} steps after each round that is evaluated, by the round's {scheduled.monitor!r}.")
        for name in sorted({type(s.scheduler).__name__ for s in self.schedulers if s.interval == "epoch"}):
            rank_zero_info(
                f"model.configure_optimizers: {name} counts the local epochs of a client's round and begins anew in the"
                " next (interval 'epoch'). With interval 'round' it is one schedule over all rounds."
            )
        self.has_lr = all("lr" in g for g in self.optimizer.param_groups)

    @property
    def lrs(self) -> tuple[float, ...] | None:
        """The learning rate of every group in this round; None where no schedule counts rounds."""
        return tuple(float(g["lr"]) for g in self.optimizer.param_groups) if self._schedulers else None

    def state_dict(self) -> dict[str, Any]:
        """Learning rates and scheduler states, as plain values."""
        groups = [g.get("lr") for g in self.optimizer.param_groups]
        states = [{k: v for k, v in s.scheduler.state_dict().items() if _is_plain(v)} for s in self._schedulers]
        return {"lrs": [None if lr is None else float(lr) for lr in groups], "schedulers": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        for scheduled, saved in zip(self._schedulers, state["schedulers"], strict=True):
            scheduled.scheduler.load_state_dict({**scheduled.scheduler.state_dict(), **saved})
        for group, lr in zip(self.optimizer.param_groups, state["lrs"], strict=True):
            if lr is not None:
                group["lr"] = lr


def _is_plain(value: Any) -> bool:  # a SequentialLR or ChainedScheduler holds what others do
    return all(leaf is None or isinstance(leaf, bool | int | float | str) for leaf in tree_leaves(value))
