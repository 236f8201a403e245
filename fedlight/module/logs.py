"""What a module's ``self.log`` collects during local training and evaluation."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_float
from operator import add
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import Metric

LOSS = "train/loss"
"""What the module logs by this name, or else the task loss, which the engine records."""
_REDUCTIONS = {"mean", "sum", "min", "max"}
_ALONE = {"sync_on_compute": False, "dist_sync_on_step": False, "_to_sync": False}


class LogCollector:
    """Reduces what is logged, on the device and without looking at a value.

    A mean is kept as ``(Σ value·batch_size, Σ batch_size)``; sums, minima and maxima as themselves. A torchmetrics
    ``Metric`` is kept as a reference; :meth:`sums` computes it, with the weight of the samples that it has seen, and
    resets it.

    Attributes:
        batch_size: the weight of what is logged without a ``batch_size`` of its own.
        dtype: what values are summed in; float64 values stay float64.
        enabled: whether :meth:`log` records; it does not in the second pass of a step.
        prog_bar: names that were logged with ``prog_bar=True``.
        own_loss: whether the module logs its loss itself.
        alone: whether this process works on data of its own: torchmetrics then computes from what it has seen here,
            and does not wait for the other processes.
        numbers: whether sums for a mean are kept as Python's numbers, which are rounded as tensors are: on a CPU nobody
            waits for a value, and to make two tensors of it in every step takes as long as a small layer.
    """

    def __init__(self, device: torch.device | str = "cpu", alone: bool = True) -> None:
        self.device, self.alone = torch.device(device), alone
        self.dtype = torch.float32
        self.numbers = False
        self.batch_size = 1
        self.enabled, self.own_loss = True, False
        self.prog_bar: set[str] = set()
        self._sums: dict[str, tuple[Tensor | float, Tensor | float]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._reductions: dict[str, str] = {}
        self._metrics: dict[str, Metric] = {}
        self._seen: dict[str, float] = {}

    def reset(self) -> None:
        """Forget all values."""
        self._sums.clear()
        self._forget_metrics()

    def _forget_metrics(self) -> None:
        for metric in self._metrics.values():
            metric.reset()
        self._metrics.clear()
        self._seen.clear()

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: str | Callable[..., Any] = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: Any = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        metric_attribute: str | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """Stands in for ``LightningModule.log``, with its signature.

        Every value is reduced over the batches, epochs and clients of a round: there is one row of metrics per round,
        so ``on_step`` and ``on_epoch`` make no difference.
        """
        if not self.enabled:
            return
        if name not in self._sums and (name == "round" or len(name.splitlines()) != 1):
            raise MisconfigurationException(
                f"self.log({name!r}, ...): a name is a line, and not `round`, a row's number."
            )
        if name == LOSS and not self.own_loss:
            self.own_loss = True
            self._sums.pop(LOSS, None)
        if prog_bar:
            self.prog_bar.add(name)
        weight = self.batch_size if batch_size is None else batch_size
        if isinstance(value, Metric):
            self._metrics[name] = value
            self._seen[name] = self._seen.get(name, 0) + weight
            return
        if isinstance(value, dict):
            raise ValueError(f"self.log({name!r}, {{...}}) is not possible; use self.log_dict for a dictionary.")
        reduction = reduce_fx if isinstance(reduce_fx, str) else getattr(reduce_fx, "__name__", "custom")
        if reduction not in _REDUCTIONS:
            raise MisconfigurationException(
                f"self.log({name!r}, reduce_fx={reduce_fx!r}) is not supported: use one of {sorted(_REDUCTIONS)}."
            )
        self.add(name, self.scalar(name, value), weight, reduction)

    def scalar(self, name: str, value: Any) -> Tensor:
        """A value as it is summed: a scalar tensor ``[]`` on the device, of ``dtype`` or float64."""
        if not isinstance(value, Tensor):  # filled in on the device: a copy from here would wait for it
            if isinstance(value, dict | list | tuple):  # a metric of several values
                raise ValueError(f"self.log({name!r}, ...) takes one number, found a {type(value).__name__}.")
            return torch.full((), float(value), dtype=self.dtype, device=self.device)
        if value.dtype is self.dtype and value.device == self.device and value.dim() == 0:
            return value.detach()  # each of these calls takes as long as a small layer
        tensor = value.detach().to(self.device)
        if tensor.numel() != 1:
            raise ValueError(f"self.log({name!r}, ...) takes one number, found a tensor of shape {list(tensor.shape)}.")
        tensor = tensor.reshape(())
        return tensor if tensor.dtype == torch.float64 else tensor.to(self.dtype)

    def add(self, name: str, value: Tensor, weight: Tensor | float, reduction: str = "mean") -> None:
        """Add a scalar tensor with a weight to a name."""
        if self.numbers and reduction == "mean":
            self._add_number(name, value, float(weight))
            return
        value = value * weight if reduction == "mean" else value.clone()
        self.merge(name, value, weight if isinstance(weight, Tensor) else float(weight), reduction)

    def _add_number(self, name: str, value: Tensor, weight: float) -> None:
        old, weights = self._sums.get(name, (0.0, 0.0))
        rounded = float if value.dtype is torch.float64 else _float32
        self._sums[name] = rounded(float(old) + rounded(value.item() * weight)), weights + weight
        self._reductions[name], self._dtypes[name] = "mean", value.dtype

    def merge(self, name: str, value: Tensor, weight: Tensor | float, reduction: str = "mean") -> None:
        """Add what another collector's :meth:`sums` gave for a name."""
        self._reductions[name] = reduction
        old = self._sums.get(name)
        if old is not None:
            weight = old[1] + weight
            combine: Any = {"min": torch.minimum, "max": torch.maximum}.get(reduction, add)
            value = combine(old[0], value)
        self._sums[name] = (value, weight)

    def sums(self, keep: bool = False) -> dict[str, tuple[Tensor, Tensor]]:
        """The sums since the last :meth:`reset`: ``name -> (sum or extremum, weight)``; ``keep`` resets no metric."""
        found = self._tensors()
        for name, metric in self._metrics.items():
            with with_attributes([metric] if self.alone else [], _ALONE):
                value = self.scalar(name, metric.compute())
            found[name] = (value * self._seen[name], torch.full_like(value, self._seen[name]))
            self._reductions[name] = "mean"
        if not keep:
            self._sums.update(found)
            self._forget_metrics()
        return found

    def take(self) -> dict[str, tuple[Tensor, Tensor, str]]:
        """Values that were logged since the last call, with their reductions; metrics stay for :meth:`sums`."""
        taken = {name: (*sums, self._reductions[name]) for name, sums in self._tensors().items()}
        self._sums.clear()
        return taken

    def _tensors(self) -> dict[str, tuple[Tensor, Tensor]]:
        # A weight is a number for as long as may be: nobody waits for it, and a step has fewer tensors to make.
        found = {}
        for name, (value, weight) in self._sums.items():
            total = torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else self._dtypes[name])
            found[name] = (total, weight if isinstance(weight, Tensor) else torch.full_like(total, weight))
        return found

    def reduction(self, name: str) -> str:
        """How values of a name are combined."""
        return self._reductions.get(name, "mean")

    def compute(self, keep: bool = False) -> dict[str, Tensor]:
        """The reduced values: scalar tensors on the device; ``keep`` leaves the metrics as they are."""
        sums = self.sums(keep).items()
        return {name: total / weight if self.reduction(name) == "mean" else total for name, (total, weight) in sums}


def _float32(number: float) -> float:
    return c_float(number).value


@contextmanager
def collecting_logs(module: LightningModule, collector: LogCollector) -> Iterator[LogCollector]:
    """Send ``module.log`` and ``module.log_dict``, and those of its child modules, to ``collector``."""
    loggers = [m for m in module.modules() if hasattr(m, "log_dict") and hasattr(m, "log")]
    metrics = [m for m in module.modules() if isinstance(m, Metric)] if collector.alone else []
    with with_attributes(loggers, {"log": collector.log}), with_attributes(metrics, _ALONE):
        yield collector


@contextmanager
def with_attributes(objects: Sequence[Any], values: dict[str, Any]) -> Iterator[None]:
    """Set attributes of each object, and give the object its own back."""
    before = [{k: vars(o)[k] for k in values if k in vars(o)} for o in objects]
    for o in objects:
        vars(o).update(values)
    try:
        yield
    finally:
        for o, old in zip(objects, before, strict=True):
            for key in values.keys() - old.keys():
                vars(o).pop(key, None)
            vars(o).update(old)
