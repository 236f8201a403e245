"""The names of Lightning's Trainer that modules and callbacks read, and what each says in a federated round."""

import inspect
import math
from collections.abc import Callable
from functools import partial, wraps
from operator import attrgetter
from types import SimpleNamespace
from typing import Any, ParamSpec, TypeVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.trainer.states import RunningStage
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.utils.data import DataLoader, Dataset

from fedlight.callbacks.checkpoint import Checkpoint
from fedlight.data.federated import not_federated
from fedlight.engines.batch_order import num_batches
from fedlight.module.hooks import overrides
from fedlight.run.loggers import MetricsCSV
from fedlight.run.names import nearest

_P = ParamSpec("_P")
_R = TypeVar("_R")
HERE = {
    **dict.fromkeys(("max_epochs", "min_epochs", "max_time"), "max_rounds"),
    **dict.fromkeys(("max_steps", "min_steps"), "max_rounds' with 'trainer.local_steps"),
    **dict.fromkeys(("check_val_every_n_epoch", "val_check_interval"), "check_val_every_n_rounds"),
    **{"gpus": "accelerator=gpu' with 'trainer.devices", "weights_save_path": "default_root_dir"},
    **{"overfit_batches": "limit_train_batches", "resume_from_checkpoint": "ckpt_path' of 'trainer.fit"},
}
"""What is called otherwise in Lightning's Trainer, and how here."""
NO_COUNTERPART = "{!r} is of Lightning's own Trainer and has no counterpart in rounds: leave it out"
_LOADERS = ("train_dataloaders", "val_dataloaders", "dataloaders")


def answering(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """A method that answers arguments of Lightning's that it has not, and misspelt ones, with what is meant here."""
    known = inspect.signature(method).parameters
    theirs = inspect.signature(getattr(Trainer, method.__name__)).parameters

    @wraps(method)
    def call(*args: _P.args, **given: _P.kwargs) -> _R:
        for name in (name for name in given if name not in known):
            if name in _LOADERS:
                raise MisconfigurationException(f"`{name}`: {not_federated(given[name])}")
            near = f"; did you mean '{HERE[name]}'?" if name in HERE else "" if name in theirs else nearest(name, known)
            if near or name in theirs:
                other = f"{name!r} is not known{near}" if near else NO_COUNTERPART.format(name)
                raise TypeError(f"{method.__qualname__}: {other}")
        return method(*args, **given)

    return call


class Names:
    """Values under names, besides those of an object, whose class this seems to have; for any other name one sentence.

    It says ``what`` this stands for, as modules write it.
    """

    def __init__(self, what: str, behind: Any = None, **values: Any) -> None:
        vars(self).update(values, _what=what, _behind=behind)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._behind)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__") and hasattr(self._behind, name):
            return getattr(self._behind, name)
        way = "Read it with getattr(..., None), or keep the code that needs it for Lightning's own Trainer."
        raise AttributeError(f"{self._what}.{name} has no meaning in a federated run. {way}")


class _NotRunning:
    def __getattr__(self, name: str) -> Any:
        raise AttributeError("This name of trainer is known only from when fit, validate or test is called.")


class LightningNames:
    """Gives a trainer the names that it has no attribute for: settings, the session's parts, figures of the round.

    Attributes:
        now: the client that is trained, and the slot that takes its steps, where there are such.
        alone: set in an evaluation, whose steps wait for no other process.
        asked: set where a name was read whose value differs between clients.
    """

    now: tuple[int | None, Any] = (None, None)
    asked = alone = False

    def __getattr__(self, name: str) -> Any:
        if name in _VALUES:
            return _VALUES[name](self, vars(self).get("_session", _NotRunning()))
        settings = vars(self).get("settings", {})
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        values = {key: 1.0 if value is None and "limit_" in key else value for key, value in settings.items()}
        return getattr(Names("trainer", SimpleNamespace(**values)), name)


def _client(t: Any, s: Any) -> int:
    """The present client, or the one with the most samples."""
    t.asked, present = True, t.now[0]
    return max(range(s.datamodule.num_clients), key=s.datamodule.client_size) if present is None else int(present)


def _batches(t: Any, s: Any) -> int:
    return num_batches(s.datamodule.client_size(_client(t, s)), s.datamodule.batch_size, t.limit_train_batches)


def _steps(t: Any, s: Any) -> int:
    """Optimizer steps of a client's round, which is how long an optimizer lives."""
    return int(t.local_steps or t.local_epochs * math.ceil(_batches(t, s) / t.accumulate_grad_batches))


def _loader(dataset: Dataset[Any] | None, batch_size: int, collate_fn: Any) -> DataLoader[Any] | None:
    # It has a generator of its own: to iterate takes no random number from the step that does so.
    more: dict[str, Any] = {"collate_fn": collate_fn, "generator": torch.Generator()}
    return None if dataset is None else DataLoader(dataset, batch_size, **more)


def _evaluated(dataset: str, t: Any, s: Any) -> DataLoader[Any] | None:
    data = s.datamodule
    return _loader(getattr(data, dataset)(), data.eval_batch_size_on(s.fabric.device), data.eval_collate_fn)


def _num_evaluated(key: str, t: Any, s: Any) -> list[int]:
    loader, limit = getattr(t, f"{key}_dataloaders"), getattr(t, f"limit_{key}_batches")
    return [] if loader is None else [num_batches(len(loader.dataset), loader.batch_size, limit)]


def _optimization(t: Any, s: Any) -> tuple[list[Any], list[Any]]:
    """Optimizers and schedules: the present client's, or those that count rounds."""
    slot = t.now[1]
    if not hasattr(slot, "fresh"):
        return ([s.schedule.optimizer], s.schedule.schedulers) if hasattr(s, "schedule") else ([], [])
    for scheduled in slot.fresh.schedulers:  # they stand still: what they do in the round is worked out ahead
        scheduled.scheduler._last_lr = [float(group["lr"]) for group in slot.optimizer.param_groups]
    _ = getattr(slot, "own", slot).optimizer  # from now on its state is as in torch
    return [slot.optimizer], slot.fresh.schedulers


def _itself(value: Any = None, *_: Any, **__: Any) -> Any:
    return value


def _strategy(t: Any, s: Any) -> Any:
    strategy, (client, slot) = s.fabric.strategy, t.now
    optimizers, schedules = _optimization(t, s)
    wrapped = [slot.own.optimizer] if hasattr(slot, "own") else [LightningOptimizer(o) for o in optimizers]
    values = {"model": s.module, "lightning_module": s.module, "optimizers": optimizers, "reduce": strategy.all_reduce}
    values |= {"_lightning_optimizers": wrapped, "lr_scheduler_configs": schedules, "accelerator": t.accelerator}
    if client is not None or t.alone:  # as a client is, however many are trained elsewhere
        alone = ("reduce", "all_reduce", "all_gather", "broadcast", "barrier", "reduce_boolean_decision")
        values |= dict.fromkeys(alone, _itself)
    return Names("trainer.strategy", strategy, **values)


def _clip(optimizer: Any, value: float, algorithm: str = "norm") -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    (clip_grad_value_ if algorithm == "value" else clip_grad_norm_)(parameters, value or math.inf)


def _fit_loop(t: Any, s: Any) -> Any:
    slot, round = t.now[1], t.current_round
    index = 0 if slot is None else slot.batch_idx
    before = 0 if slot is None else sum(len(batches) for batches in slot.plan.epochs[: slot.epoch])
    batch = SimpleNamespace(ready=index + 1, started=index + 1, processed=index, completed=index)
    loop = Names(
        "trainer.fit_loop",
        batch_idx=index,
        total_batch_idx=before + index,
        batch_progress=SimpleNamespace(is_last_batch=t.is_last_batch, current=batch, total=batch),
        epoch_progress=SimpleNamespace(current=SimpleNamespace(ready=round + 1, processed=round, completed=round)),
        _batches_that_stepped=t.global_step,
        _should_accumulate=_itself,
        setup_data=_itself,  # code calls it before it asks for the number of batches
        **{name: getattr(t, name) for name in ("global_step", "max_epochs", "max_steps")},
    )
    vars(loop).update(epoch_loop=loop, max_batches=t.num_training_batches)
    return loop


def _stage(stage: RunningStage, t: Any, s: Any) -> bool:
    return bool(t.state.stage == stage)


def _part(path: str, t: Any, s: Any) -> Any:
    return attrgetter(path)(s)


_PARTS = {
    **{name: f"fabric.{name}" for name in ("print", "global_rank", "local_rank", "node_rank", "world_size")},
    **{"is_global_zero": "fabric.is_global_zero", "model": "module", "lightning_module": "module"},
    "checkpoint_writer": "writer",
    **{part: part for part in ("datamodule", "profiler", "ckpt_path", "federation")},
    **{part: part for part in ("resumed", "views", "evaluator", "fresh")},
}
_VALUES: dict[str, Callable[[Any, Any], Any]] = {
    **{stage.name.lower(): partial(_stage, stage) for stage in RunningStage},  # `training`, say
    **{name: partial(_part, path) for name, path in _PARTS.items()},
    **dict.fromkeys(("min_epochs", "min_steps", "progress_bar_callback"), lambda t, s: None),
    **dict.fromkeys(("overfit_batches", "num_sanity_val_steps"), lambda t, s: False),
    **dict.fromkeys(("estimated_stepping_batches", "max_steps"), _steps),
    "current_epoch": lambda t, s: t.current_round,
    "num_training_batches": _batches,
    "train_dataloader": lambda t, s: _loader(
        s.datamodule.client_dataset(_client(t, s)), s.datamodule.batch_size, s.datamodule.collate_fn
    ),
    **{f"{key}_dataloaders": partial(_evaluated, f"{key}_dataset") for key in ("val", "test")},
    **{f"num_{key}_batches": partial(_num_evaluated, key) for key in ("val", "test")},
    "enable_validation": lambda t, s: overrides(s.module, "validation_step") and sum(t.num_val_batches) > 0,
    "evaluating": lambda t, s: t.validating or t.testing,
    "interrupted": lambda t, s: t.state.status == "interrupted",
    "received_sigterm": lambda t, s: bool(s.interrupted),
    "max_epochs": lambda t, s: t.max_rounds,
    "check_val_every_n_epoch": lambda t, s: t.settings["check_val_every_n_rounds"],
    # Where nothing is validated, EarlyStopping looks at what training logs: it decides by this name.
    "val_check_interval": lambda t, s: None if t.enable_validation else 1.0,
    "log_every_n_steps": lambda t, s: 50,  # as in Lightning: what modules log by themselves stays as rare
    "gradient_clip_algorithm": lambda t, s: t.gradient_clip_val and t.settings["gradient_clip_algorithm"],
    "strategy": _strategy,
    "precision_plugin": lambda t, s: Names("trainer.precision", s.fabric.strategy.precision, clip_gradients=_clip),
    "accelerator": lambda t, s: AcceleratorRegistry.get(s.fabric.device.type),
    "num_devices": lambda t, s: len(getattr(s.fabric.strategy, "parallel_devices", "1")),
    "device_ids": lambda t, s: [s.fabric.device.index or 0] if t.num_devices == 1 else [*range(t.num_devices)],
    "fit_loop": _fit_loop,
    "_evaluation_loop": _fit_loop,
    "is_last_batch": lambda t, s: (c := t.now[1]) is not None and c.batch_idx + 1 == len(c.plan.epochs[c.epoch]),
    "optimizers": lambda t, s: _optimization(t, s)[0],
    "lr_scheduler_configs": lambda t, s: _optimization(t, s)[1],
    "checkpoint_callback": lambda t, s: next(iter(t.checkpoint_callbacks), None),
    "checkpoint_callbacks": lambda t, s: [c for c in t.callbacks if isinstance(c, Checkpoint)],
    "early_stopping_callback": lambda t, s: next(iter(t.early_stopping_callbacks), None),
    "early_stopping_callbacks": lambda t, s: [c for c in t.callbacks if isinstance(c, EarlyStopping)],
    "loggers": lambda t, s: sorted(s.loggers, key=lambda logger: isinstance(logger, MetricsCSV)),
    "logger": lambda t, s: next(iter(t.loggers), None) or DummyLogger(),
    "logged_metrics": lambda t, s: t.callback_metrics,
    "progress_bar_metrics": lambda t, s: {name: float(value) for name, value in t.callback_metrics.items()},
    "log_dir": lambda t, s: None if t.run_dir is None else str(t.run_dir),
}
