"""What an engine that records the local step once, instead of running it anew each time, can not do."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torchmetrics import Metric

from fedlight._hooks import BATCH_HOOKS, EPOCH_HOOKS, overrides
from fedlight._penalized_step import penalized_step
from fedlight.data.arrays import ArrayDataset
from fedlight.engines.base import LocalTraining
from fedlight.engines.step import TRANSFER_HOOKS

_CLIENT_HOOKS = ("on_client_start", "on_client_end")
_COUNTERS = {
    *("current_round", "current_epoch", "global_step", "fit_loop", "is_last_batch", "optimizers", "strategy"),
    *("train_dataloader", "num_training_batches", "estimated_stepping_batches", "max_steps", "lr_scheduler_configs"),
    *("callback_metrics", "logged_metrics", "progress_bar_metrics", "logger", "loggers", "should_stop"),
}
"""What differs between steps, clients or rounds, or is to be done anew in each."""


def check_recordable(training: LocalTraining, engine: str) -> None:
    """Refuse by name what would have to happen in Python in every step.

    Raises:
        MisconfigurationException: naming the hook, the dataset or the precision, and what to do instead.
    """
    for reason in _reasons(training, engine):
        raise cannot(engine, reason)


def cannot(engine: str, reason: str) -> MisconfigurationException:
    """The error for an engine that cannot do the work."""
    return MisconfigurationException(f"trainer.engine={engine}: {reason}. Use trainer.engine=eager.")


def _reasons(training: LocalTraining, engine: str) -> Iterator[str]:
    overridden: Callable[[str], list[str]] = getattr(training.call, "overridden", lambda name: [])
    for hook in (*BATCH_HOOKS, *EPOCH_HOOKS, *_CLIENT_HOOKS):
        if owners := overridden(hook):
            yield f"{owners[0]} overrides {hook}, which has no place in a recorded local step"
    for hook in (*TRANSFER_HOOKS, "optimizer_step"):
        if overrides(training.module, hook):
            yield f"{type(training.module).__name__} overrides {hook}, which has no place in a recorded local step"
    dataset = None if training.example is None else training.example.dataset
    if dataset is not None and not isinstance(dataset, ArrayDataset):
        yield (
            f"the clients' data is a {type(dataset).__name__}, read sample by sample; it takes tensors in memory (or"
            " what fits there: samples of tensors of one shape, without random numbers) and no data.collate_fn"
        )
    scaled = getattr(training.fabric.strategy.precision, "scaler", None) is not None
    if scaled and (engine != "cuda_graph" or training.compile):
        yield "trainer.precision=16-mixed looks for overflow in every step; bf16-mixed does not"


@contextmanager
def watched(module: LightningModule, engine: str) -> Iterator["WatchedIndex"]:
    """Find out whether ``training_step`` reads what changes from step to step: hand it the index that this yields.

    Raises:
        MisconfigurationException: on exit, if it read the index, or the round from the trainer.
    """
    read: set[str] = set()
    modules = [m for m in module.modules() if isinstance(m, LightningModule)]
    before = [m._trainer for m in modules]
    for m, trainer in zip(modules, before, strict=True):
        m._trainer = None if trainer is None else _WatchedTrainer(trainer, read)  # type: ignore[assignment]
    try:
        yield WatchedIndex(read)
    finally:
        for m, trainer in zip(modules, before, strict=True):
            m._trainer = trainer
    if read:
        what = "batch_idx" if "batch_idx" in read else f"trainer.{min(read)}"
        raise cannot(engine, f"{type(module).__name__}.training_step reads {what}, which a recorded step would freeze")


@contextmanager
def untouched_metrics(module: LightningModule, engine: str) -> Iterator[None]:
    """Find out whether ``training_step`` updates a torchmetrics object, whose state would mix the clients.

    Raises:
        MisconfigurationException: on exit, if it did; in place of whatever error that led to.
    """
    metrics = {name: m for name, m in module.named_modules() if isinstance(m, Metric)}
    before = {name: m._update_count for name, m in metrics.items()}
    problem: Exception | None = None
    try:
        yield
    except Exception as error:
        problem = error
    touched = [name for name, m in metrics.items() if m._update_count != before[name]]
    for name in touched:
        metrics[name].reset()
    if touched:
        reason = f"training_step updates the metric {touched[0]!r}, which would mix the clients"
        raise cannot(engine, reason) from problem
    if problem is not None:
        raise problem


def explain(error: Exception, module: LightningModule, otherwise: str) -> str:
    """What the module did that cannot be recorded, and where.

    Args:
        error: what it led to.
        module: the module.
        otherwise: what to say where the reason is not known.
    """
    text = str(error).strip()
    reason = otherwise
    if any(sign in text for sign in ("data-dependent", ".item()", "synchronizing CUDA", "stream is capturing")):
        reason = "branches on the value of a tensor, or takes it to Python"
    elif "in-place" in text or "inplace" in text:
        reason = "changes a tensor in place that the clients share"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _is_library(f.filename)]
    where = f", at {frames[-1].filename}:{frames[-1].lineno}: `{frames[-1].line}`" if frames else ""
    first = f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
    return f"training_step of {type(module).__name__} {reason} ({first}){where}"


def _is_library(filename: str) -> bool:
    places = ("/torch/", "/lightning/", "/fedlight/engines/", "/fedlight/callbacks/", "/fedlight/_penalized_step.py")
    return any(place in filename for place in places)


class _WatchedTrainer:
    """Passes everything on, and notes whether a counter was read."""

    def __init__(self, trainer: Any, read: set[str]) -> None:
        self.watched, self._read = trainer, read

    def __getattr__(self, name: str) -> Any:
        if name in _COUNTERS:
            self._read.add(name)
        return getattr(self.watched, name)


class WatchedIndex(int):
    """A batch index 0 that notes whether its value was asked for."""

    _read: set[str]

    def __new__(cls, read: set[str]) -> "WatchedIndex":
        """An index that adds ``batch_idx`` to ``read``."""
        index = super().__new__(cls, 0)
        index._read = read
        return index


def _noting(name: str) -> Callable[..., Any]:
    original = getattr(int, name)

    def method(self: WatchedIndex, *args: Any) -> Any:
        self._read.add("batch_idx")
        return original(self, *args)

    return method


for _name in ("eq", "ne", "lt", "le", "gt", "ge", "bool", "mod", "floordiv", "truediv", "divmod", "index"):
    setattr(WatchedIndex, f"__{_name}__", _noting(f"__{_name}__"))
for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "float", "int", "hash", "str", "repr", "format", "and"):
    setattr(WatchedIndex, f"__{_name}__", _noting(f"__{_name}__"))


def python_values(training: LocalTraining) -> list[tuple[str, Any]]:
    """Numbers, strings and flags that a recorded step has frozen: where they change, it must be recorded anew."""
    modules = dict(training.module.named_modules())
    metrics = {name for name, m in modules.items() if isinstance(m, Metric)}  # they count, and no step may use them
    owners: list[tuple[str, Any]] = [(name, m) for name, m in modules.items() if name not in metrics]
    step = penalized_step(training.module)
    owners += [] if step is None else [(f"penalty {i}", p) for i, p in enumerate(step.penalties)]
    owners += [("perturbation", training.perturbation)] if training.perturbation is not None else []
    values = [
        (f"{owner}.{name}", value)
        for owner, thing in owners
        for name, value in vars(thing).items()
        if isinstance(value, bool | int | float | str)
    ]
    frozen = [(name, p._version) for name, p in training.module.named_parameters() if not p.requires_grad]
    return values + frozen
