"""The optimizer's hyperparameters in every local step of a round, as numbers that are known ahead."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from fedlight.engines.base import ClientTask
from fedlight.module.optimizers import Optimization, configure_optimizers

Values = tuple[dict[str, Any], ...]
"""For each parameter group of the optimizer: its hyperparameters."""

Factors = Callable[[int], Sequence[float]]
"""From the number of a client's local steps to a factor for each of them."""

_NO_VALUES = {"params", "foreach", "fused", "capturable"}


class LocalHyperparameters:
    """What the module's schedulers with interval ``step`` or ``epoch`` do in a client's round.

    The schedules depend on counts only, so they are worked out on a dummy optimizer before the client trains.

    Args:
        module: whose ``configure_optimizers`` is asked, in every round.
        factors: what the algorithm multiplies the learning rate of each step with, from the number of steps.

    Attributes:
        varies: whether steps of a round may differ, or the optimizer depends on the client; otherwise all steps of a
            round have the same values.
    """

    def __init__(self, module: LightningModule, factors: Factors | None = None) -> None:
        self._module, self._factors, trainer = module, factors, module._trainer
        if trainer is not None:
            trainer.asked = False  # type: ignore[attr-defined]
        schedulers = configure_optimizers(module).schedulers
        self._scheduled = any(s.interval != "round" for s in schedulers) or getattr(trainer, "asked", False)
        self.varies = self._scheduled or factors is not None

    def values(
        self, task: ClientTask, steps_per_epoch: Sequence[int], fresh: Optimization | None = None
    ) -> list[Values]:
        """The values in each step of a client's round.

        Args:
            task: the client's; what it trains for itself alone has no part in the algorithm's factors.
            steps_per_epoch: optimizer steps of each local epoch.
            fresh: what ``configure_optimizers`` gives, where the caller has just asked; it is not changed.

        Returns:
            As many entries as there are steps; equal neighbours are one object.
        """
        values = self._unscaled(task.lrs, steps_per_epoch, fresh)
        if self._factors is None or task.stage:
            return values
        factors = self._factors(len(values))
        return [tuple({**g, "lr": g["lr"] * f} for g in step) for step, f in zip(values, factors, strict=True)]

    def _unscaled(
        self, lrs: tuple[float, ...] | None, steps_per_epoch: Sequence[int], fresh: Optimization | None
    ) -> list[Values]:
        if not self._scheduled:
            constant = _values(fresh or configure_optimizers(self._module))
            if lrs is not None:
                constant = tuple({**group, "lr": lr} for group, lr in zip(constant, lrs, strict=True))
            return [constant] * sum(steps_per_epoch)
        optimization = self._dummy(lrs)
        out: list[Values] = []
        for epoch, steps in enumerate(steps_per_epoch):
            for _ in range(steps):
                now = _values(optimization)
                out.append(out[-1] if out and out[-1] == now else now)
                optimization.advance("step", len(out))
            optimization.advance("epoch", epoch + 1)
        return out

    def _dummy(self, lrs: tuple[float, ...] | None) -> Optimization:
        optimization = configure_optimizers(self._module)
        for group in optimization.optimizer.param_groups:
            group["params"] = [nn.Parameter(torch.zeros(()))]
        if lrs is not None:
            optimization.set_lrs(lrs)
        optimization.optimizer.step()  # there is no gradient; schedulers warn if the optimizer never stepped
        return optimization


def set_values(optimizer: Optimizer, values: Values) -> None:
    """Give each group its hyperparameters; a learning rate that is a tensor is overwritten, and stays where it is."""
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
    return tuple({k: _plain(v) for k, v in group.items() if k not in _NO_VALUES} for group in groups)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value
