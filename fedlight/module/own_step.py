"""A module's own ``optimizer_step``, and the optimizer as modules see it in Lightning."""

from collections.abc import Callable
from functools import cached_property
from typing import Any, cast

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch.optim import Optimizer


class OwnStep:
    """Calls a module's ``optimizer_step``, which has to end in ``optimizer.step(closure)``, for one client.

    ``update`` lets the optimizer take a step; ``show`` is called before somebody gets to see it. ``lrs`` are the
    learning rates of the steps that were taken.
    """

    def __init__(
        self, module: LightningModule, optimizer: Optimizer, update: Callable[[], None], show: Callable[[], None] | None
    ) -> None:
        self._module, self._optimizer, self._update, self._show = module, optimizer, update, show
        self._closure: Callable[[], Any] | None = None
        self.lrs: list[float] = []

    @cached_property
    def optimizer(self) -> LightningOptimizer:
        """What ``self.optimizers()`` gives, and ``optimizer_step`` gets."""
        if self._show is not None:
            self._show()
        wrapped: Any = LightningOptimizer(self._optimizer)
        wrapped.zero_grad = self._optimizer.zero_grad  # it has one of its own, by its class
        wrapped._strategy = self
        return cast(LightningOptimizer, wrapped)

    def __call__(self, batch_idx: int, gradient: Callable[[], Any]) -> None:
        """Let the module take a step; ``gradient`` gives the parameters their gradient.

        Raises:
            MisconfigurationException: if there was not one gradient and one step.
        """
        module, before, gradients = self._module, len(self.lrs), list[Any]()

        def closure() -> Any:
            gradients.append(gradient())
            return gradients[-1]

        self._closure = closure
        module.optimizer_step(module.current_epoch, batch_idx, self.optimizer, closure)
        self._closure = None
        if (steps := len(self.lrs) - before) != 1 or len(gradients) != 1:
            raise MisconfigurationException(
                f"model: {type(module).__name__}.optimizer_step must call optimizer.step(closure=optimizer_closure)"
                f" once in each step; step {before} of a client took {steps} steps and {len(gradients)} gradients."
            )

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], **_: Any) -> Any:
        """What a strategy of Lightning's does when ``step`` of :attr:`optimizer` is called."""
        if self._closure is None:
            raise MisconfigurationException(
                f"model: {type(self._module).__name__} calls step of self.optimizers(); with automatic optimization the"
                " trainer does. Only optimizer_step may, with optimizer.step(closure=optimizer_closure)."
            )
        loss = closure()
        self.lrs.append(float(optimizer.param_groups[0].get("lr", float("nan"))))
        self._update()
        return loss
