"""The optimizer's hyperparameters in every local step of a round, as numbers that are known ahead."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from fedlight.engines.base import ClientTask
from fedlight.module.optimizers import Optimization, configure_optimizers

Values = tuple[dict[str, Any], ...]
"""For each parameter group of the optimizer: its hyperparameters."""

_HOW = {"params", "foreach", "fused", "capturable"}  # what is no value


class LocalHyperparameters:
    """What the module's schedulers with interval ``step`` or ``epoch`` do in a client's round.

    The schedules depend on counts only, so they are worked out on a dummy optimizer before the client trains. The
    algorithm's ``factors`` multiply the learning rate of each of so many steps. Where nothing ``varies``, steps of a
    round do not differ, and the optimizer does not depend on the client. Where the module ``asks`` for what differs
    between clients of as many steps, as the number of batches, it depends on the client's size.

    Attributes:
        optimizer: the class of the optimizer that ``configure_optimizers`` has last made.
    """

    def __init__(self, module: LightningModule, factors: Callable[[int], Sequence[float]] | None = None) -> None:
        self._module, self._factors, trainer = module, factors, module._trainer
        if trainer is not None:
            trainer.asked = False  # type: ignore[attr-defined]
        made = configure_optimizers(module)
        schedulers, self.optimizer = made.schedulers, type(made.optimizer)
        self.asks = getattr(trainer, "asked", False)
        self._scheduled = any(s.interval != "round" for s in schedulers) or self.asks
        self.varies = self._scheduled or factors is not None

    def values(self, task: ClientTask, per_epoch: Sequence[int], fresh: Optimization | None = None) -> list[Values]:
        """The values in each of a client's steps, so many ``per_epoch``; equal neighbours are one object.

        What the client trains for itself alone has no part in the algorithm's factors. ``fresh`` is what
        ``configure_optimizers`` gives, where the caller has just asked; it is not changed.
        """
        values = self._unscaled(task, per_epoch, fresh)
        if self._factors is None or task.stage:
            return values
        factors = self._factors(len(values))
        return [tuple({**g, "lr": g["lr"] * f} for g in step) for step, f in zip(values, factors, strict=True)]

    def _unscaled(self, task: ClientTask, per_epoch: Sequence[int], fresh: Optimization | None) -> list[Values]:
        if not self._scheduled:
            fresh = fresh or configure_optimizers(self._module)
            self.optimizer, constant = type(fresh.optimizer), _values(fresh)
            if task.lrs is not None:
                constant = tuple({**group, "lr": lr} for group, lr in zip(constant, task.lrs, strict=True))
            return [constant] * sum(per_epoch)
        optimization = self._dummy(task.lrs)
        out: list[Values] = []
        for epoch, steps in enumerate(per_epoch):
            for _ in range(steps):
                now = _values(optimization)
                out.append(out[-1] if out and out[-1] == now else now)
                optimization.advance("step", len(out))
            optimization.advance("epoch", epoch + 1)
        return out

    def _dummy(self, lrs: tuple[float, ...] | None) -> Optimization:
        optimization = configure_optimizers(self._module)
        self.optimizer = type(optimization.optimizer)
        for group in optimization.optimizer.param_groups:
            group["params"] = [nn.Parameter(torch.zeros(()))]
        if lrs is not None:
            set_values(optimization.optimizer, tuple({"lr": lr} for lr in lrs))
        optimization.optimizer.step()  # there is no gradient; schedulers warn if the optimizer never stepped
        return optimization


def set_values(optimizer: Optimizer, values: Values) -> None:
    """Give each group its hyperparameters; a learning rate that is a tensor is overwritten, and stays where it is."""
    if len(optimizer.param_groups) != len(values):
        way = "Give all of them in configure_optimizers, which makes the optimizer of each client and round"
        raise MisconfigurationException(f"model: a parameter group was added while a client trains. {way}.")
    for group, new in zip(optimizer.param_groups, values, strict=True):
        for name, value in new.items():
            old = group.get(name)
            if isinstance(old, Tensor):
                old.fill_(value)
            else:
                group[name] = value


def lr_sum(values: Sequence[Values], steps: int) -> float:
    """Σ of the first group's learning rate over the first steps; NaN where the optimizer has none."""
    total = 0.0
    for step in range(steps):
        total += float(values[step][0].get("lr", float("nan")))
    return total


def _values(optimization: Optimization) -> Values:
    groups = optimization.optimizer.param_groups
    return tuple({k: v.item() if isinstance(v, Tensor) else v for k, v in g.items() if k not in _HOW} for g in groups)
